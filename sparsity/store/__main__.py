"""Looks at a store of finished stages, and cleans it: `python -m sparsity.store --help`."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from sparsity.errors import USER_MISTAKE, ConfigError, SparsityError, reason
from sparsity.files import PART, is_left_over, obstacle
from sparsity.store import SUFFIX, read_description
from sparsity.streams import be_lenient, say
from sparsity.tables import Column, show_table


class Entry(NamedTuple):
    """One file of a store."""

    stage: str
    path: Path
    num_bytes: int
    last_used: float  # seconds since 1970

    @property
    def key(self) -> str:
        """The key of the stage."""
        return self.path.name.partition(".")[0]


USUAL = ("magnitude", "entry")  # parts of a rule that go without saying


def entries(folder: Path) -> list[Entry]:
    """The stages of a store, the latest used first; damaged files that were set aside among them."""
    found = []
    for stage in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            names = os.listdir(stage)
        except OSError as error:
            _warn(f"{stage} cannot be read ({error.strerror}): its stages are left out")
            continue
        for path in (stage / name for name in names if SUFFIX in name):
            with contextlib.suppress(FileNotFoundError):  # cleaned away meanwhile
                stat = path.lstat()
                if not _is_being_written(path, stat.st_mtime):
                    found.append(Entry(stage.name, path, stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda entry: -entry.last_used)


def _is_being_written(path: Path, since: float) -> bool:
    if not path.name.startswith("."):
        return False
    return not is_left_over(path) if path.name.endswith(PART) else time.time() - since < UNITS["d"]


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def to_clean(
    found: Sequence[Entry], *, now: float, age: float | None, size: float | None, used: Set[str] | None
) -> list[Entry]:
    """The stages that go: unused for `age` seconds; beyond `size` bytes, the latest used staying; of no key in `used`.

    What is None is not looked at; `found` is sorted by last use, as `entries` gives it.
    """
    room = float("inf") if size is None else size
    gone = []
    for entry in found:
        is_old = age is not None and now - entry.last_used > age
        is_unused = used is not None and entry.key not in used
        fits = entry.num_bytes <= room
        if is_old or is_unused or not fits:
            gone.append(entry)
        if fits:
            room -= entry.num_bytes
    return gone


def keys_in_use(folders: Iterable[Path]) -> set[str]:
    """The keys that the results anywhere under some folders name."""
    used: set[str] = set()
    for folder in folders:
        for path in _results_below(folder):
            try:
                if (other := obstacle(path)) is not None:
                    raise ValueError(f"it is {other}")
                keys = json.loads(path.read_text(encoding="utf-8")).get("keys", {})
                used |= {str(key) for key in keys.values()}
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise ConfigError(f"{path} cannot be read ({reason(error)}): mend or remove it, then clean") from error
    return used


def _results_below(folder: Path) -> Iterator[Path]:
    """What is called `result.json` under a folder; what cannot be read may hold some, and is refused."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}), and may hold results: have it opened")

    for place, folders, names in os.walk(folder, onerror=refuse):
        if "result.json" in (*folders, *names):
            yield Path(place, "result.json")


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _amount(units: Mapping[str, int], example: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "")
        try:
            amount = float(number) * units[unit]
        except (ValueError, KeyError):
            amount = float("nan")
        if not 0 <= amount < float("inf"):
            raise argparse.ArgumentTypeError(f"got {text!r}, where such as {example} is wanted")
        return amount

    return read


def _size_of(num_bytes: float) -> str:
    unit = next((unit for unit, size in reversed(SIZES.items()) if num_bytes >= size), "")
    return f"{num_bytes / SIZES[unit]:.1f} {unit}B" if unit else f"{num_bytes:.0f} B"


def _age_of(seconds: float) -> str:
    unit = next((unit for unit, size in reversed(UNITS.items()) if seconds >= size), "s")
    return f"{seconds / UNITS[unit]:.0f}{unit}"


def _says(entry: Entry) -> str:
    """What a stage was made of, in a few words; or what is wrong with its file."""
    if entry.path.name.endswith(PART):
        return "left half written"
    if not entry.path.name.endswith(SUFFIX):
        return "damaged"
    try:
        words = _made_of(read_description(entry.path)["ingredients"])
    except OSError as error:
        return f"cannot be read: {error.strerror or reason(error)}"
    except Exception:  # whatever a damaged file makes its reader trip over
        return "damaged"
    return " ".join(words)


def _made_of(own: dict[str, Any]) -> list[str]:
    numbers = own.get("function", {}).get("numbers", {})  # stages of the first version have none
    words = [f"seed={own['seed']}"]
    if numbers.get("penalty"):
        words += [_name(numbers["penalty"]["penalty"]), f"decay={numbers['penalty']['decay']:g}"]
    if numbers.get("rule"):
        rule = numbers["rule"]  # of an earlier version in one part
        parts = [rule[part]["function"] for part in ("importance", "unit", "cut")] if "unit" in rule else [rule["rule"]]
        words += [name for name in map(_name, parts) if name not in USUAL]
    words += [f"sensitivity={numbers['sensitivity']:g}"] if "sensitivity" in numbers else []
    words += [
        f"{name}={value:g}" for name, value in (numbers.get("budget") or {}).items() if isinstance(value, int | float)
    ]
    words += [f"to={numbers['to']}"] if "to" in numbers else []
    if "schedule" in numbers:
        epochs = numbers["schedule"]["epochs"]
        words.append(f"epochs={own['stop']} of {epochs}" if "stop" in own else f"epochs={epochs}")
    if isinstance(own["before"], dict):
        words.insert(0, _name(own["before"]["model"]))
    else:
        words.append(f"after {own['before'][:SHORT]}")
    return words


def _name(call: Mapping[str, Any]) -> str:
    return call["target"].rpartition(".")[2]


SHORT = 8  # digits of a key that tell stages apart in a list


def _list(found: Sequence[Entry], now: float) -> None:
    if found:
        show_table(
            [
                Column("stage", [entry.stage for entry in found], True),
                Column("key", [entry.key for entry in found], True, rank=1, cut="end"),
                Column("size", [_size_of(entry.num_bytes) for entry in found]),
                Column("last used", [f"{_age_of(now - entry.last_used)} ago" for entry in found]),
                Column("made of", [_says(entry) for entry in found], True, cut="end", least=20),
            ]
        )
    say(f"{len(found)} stages, {_size_of(sum(entry.num_bytes for entry in found))}")


def _clean(given: argparse.Namespace, found: Sequence[Entry], now: float) -> None:
    if given.older_than is None and given.max_size is None and not given.unused:
        raise ConfigError("clean needs one of --older-than 30d, --max-size 10G, --unused: what is to go?")
    missing = [folder for folder in given.results if given.unused and not folder.is_dir()]
    if missing:
        raise ConfigError(f"--results {missing[0]} is no folder: name those that hold the results to keep")
    used = keys_in_use(given.results) if given.unused else None
    gone = to_clean(found, now=now, age=given.older_than, size=given.max_size, used=used)
    if not given.dry_run:
        gone = [entry for entry in gone if _remove(entry.path)]
    freed = _size_of(sum(entry.num_bytes for entry in gone))
    say(f"{'would remove' if given.dry_run else 'removed'} {len(gone)} of {len(found)} stages, {freed}")


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # another user's, or a folder in a file's place
        _warn(f"{path} cannot be removed: {error.strerror or reason(error)}")
        return False
    return True


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sparsity.store", description="Looks at the store of finished stages.")
    parser.add_argument("--store", type=Path, default=Path("outputs/store"), help="its folder (%(default)s)")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every stage: size, when last used, what it was made of")
    clean = actions.add_parser("clean", help="removes stages; they are computed again when a run needs them")
    clean.add_argument("--older-than", type=_amount(UNITS, "30d"), help="those not used for so long: 12h, 30d, 8w")
    clean.add_argument("--max-size", type=_amount(SIZES, "10G"), help="those last used first, down to this: 500M, 10G")
    clean.add_argument("--unused", action="store_true", help="those that no result under --results was made from")
    clean.add_argument("--results", type=Path, nargs="+", default=[Path("outputs")], help="folders (outputs)")
    clean.add_argument("--dry-run", action="store_true", help="only says what would go")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    be_lenient()
    given = _arguments().parse_args(arguments)
    try:
        if not given.store.is_dir():
            raise ConfigError(f"--store {given.store} is no folder: name the one that runs were given by store=FOLDER")
        found, now = entries(given.store), time.time()
        if given.action == "list":
            _list(found, now)
        else:
            _clean(given, found, now)
    except (SparsityError, OSError) as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
