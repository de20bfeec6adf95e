"""What a person sees at the end of a sweep: the front as a table, how the members ended, how sweeps compare."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsity.results.members import Member, canonical
from sparsity.results.points import TEST, VALIDATION, Point, command, dominated_volume, front_of, points_of
from sparsity.results.sweeps import PICTURES, SUMMARY, Summary, num_stages

WIDTH = 160  # characters where the output is no terminal
NARROW = 110  # characters below which the table goes without frames


def show(summary: Summary) -> None:
    """How the members ended, the front as a table, and the lines that run it again, on stdout."""
    for line in [*count_lines(summary), *stage_lines(summary)]:
        print(line)
    if not summary.points:
        print(f"no member has finished: nothing to draw; {SUMMARY} is in {near(summary.out)}", flush=True)
        return
    _print(front_table(summary))
    for number, point in enumerate(summary.front, 1):
        print(f"{number:>3}  {point.command}")
    files = ", ".join([SUMMARY, "front.json", *PICTURES])
    print(f"{files} in {near(summary.out)}", flush=True)


def count_lines(summary: Summary) -> list[str]:
    """How many members there are and how they ended; the cause of each failure."""
    counts = {status: sum(member.status == status for member in summary.members) for status in ("done", "failed")}
    counts["unfinished"] = sum(sweep.num_unfinished for sweep in summary.sweeps)
    total = sum(counts.values())
    parts = [f"{count} {status}" for status, count in counts.items() if count or status == "done"]
    failed = [member for member in summary.members if member.status == "failed"]
    return [f"{total} member{'s' * (total != 1)}: {', '.join(parts)}", *map(_failure, failed)]


def _failure(member: Member) -> str:
    return f"failed: {near(member.folder)}: {member.error}"


def stage_lines(summary: Summary) -> list[str]:
    """How many members computed each stage themselves, where they say so."""
    counts = num_stages(summary.members)
    words = ", ".join(f"{stage} {count}" for stage, count in counts.items())
    return [f"stages computed: {words}"] if counts else []


def front_table(summary: Summary) -> Table:
    """The points that no other dominates, one a row."""
    keys = [key for key in summary.swept if key != "seed" or not _has_seeds(summary)]
    names = ", ".join(summary.objectives)
    table = _table(f"front: {len(summary.front)} of {len(summary.points)} points; {names}; accuracy on validation")
    for column in ("", *keys):
        table.add_column(column, justify="right", no_wrap=not column, overflow="fold")
    for column in ("validation", "test", "compression", "MACs", "structure", *_seeds_column(summary)):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for number, point in enumerate(summary.front, 1):
        seeds = [str(len(point.members))] if _has_seeds(summary) else []
        settings = [_short(point.value(key)) for key in keys]
        table.add_row(str(number), *settings, *_figures(point), *seeds, near(point.best.folder))
    if _has_seeds(summary):
        table.caption = "means over seeds, ± 95 % interval; structure and folder of the seed best on validation"
    return table


def _short(text: str | None) -> str:
    """A value as a table has room for it: of a number drawn at random, the first digits."""
    value = canonical(text)
    return f"{value:.4g}" if isinstance(value, float) else text or ""


def _figures(point: Point) -> list[str]:
    macs = point.estimate("macs.pruned").mean
    structure = str(point.best.result["structure"])
    return [accuracy(point, VALIDATION), accuracy(point, TEST), times(point), f"{macs:,.0f}", structure]


def _has_seeds(summary: Summary) -> bool:
    return any(len(point.members) > 1 for point in summary.points)


def _seeds_column(summary: Summary) -> list[str]:
    return ["seeds"] if _has_seeds(summary) else []


def accuracy(point: Point, key: str) -> str:
    """An accuracy in percent, with its interval where there is one."""
    mean, interval = point.estimate(key)
    if mean is None:
        return "–"
    return f"{mean:.2%}" if interval is None else f"{mean:.2%} ± {100 * interval:.2f}"


def times(point: Point) -> str:
    """The compression of the weights."""
    mean = point.estimate("compression.weights").mean
    return "∞" if mean is None else f"{mean:.1f}×"


def near(folder: Path) -> str:
    """A folder as seen from here, if it is below; else whole."""
    whole = os.path.abspath(folder)
    seen = os.path.relpath(whole)
    return whole if seen.startswith(os.pardir) else seen


def _table(title: str) -> Table:
    box = HEAVY_HEAD if _console().width >= NARROW else SIMPLE_HEAD
    return Table(title=title, title_justify="left", caption_justify="left", box=box, padding=(0, 1))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _print(table: Table) -> None:
    _console().print(table, highlight=False)


# --- comparing and choosing ------------------------------------------------------------------------------------------


def show_volumes(summary: Summary, reference: float) -> None:
    """The hypervolume of every sweep, and of all together where there are several, on stdout."""
    groups = {near(sweep.folder): points_of(sweep.members) for sweep in summary.sweeps}
    if len(groups) > 1:
        groups["all together"] = summary.points
    table = _table(f"hypervolume: {' × '.join(_axes(summary.objectives, reference))}")
    for column in ("sweep", "points", "on the front", "validation", "test"):
        table.add_column(column, justify="left" if column == "sweep" else "right")
    for name, points in groups.items():
        table.add_row(name, str(len(points)), *_volumes(points, summary.objectives, reference))
    table.caption = "test: of the points that are on the front by validation"
    _print(table)


def _volumes(points: list[Point], names: list[str], reference: float) -> list[str]:
    front = front_of(points, names)
    volumes = [dominated_volume(front, names, key, reference) for key in (VALIDATION, TEST)]
    return [str(len(front)), *(f"{volume:.4f}" for volume in volumes)]


def _axes(names: Iterable[str], reference: float) -> list[str]:
    return [
        f"(accuracy − {reference:g})" if name == "accuracy" else f"log10 reduction of {_unit(name)}" for name in names
    ]


def _unit(name: str) -> str:
    return "MACs" if name == "macs" else "weights"


def show_choice(point: Point) -> None:
    """A point that was chosen: its figures, its folder and the line that runs it again, on stdout."""
    member, several = point.best, len(point.members) > 1
    seeds = f" (means of {len(point.members)} seeds)" if several else ""
    print(
        f"chosen: validation {accuracy(point, VALIDATION)}, test {accuracy(point, TEST)}{seeds}, compression "
        f"{times(point)}, MACs {point.mean('macs.pruned'):,.0f}, structure {member.result['structure']}"
    )
    best = f", seed {member.seed}, the best on validation" if several else ""
    print(f"folder: {near(member.folder)}{best}")
    print(f"again:  {command(member) if not several else point.command}", flush=True)
