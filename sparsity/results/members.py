"""What lies in the folders of a sweep: its members, finished, failed and unfinished."""

import functools
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsity.errors import ConfigError
from sparsity.files import Unreadable, read_json
from sparsity.front import OBJECTIVES
from sparsity.results import BEGUN, FAILURE, dig, number
from sparsity.results.sealed import RESULT, read_result

log = logging.getLogger("sparsity")

SWEEP = "sweep.json"
FORMAT = 1  # of it
HYDRA = ".hydra"  # the folder that Hydra leaves in every job's folder
WITHOUT_EFFECT = ("card", "compact", "export", "plots", "step", "threads", "track")  # settings that change no result


@dataclass(frozen=True)
class MemberFolder:
    """One run of a sweep, as its folder tells it."""

    sweep: Path
    folder: Path
    overrides: tuple[str, ...]  # of the command line: those that run the member by itself
    result: dict[str, Any] | None = None
    error: str | None = None

    @property
    def status(self) -> str:
        """Done, failed or unfinished."""
        if self.result is not None:
            return "done"
        return "failed" if (self.folder / FAILURE).exists() else "unfinished"

    @property
    def flags(self) -> list[str]:
        """What the command line that runs the member by itself has before the overrides."""
        return list((self.result or {}).get("flags", ()))

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """The overrides as keys and values; of a key that is given twice the last one holds."""
        return dict(split(override) for override in self.overrides)

    def value(self, key: str) -> str | None:
        """The value of a key, from the command line or else from the whole config."""
        if key in self.settings or self.result is None:
            return self.settings.get(key)
        found = self.result.get("name", {}).get(key)
        return shown(dig(self.result.get("config"), key) if found is None else found)

    @property
    def seed(self) -> str | None:
        """The member's seed."""
        return self.value("seed")

    def number(self, key: str) -> float | None:
        """A number of the result under its dotted key; None where it was not measured."""
        return number(self.result, key)

    @property
    def key(self) -> str:
        """The member's place in its sweep."""
        return self.folder.relative_to(self.sweep).as_posix()


@dataclass(frozen=True)
class SweepFolder:
    """A folder of members, and what `sweep.json` says of it, if it is there."""

    folder: Path
    members: list[MemberFolder]
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def num_unfinished(self) -> int:
        """How many members did not end, those that never began among them where the total is known."""
        ended = sum(member.status != "unfinished" for member in self.members)
        return max(self.header.get("total") or 0, len(self.members)) - ended


def split(override: str) -> tuple[str, str]:
    """The key and the value of an override."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def shown(value: Any) -> str | None:
    """A value as the command line has it."""
    return value if value is None or isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def canonical(text: str | None) -> str | float | None:
    """A value such that 0.1 and 1e-1 are equal."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return re.sub(r"[\s'\"]", "", text)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_sweep(folder: Path) -> SweepFolder:
    """The members below a folder, in the order of their jobs."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name the folder of a sweep or of runs")
    header = _header(folder / SWEEP)
    found = sorted(_member_folders(folder), key=lambda path: _natural(path.relative_to(folder)))
    return SweepFolder(folder, [_member(folder, path) for path in found], header)


def _member_folders(root: Path) -> Iterable[Path]:
    def tell(error: OSError) -> None:
        log.warning(f"warning: {error.filename} cannot be read: {error.strerror}; it is left out")

    for folder, subfolders, files in os.walk(root, onerror=tell):
        if {RESULT, FAILURE, BEGUN} & {*files, *subfolders} or HYDRA in subfolders:
            yield Path(folder)
            subfolders.clear()
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _natural(path: Path) -> list[list[Any]]:
    """A key that sorts 2 before 10, at every level of a path."""
    return [[int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)] for name in path.parts]


def _member(sweep: Path, folder: Path) -> MemberFolder:
    result, error = _result(folder / RESULT)
    if result is None and error is None and (folder / FAILURE).exists():
        error = _failure(folder)
    given = (result or {}).get("overrides")
    return MemberFolder(sweep, folder, tuple(_noted_overrides(folder) if given is None else given), result, error)


def _header(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    try:
        header = read_json(path)
        if header.get("format") != FORMAT:
            raise Unreadable(f"has format {header.get('format')!r}, and this version reads format {FORMAT} only")
        for kind, names in HEADER.items():
            for name in names:
                if not isinstance(header.get(name) or kind(), kind):
                    raise Unreadable(f"is damaged: its {name} is {header[name]!r:.40}")
        if not all(isinstance(text, str) for name in ("swept", "objectives") for text in header.get(name) or ()):
            raise Unreadable("is damaged: its swept keys or objectives are no texts")
    except Unreadable as problem:
        log.warning(f"warning: {path} {problem}; it is left out")
        return {}
    return header


HEADER = {list: ("swept", "objectives", "overrides"), int: ("total",)}


def _result(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """A whole result, or why there is none; None and None where the run has not ended."""
    if not os.path.lexists(path):
        return None, None
    try:
        return read_result(path), None
    except Unreadable as problem:
        log.warning(f"warning: {path} {problem}; the member is left out")
        return None, f"{RESULT} {problem}"


def _failure(folder: Path) -> str:
    """The cause of a failure; paths in it are shown within the member's folder."""
    try:
        node = read_json(folder / FAILURE)
        text = " ".join(f"{node.get('kind')}: {node.get('error')}".split())
    except Unreadable as problem:
        text = f"{FAILURE} {problem}"
    for prefix in (str(folder.resolve()), str(folder)):
        text = text.replace(f"{prefix}{os.sep}", "")
    return text


def _noted_overrides(folder: Path) -> list[str]:
    """The overrides as they were noted when the job began: by itself, or by Hydra, whose folder may be switched off."""
    try:
        entries = read_json(folder / BEGUN).get("overrides")
    except Unreadable:
        try:
            entries = yaml.safe_load((folder / HYDRA / "overrides.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return []
    given = [str(entry) for entry in entries] if isinstance(entries, list) else []
    return [entry for entry in given if not entry.startswith("search=")]  # it made the sweep, and is none of the run's


# --- what was swept --------------------------------------------------------------------------------------------------


def has_effect(key: str) -> bool:
    """Whether a setting can change a result."""
    return key.partition(".")[0] not in WITHOUT_EFFECT


def swept_keys(sweeps: Iterable[SweepFolder]) -> list[str]:
    """The keys that the sweeps name as swept, and those whose values differ between members."""
    sweeps = list(sweeps)
    named = [key for sweep in sweeps for key in sweep.header.get("swept") or ()]
    members = [member for sweep in sweeps for member in sweep.members]
    given = [key for member in members for key in member.settings]
    differing = [key for key in dict.fromkeys(given) if has_effect(key) and differs(members, key)]
    return list(dict.fromkeys([*named, *differing]))


def differs(members: Iterable[MemberFolder], key: str) -> bool:
    """Whether members have different values of a key, as far as they are known."""
    known = [member for member in members if member.result is not None or key in member.settings]
    return len({canonical(member.value(key)) for member in known}) > 1


def chosen_objectives(sweeps: Iterable[SweepFolder], given: Iterable[str] | None) -> list[str]:
    """The objectives: those given, or else those that the sweeps were run for."""
    found = [list(given)] if given is not None else [names for sweep in sweeps if (names := _own_objectives(sweep))]
    if any(names != found[0] for names in found):
        sets = "; ".join(sorted({",".join(names) for names in found}))
        raise ConfigError(f"the sweeps have different objectives ({sets}): choose by --objectives NAME,NAME")
    names = found[0] if found else ["accuracy", "compression"]
    if not names or len(set(names)) != len(names) or not set(names) <= set(OBJECTIVES):
        raise ConfigError(f"objectives must name each once, of {', '.join(OBJECTIVES)}; got {','.join(names)!r}")
    return names


def _own_objectives(sweep: SweepFolder) -> list[str] | None:
    results = [member.result for member in sweep.members if member.result is not None]
    return sweep.header.get("objectives") or (results and results[0].get("config", {}).get("objectives")) or None


# --- summary.csv -----------------------------------------------------------------------------------------------------

LEFT_OUT = ("format", "config", "layers", "environment", "overrides", "computed", "computed_with", "files", "checksum")
LEFT_OUT += ("keys", "warnings", "stages_run")


def metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Every single value of a result under its dotted key, and the number of warnings."""
    flat = _flatten({key: value for key, value in result.items() if key not in LEFT_OUT})
    return {**flat, "num_warnings": len(result.get("warnings", ()))}


def _flatten(node: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{rest}": entry for rest, entry in _flatten(value).items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat
