"""What comes out of sweeps: `summary.csv`, `front.json`, the pictures of the front, and the front as a table."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsity import __version__
from sparsity.errors import ConfigError
from sparsity.files import write_text
from sparsity.front import OBJECTIVES
from sparsity.results import csv_text
from sparsity.results.members import MemberFolder, metrics
from sparsity.results.points import describe, relative
from sparsity.results.summaries import Summary, read

log = logging.getLogger("sparsity")

SUMMARY, FRONT = "summary.csv", "front.json"
FORMAT = 1  # of front.json
PICTURES = ("pareto.png", "pareto.html")


def summarise(
    folders: Sequence[Path | str],
    *,
    out: Path | str | None = None,
    objectives: Sequence[str] | None = None,
    color_by: str | None = None,
    published: bool = False,
) -> Summary:
    """Reads the sweeps in `folders` and writes summary.csv, front.json, pareto.png and pareto.html into `out`.

    out: None: the one folder. objectives: None: those of the sweeps. color_by: the key that colours the points;
    None: the first that was swept. published: draws published results of the same network behind.
    """
    summary = read(folders, out=out, objectives=objectives)
    if color_by is not None and all(point.value(color_by) is None for point in summary.points):
        raise ConfigError(
            f"--color-by {color_by} is no key of the runs: choose of {', '.join(summary.swept) or 'none'}"
        )
    with _writing(summary.out):
        summary.out.mkdir(parents=True, exist_ok=True)
        write_text(summary.out / SUMMARY, summary_csv(summary))
        drawn = _draw(summary, color_by, published) if summary.points else None
        write_text(summary.out / FRONT, front_json(summary, drawn))
    return summary


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; name another by --out") from error


# --- summary.csv -----------------------------------------------------------------------------------------------------


def summary_csv(summary: Summary) -> str:
    """One row a member: what was swept, how it ended, every number of its result."""
    numbers = [metrics(member.result) if member.result else {} for member in summary.members]
    found = [key for row in numbers for key in row if key not in summary.swept]
    columns = [key for key in dict.fromkeys(found) if not key.startswith("seconds.")]
    times = [key for key in dict.fromkeys(found) if key.startswith("seconds.")]
    several = ["sweep"] if len(summary.sweeps) > 1 else []
    header = [*several, *summary.swept, "status", "error", *columns, *times, "folder"]
    rows = ({**row, **_identity(summary, member)} for member, row in zip(summary.members, numbers))
    return csv_text(header, ({key: row.get(key) for key in header} for row in rows))


def _identity(summary: Summary, member: MemberFolder) -> dict[str, Any]:
    """The columns of the summary that no result has."""
    return {
        "sweep": relative(member.sweep, summary.out),
        **{key: member.value(key) for key in summary.swept},
        "status": member.status,
        "error": member.error,
        "folder": relative(member.folder, summary.out),
    }


# --- front.json ------------------------------------------------------------------------------------------------------


def front_json(summary: Summary, drawn: str | None) -> str:
    """The front; drawn: what the pictures beside it show, as a hash."""
    node = {
        "format": FORMAT,
        "objectives": [{"name": name, "direction": OBJECTIVES[name].direction} for name in summary.objectives],
        "accuracy": "validation",
        "swept": summary.swept,
        "points": [describe(point, summary.objectives, summary.out) for point in summary.front],
        "drawn": drawn,
    }
    return json.dumps(node, indent=1, allow_nan=False) + "\n"


def _draw(summary: Summary, color_by: str | None, published: bool) -> str:
    """Draws the pictures, unless they show the same already; a hash of what they show."""
    points = [describe(point, summary.objectives, summary.out) for point in summary.points]
    shown = [__version__, summary.objectives, summary.swept, points, color_by, published]
    wanted = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    if wanted != _drawn(summary.out):
        from sparsity.results import page, pareto

        (summary.out / FRONT).unlink(missing_ok=True)  # until the pictures are whole
        view = pareto.view_of(summary, color_by, published)
        pareto.draw(summary.out / PICTURES[0], view)
        page.write(summary.out / PICTURES[1], view, summary)
    return wanted


def _drawn(folder: Path) -> str | None:
    """What the pictures in a folder show, as a hash; None where one is missing."""
    if not all((folder / name).exists() for name in PICTURES):
        return None
    try:
        return json.loads((folder / FRONT).read_text(encoding="utf-8")).get("drawn")
    except (OSError, ValueError, AttributeError):
        return None


def num_stages(members: Iterable[MemberFolder]) -> dict[str, int]:
    """How many members computed each stage themselves, of those that say so; the rest came from the store."""
    results = [member.result for member in members if member.result is not None and "computed" in member.result]
    stages = dict.fromkeys(stage for result in results for stage in result.get("stages", ()))
    return {stage: sum(stage in result["computed"] for result in results) for stage in stages}
