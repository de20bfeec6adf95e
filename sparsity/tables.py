"""Tables and lines as wide as the terminal: what does not fit is shortened or left out, never broken within words."""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.box import ASCII_DOUBLE_HEAD, HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsity.streams import say, shown

WIDTH = 160  # characters where the output is no terminal
FRAME, GAP = 3, 2  # characters from one column to the next, with and without lines between them
MORE = "…"
SEPARATOR = " | "  # of the parts of a line


@dataclass(frozen=True)
class Column:
    """One column of a table, and what becomes of it where there is no room."""

    name: str
    cells: Sequence[str]
    is_text: bool = False  # to the left; numbers to the right
    rank: int = 0  # the column of the highest rank is left out first; of rank 0 none is
    cut: Literal["", "start", "end"] = ""  # the end of a cell that may be cut off
    least: int = 8  # characters that are left of a cell

    @property
    def width(self) -> int:
        """The width of the widest cell, the name among them."""
        return max(map(cell_len, (self.name, *self.cells)))

    def within(self, width: int, more: str) -> "Column":
        """The column cut to a width; more: what stands for the rest."""
        name = shorten(self.name, width, "start" if "." in self.name else "end", more)
        return replace(self, name=name, cells=[shorten(cell, width, self.cut, more) for cell in self.cells])


def shorten(text: str, width: int, cut: str, more: str = MORE) -> str:
    """A text cut to a width, at its start or its end."""
    if cell_len(text) <= width:
        return text
    kept = text
    while kept and cell_len(kept) + len(more) > width:
        kept = kept[1:] if cut == "start" else kept[:-1]
    return f"{more}{kept}" if cut == "start" else f"{kept}{more}"


def fitted(columns: Sequence[Column], room: int, more: str = MORE) -> list[Column]:
    """The columns that fit: first cells are shortened, the widest first, then columns are left out by rank."""
    columns = list(columns)
    while True:
        room_for_cells = room - GAP * (len(columns) - 1)
        widths = _widths(columns, room_for_cells)
        if sum(widths) <= room_for_cells or not any(column.rank for column in columns):
            return [column.within(width, more) if column.cut else column for column, width in zip(columns, widths)]
        columns.remove(max(columns, key=lambda column: column.rank))


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """The widths of columns, those that may be cut made narrower until all fit or no cell has more to give."""
    widths = [column.width for column in columns]
    while sum(widths) > room:
        spare = [i for i, column in enumerate(columns) if column.cut and widths[i] > column.least]
        if not spare:
            break
        widths[max(spare, key=lambda i: widths[i])] -= 1
    return widths


def width_of(stream: Any) -> int:
    """The characters in a line: those of the terminal or of COLUMNS; where there is neither, plenty."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return Console(file=stream).width if stream.isatty() else WIDTH


def show_table(columns: Sequence[Column], *, title: str = "", caption: str = "", num_sums: int = 0) -> None:
    """A table on stdout; the last rows are sums, below a line. Texts are shown as they are, without markup."""
    stream = sys.stdout
    width = width_of(stream)
    columns = [_printable(column, stream) for column in columns]
    is_framed = sum(column.width + FRAME for column in columns) < width
    table = Table(
        title=Text(shown(title, stream)) if title else None,
        caption=Text(shown(caption, stream)) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=_box(is_framed, stream),
        show_edge=is_framed,
        pad_edge=is_framed,
        padding=(0, 1) if is_framed else (0, GAP - 1, 0, 0),
    )
    columns = columns if is_framed else fitted(columns, width, shown(MORE, stream))
    for column in columns:
        table.add_column(Text(column.name), justify="left" if column.is_text else "right", no_wrap=True)
    rows = list(zip(*(column.cells for column in columns)))
    for number, row in enumerate(rows):
        if num_sums and number == len(rows) - num_sums:
            table.add_section()
        table.add_row(*map(Text, row))
    Console(file=stream, width=width).print(table, highlight=False)


def _box(is_framed: bool, stream: Any) -> Box:
    """The lines of a table, in ASCII where the stream has no others."""
    if shown(str(HEAVY_HEAD), stream) == str(HEAVY_HEAD):
        return HEAVY_HEAD if is_framed else SIMPLE_HEAD
    return ASCII_DOUBLE_HEAD if is_framed else Box(shown(str(SIMPLE_HEAD), stream), ascii=True)


def _printable(column: Column, stream: Any) -> Column:
    """A column whose cells are each one line of characters that the stream can show."""
    name, *cells = (shown(_escaped(text), stream) for text in (column.name, *column.cells))
    return replace(column, name=name, cells=cells)


def _escaped(text: str) -> str:
    """A text whose line ends and other control characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say_parts(parts: Iterable[str]) -> None:
    """Parts as one line on stdout; in a terminal as lines that are broken between parts."""
    is_terminal = sys.stdout.isatty()
    say(wrapped(parts, width_of(sys.stdout)) if is_terminal else SEPARATOR.join(parts))


def wrapped(parts: Iterable[str], width: int) -> str:
    """Parts as lines of at most a width, broken between parts, or else between words; further lines are indented."""
    lines: list[str] = []
    for part in parts:
        indent = "  " if lines else ""
        if lines and len(lines[-1]) + len(SEPARATOR) + len(part) <= width:
            lines[-1] += f"{SEPARATOR}{part}"
        else:
            lines += textwrap.wrap(
                part,
                max(width, len(indent) + 1),
                initial_indent=indent,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
