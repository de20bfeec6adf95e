"""`result.json` and the networks that it is of, under one checksum: checked before a finished run is trusted."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsity.files import Unreadable, file_digest, read_json

RESULT = "result.json"
FORMAT = 2
READ = (1, FORMAT)  # for tables and comparisons; a sweep resumes from the latest alone
KINDS = {dict: ("name", "accuracy", "compression", "macs", "nonzero", "total", "config", "environment", "seconds")}
KINDS |= {list: ("stages", "layers", "overrides", "warnings", "computed"), str: ("structure", "selection")}


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as JSON holds it, with the checksum of all of it; NaN and infinity, which JSON lacks, are null."""
    plain = json.loads(json.dumps(finite(result), allow_nan=False, default=str))
    return {**plain, "checksum": _checksum(plain)}


def finite(value: Any) -> Any:
    """A tree of containers with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checksum(result: Mapping[str, Any]) -> str:
    own = {key: value for key, value in result.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(own, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_result(path: Path) -> dict[str, Any]:
    """What a `result.json` holds, for tables and comparisons; raises Unreadable where it is damaged or another's.

    One of the first version, which has no checksum, is read as it is where it has the right form.
    """
    result = read_json(path)
    if "checksum" in result and result["checksum"] != _checksum(result):
        raise Unreadable("is damaged: its checksum differs")
    if result.get("format") not in READ or isinstance(result["format"], bool):
        raise Unreadable(f"has format {result.get('format')!r}, and this version reads formats 1 and {FORMAT}")
    for kind, names in KINDS.items():
        for name in names:
            if not isinstance(result.get(name, kind()), kind):
                raise Unreadable(f"is damaged: its {name} is {result[name]!r:.40}")
    if not all(isinstance(entry, str) for name in ("stages", "overrides") for entry in result.get(name) or ()):
        raise Unreadable("is damaged: its stages or overrides are no texts")
    if not _has_numbers(result):
        raise Unreadable("is damaged: it lacks accuracy, compression, macs or nonzero")
    return result


def _has_numbers(result: Mapping[str, Any]) -> bool:
    """Whether what is compared between results is there and finite; null where nothing is left, or was measured."""
    try:
        final, counts = result["accuracy"]["final"], [result["macs"]["pruned"], result["nonzero"]["weights"]]
        shares = [final["test"]] if final["validation"] is None else [final["test"], final["validation"]]
        times = result["compression"]["weights"]
        return (
            all(0 <= share <= 1 for share in shares)
            and all(count >= 0 for count in counts)
            and (times is None or times >= 0)
        )
    except (KeyError, TypeError):
        return False


def check_finished(folder: Path) -> dict[str, Any]:
    """The result of a folder and its networks, all as they were written; raises Unreadable where they are not."""
    result = _checked(folder)
    for name, about in result["files"].items():
        if _size(folder / name) != about["bytes"] or file_digest(folder / name) != about["sha256"]:
            raise Unreadable(f"says of {name} what is not in it")
    return result


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a result as it was written, and networks of the sizes that it names: a quick look."""
    try:
        result = _checked(folder)
        return all(_size(folder / name) == about["bytes"] for name, about in result["files"].items())
    except (Unreadable, OSError):
        return False


def _checked(folder: Path) -> dict[str, Any]:
    result = read_result(folder / RESULT)
    if "checksum" not in result:
        raise Unchecked("has no checksum")
    if result["format"] != FORMAT:
        raise Unchecked(f"has format {result['format']}, and runs resume from format {FORMAT} alone")
    return result


class Unchecked(Unreadable):
    """A whole result of an earlier version, which nothing proves or which lacks what this one says."""


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
