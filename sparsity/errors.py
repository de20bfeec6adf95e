"""What a user can do wrong: one line that names the key, the value and the remedy."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

USER_MISTAKE = 2  # the exit status
LONGEST = 600  # characters of a line; of a longer one its middle is left out


def reason(error: BaseException) -> str:
    """What an error of somebody else's code says, in one short line."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that is spelt most like a word, if one is; upper case is as lower, and of the same letters first."""
    pool = {name.lower(): name for name in names}
    same = [name for name in pool if sorted(name) == sorted(word.lower())]
    close = get_close_matches(word.lower(), same or pool, n=1, cutoff=0.4 if same else 0.7)
    return pool[close[0]] if close else None


def one_line(text: object) -> str:
    """A text as one line: what is not printable is escaped, the middle of a very long one left out."""
    spaced = re.sub(r"[\t\n\r]+", " ", str(text))
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in spaced)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


class SparsityError(Exception):
    """A mistake that the user can mend; its message is one line."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


class ConfigError(SparsityError):
    """A setting that is unknown, of the wrong type, out of range or in conflict with another."""


class DataError(SparsityError):
    """A data set that is missing, damaged or unusable."""


class WeightsError(SparsityError):
    """A weights file that is missing, damaged, unsafe or made for another network."""


class DivergedError(SparsityError):
    """A loss that became NaN or infinite."""


class StageError(SparsityError):
    """A stage that failed on its way: a custom module, method or optimizer, or memory."""


class ExportError(SparsityError):
    """A network that another program cannot take, or of which it computes something else."""
