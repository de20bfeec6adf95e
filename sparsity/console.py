"""What a person sees while a run works: progress bars, tables, one line at the end."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column as GridColumn

from sparsity import tables
from sparsity.accounting import Report, Row
from sparsity.capture import Way
from sparsity.data import count_batches
from sparsity.streams import shown
from sparsity.tables import Column
from sparsity.training import Epoch, Loop, Watcher

log = logging.getLogger("sparsity")
SECONDS_BETWEEN_LINES = 10.0  # of the plain lines that stand for a bar where the output is no terminal
TIME_WIDTH = len("1:00:00 ")  # of the time left
SHORTEST_BAR, LONGEST_BAR = 6, 24
COMPILING = "compiling the training step"  # takes 2 s, or 11 s of a network that is new to the machine
MAX_ROWS = 40  # tensors in a table: those of the networks on MNIST fit many times, and a screen takes no more


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows in a terminal what is being waited for, as long as it takes."""
    is_terminal = sys.stderr.isatty()
    if is_terminal:
        print(shown(text, sys.stderr), end="\r", file=sys.stderr, flush=True)  # what is said next goes over it
    try:
        yield
    finally:
        if is_terminal:
            print(end="\r\033[K", file=sys.stderr, flush=True)


def watch(stage: str, loop: Loop, num_images: int) -> "StageProgress":
    """What shows a stage that trains by a loop on so many images."""
    num_batches = count_batches(num_images, loop.batch_size)
    return StageProgress(stage, loop.epochs, num_batches, way=loop.way)


class StageProgress(Watcher):
    """A bar for one stage, or plain lines from time to time where the output is no terminal."""

    def __init__(self, stage: str, num_epochs: int, num_batches: int, *, way: Way = "eager"):
        self.stage, self.way = stage, way
        self.num_epochs, self.num_batches = num_epochs, num_batches
        self.start = self.last_line = time.monotonic()
        self.batches = 0
        self.bar: Progress | None = None
        waits_for = COMPILING if way == "compiled" else ""
        if sys.stderr.isatty() and num_epochs:
            console = Console(stderr=True, width=tables.width_of(sys.stderr))
            self.room = console.width - len(f"{stage:<10} ") - TIME_WIDTH
            self.gauge = BarColumn()
            self.bar = Progress(
                TextColumn("{task.description:<10}", markup=False, table_column=GridColumn(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=GridColumn(no_wrap=True, min_width=5)),
                TextColumn("{task.fields[text]}", markup=False, table_column=GridColumn(no_wrap=True)),
                self.gauge,
                console=console,
            )
            self.task = self.bar.add_task(stage, total=num_epochs * num_batches, text="")
            self._show(waits_for)
            self.bar.start()
        elif waits_for:
            log.info(f"{stage:<10} {waits_for}")

    def _show(self, text: str) -> None:
        """Puts a text beside the bar, which takes what is left of the line."""
        text = tables.shorten(text, self.room - SHORTEST_BAR - 1, "end")
        self.gauge.bar_width = max(SHORTEST_BAR, min(LONGEST_BAR, self.room - len(text) - 1))
        self.bar.update(self.task, text=text)

    def batch(self) -> None:
        """Moves the bar."""
        self.batches += 1
        if self.bar:
            self.bar.update(self.task, completed=self.batches)

    def epoch(self, row: Epoch) -> None:
        """Shows what an epoch came to."""
        text = describe(row, self.num_epochs, way=self.way)
        if self.bar:
            self._show(describe(row, self.num_epochs, self.room - SHORTEST_BAR - 1, way=self.way))
        is_last = row.epoch == self.num_epochs
        if row.epoch and (is_last or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES):
            self.last_line = time.monotonic()
            if not self.bar:
                log.info(f"{self.stage:<10} {text}{'' if is_last else f' | {self._left(row.epoch)} left'}")

    def _left(self, epoch: int) -> str:
        seconds = (time.monotonic() - self.start) / epoch * (self.num_epochs - epoch)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

    def close(self) -> None:
        """Takes the bar down; what it showed last stays."""
        if self.bar:
            self.bar.stop()


def describe(row: Epoch, num_epochs: int, room: float = math.inf, *, way: Way = "eager") -> str:
    """One epoch in words; over several members, their means; of the last one, if steps were computed by kernels.

    What has no room is left out: first this, then the penalty.
    """
    parts = {"epoch": f"epoch {row.epoch}/{num_epochs}"}
    if row.loss is not None and row.penalty is not None:
        parts |= {"loss": f"loss {_mean(row.loss):.4f}", "penalty": f"penalty {_mean(row.penalty):.4g}"}
    if row.validation is not None:
        parts["validation"] = f"validation {_mean(row.validation):.2%}"
    if way == "kernels" and row.epoch == num_epochs:
        parts["way"] = "by kernels"
    for name in ("way", "penalty", "loss", "validation"):
        if len(" | ".join(parts.values())) > room:
            parts.pop(name, None)
    return " | ".join(parts.values())


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def show_report(title: str, report: Report) -> None:
    """The table of what is left, per tensor and whole, on stdout; a narrow terminal gets fewer columns."""
    rows = _most(report.rows)
    kinds = ("weights", "parameters")
    counts = [(row.nonzero, row.total) for row in rows] + [(report.nonzero[kind], report.total[kind]) for kind in kinds]
    columns = [
        Column("tensor", [row.name for row in rows] + [f"all {kind}" for kind in kinds], True, cut="start", least=14),
        _column("shape", ["×".join(map(str, row.shape)) for row in rows], rank=5),
        _column("std", [_number(row.std) for row in rows], rank=8),
        _column("threshold", [_number(row.threshold) for row in rows], rank=7),
        Column("non-zeros", [_count(nonzero) for nonzero, _ in counts]),
        Column("of", [_count(total) for _, total in counts], rank=6),
        Column("density", [f"{nonzero / total:.2%}" if total else "" for nonzero, total in counts]),
        _column("live in", [_count(row.live_inputs) for row in rows], rank=2),
        _column("live out", [_count(row.live_outputs) for row in rows], rank=3),
        _column("MACs", [_count(row.macs) for row in rows], _count(report.macs["pruned"]), rank=1),
        _column(
            "MACs removable", [_count(row.macs_removable) for row in rows], _count(report.macs["removable"]), rank=4
        ),
    ]
    left_out = len(report.rows) - len(rows)
    caption = f"the largest {len(rows)} tensors; {left_out} more are in layers.csv" if left_out else ""
    tables.show_table(columns, title=title, caption=caption, num_sums=len(kinds))


def _most(rows: Sequence[Row]) -> list[Row]:
    """The rows that a person can take in: of a large network those of the largest tensors."""
    largest = sorted(rows, key=lambda row: -row.total)[:MAX_ROWS]
    return [row for row in rows if any(row is other for other in largest)]


def _column(name: str, cells: list[str], of_weights: str = "", *, rank: int) -> Column:
    """A column of the report: a cell for each tensor, and perhaps one for all weights."""
    return Column(name, [*cells, of_weights, ""], rank=rank)


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
