"""What reaches a terminal, a pipe or a file: what its encoding can show, and no warnings of libraries."""

import codecs
import contextlib
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable
from typing import Any

ERRORS = "sparsity.ascii"  # the name of our way to encode what an encoding lacks

STAND_INS = {
    "×": "x",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "−": "-",
    "–": "-",
    "—": "-",
    "≥": ">=",
    "≤": "<=",
    "∞": "inf",
    "Σ": "sum",
    "√": "sqrt",
    "·": "*",
    "•": "*",
    "▼": "v",
    "█": "#",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
STAND_INS |= dict.fromkeys("─━═╌╍┄┅╴╶╸╺╼╾", "-") | dict.fromkeys("│┃║╎╏┆┇╵╷╹╻", "|")
FIRST_OF_BOXES, LAST_OF_BOXES = "\u2500", "\u257f"  # the lines of tables; the rest of them are corners and crossings


def stand_in(character: str) -> str:
    """ASCII for one character: its letter without accents, or ? where there is nothing like it."""
    if character in STAND_INS:
        return STAND_INS[character]
    if FIRST_OF_BOXES <= character <= LAST_OF_BOXES:
        return "+"
    decomposed = unicodedata.normalize("NFKD", character)
    return "".join(part for part in decomposed if part.isascii()) or "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(stand_in, error.object[error.start : error.end])), error.end


codecs.register_error(ERRORS, _replace)


def be_lenient() -> None:
    """Lets stdout and stderr write stand-ins for what their encoding lacks, where they would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a notebook's cannot be told, and takes all
            stream.reconfigure(errors=ERRORS)


SPEAKING = ("hydra._internal.callbacks",)  # whose warnings say that code of the user's has failed


def be_quiet(own: Iterable[str]) -> None:
    """Leaves out Python's warnings but those of custom modules, here and in processes that start later.

    `python -W default` shows all.
    """
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    for name in (*SPEAKING, *own):
        warnings.filterwarnings("default", module=rf"{re.escape(name.removesuffix('.*'))}(\.|$)")
    os.environ["PYTHONWARNINGS"] = "ignore"


def shown(text: str, stream: Any) -> str:
    """A text as a stream can show it; its width is that of what will stand there."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, ERRORS).decode(encoding)


def say(text: str) -> None:
    """Prints a line on stdout, whatever its encoding."""
    print(shown(text, sys.stdout), flush=True)
