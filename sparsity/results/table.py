"""What a person sees at the end of a sweep: the front as a table, how the members ended, how sweeps compare."""

from collections.abc import Collection, Iterable
from pathlib import Path

from sparsity.front import SIZES
from sparsity.results import beyond, macs_left, near
from sparsity.results.members import MemberFolder, canonical
from sparsity.results.points import FEWEST, TEST, VALIDATION, Point, command, dominated_volume, front_of, points_of
from sparsity.results.summaries import Summary
from sparsity.results.sweeps import PICTURES, SUMMARY, num_stages
from sparsity.streams import say
from sparsity.tables import Column, say_parts, show_table

SEEDS = "means over seeds, ± 95 % interval; of two, both accuracies; structure and folder of the best on validation"
MOST_FAILURES = 10  # that are told one by one


def show(summary: Summary, before: Collection[Path] = ()) -> None:
    """How the members ended, the front as a table, and the lines that run it again, on stdout.

    before: the folders of members that an earlier start of the sweep has finished.
    """
    for line in [*count_lines(summary), *stage_lines(summary, before)]:
        say(line)
    if not summary.points:
        say(f"no member has finished: nothing to draw; {SUMMARY} is in {near(summary.out)}")
        return
    show_front(summary)
    for number, point in enumerate(summary.front, 1):
        say(f"{number:>3}  {point.command}")
    files = ", ".join([SUMMARY, "front.json", *PICTURES])
    say_parts([f"{files} in {near(summary.out)}"])


def count_lines(summary: Summary) -> list[str]:
    """How many members there are and how they ended; the cause of each failure, of very many the first ones."""
    counts = {status: sum(member.status == status for member in summary.members) for status in ("done", "failed")}
    counts["unfinished"] = sum(sweep.num_unfinished for sweep in summary.sweeps)
    total = sum(counts.values())
    parts = [f"{count} {status}" for status, count in counts.items() if count or status == "done"]
    failed = [member for member in summary.members if member.status == "failed"]
    more = [f"{len(failed) - MOST_FAILURES} more failed: {SUMMARY} says why"] if len(failed) > MOST_FAILURES else []
    return [
        f"{total} member{'s' * (total != 1)}: {', '.join(parts)}",
        *map(_failure, failed[:MOST_FAILURES]),
        *more,
    ]


def _failure(member: MemberFolder) -> str:
    return f"failed: {near(member.folder)}: {member.error}"


def stage_lines(summary: Summary, before: Collection[Path] = ()) -> list[str]:
    """How many members computed each stage themselves, where they say so; of a start of a sweep, its own alone."""
    own = [member for member in summary.members if member.folder not in before]
    counts = num_stages(own)
    words = ", ".join(f"{stage} {count}" for stage, count in counts.items())
    earlier = f"{len(summary.members) - len(own)} finished before this start"
    computed = [f"stages computed: {words}"] if counts else ["stages computed: none"] if before else []
    return [f"{line}; {earlier}" if before else line for line in computed]


def show_front(summary: Summary) -> None:
    """The points that no other dominates, one a row; what has no room is in `front.json`."""
    front, has_seeds = summary.front, _has_seeds(summary)
    keys = [key for key in summary.swept if key != "seed" or not has_seeds]
    columns = [
        Column("", [str(number) for number in range(1, len(front) + 1)]),
        *(Column(key, [_short(point.value(key)) for point in front], rank=1, cut="end", least=12) for key in keys),
        Column("validation", [accuracy(point, VALIDATION) for point in front]),
        Column("test", [accuracy(point, TEST) for point in front]),
        Column("compression", [times(point) for point in front]),
        Column("MACs", [_count(point, "macs.pruned") for point in front], rank=3),
        Column("structure", [str(point.best.result["structure"]) for point in front], rank=5, cut="end", least=12),
        Column("folder", [near(point.best.folder) for point in front], True, rank=2, cut="start", least=10),
    ]
    if any("removable" in point.best.result["macs"] for point in front):
        columns.insert(-2, Column("MACs removable", [_count(point, "macs.removable") for point in front], rank=4))
    if any(beyond(point.best.result) for point in front):
        named = [", ".join(beyond(point.best.result)) or "plain" for point in front]
        columns.insert(-1, Column("training", named, rank=5, cut="end", least=12))
    if has_seeds:
        columns.insert(-1, Column("seeds", [str(len(point.members)) for point in front], rank=6))
    show_table(
        columns,
        title=f"front: {len(front)} of {len(summary.points)} points; {', '.join(summary.objectives)}; "
        "accuracy on validation",
        caption=SEEDS if has_seeds else "",
    )


def _short(text: str | None) -> str:
    """A value as a table has room for it: of a number drawn at random, the first digits."""
    value = canonical(text)
    return f"{value:.4g}" if isinstance(value, float) else text or ""


def _count(point: Point, key: str) -> str:
    mean = point.estimate(key).mean
    return "–" if mean is None else f"{mean:,.0f}"


def _has_seeds(summary: Summary) -> bool:
    return any(len(point.members) > 1 for point in summary.points)


def accuracy(point: Point, key: str) -> str:
    """An accuracy in percent, with its interval where there is one; of two seeds both."""
    mean, interval = point.estimate(key)
    if mean is None:
        return "–"
    if interval is None:
        return f"{', '.join(f'{100 * number:.2f}' for number in sorted(point.numbers(key)))}%"
    return f"{mean:.2%} ± {100 * interval:.2f}"


def times(point: Point) -> str:
    """The compression of the weights."""
    mean = point.estimate("compression.weights").mean
    return "∞" if mean is None else f"{mean:.1f}×"


# --- comparing and choosing ------------------------------------------------------------------------------------------


def show_volumes(summary: Summary, reference: float) -> None:
    """The hypervolume of every sweep, and of all together where there are several, on stdout."""
    groups = {near(sweep.folder): points_of(sweep.members) for sweep in summary.sweeps}
    if len(groups) > 1:
        groups["all together"] = summary.points
    figures = [[str(len(points)), *_volumes(points, summary.objectives, reference)] for points in groups.values()]
    names = ("points", "on the front", "validation", "test")
    show_table(
        [
            Column("sweep", list(groups), True, cut="start", least=10),
            *(Column(name, cells) for name, cells in zip(names, map(list, zip(*figures)))),
        ],
        title=f"hypervolume: {' × '.join(_axes(summary.objectives, reference))}",
        caption="test: of the points that are on the front by validation",
    )


def _volumes(points: list[Point], names: list[str], reference: float) -> list[str]:
    front = front_of(points, names)
    volumes = [dominated_volume(front, names, key, reference) for key in (VALIDATION, TEST)]
    return [str(len(front)), *(f"{volume:.4f}" for volume in volumes)]


def _axes(names: Iterable[str], reference: float) -> list[str]:
    return [
        f"log10 reduction of {SIZES[name].unit}" if name in SIZES else f"({name} − {reference:g})" for name in names
    ]


def show_choice(point: Point) -> None:
    """A point that was chosen: its figures, its folder and the line that runs it again, on stdout."""
    member, several = point.best, len(point.members) > 1
    macs = {name: round(point.mean(f"macs.{name}")) for name in member.result["macs"]}
    counted = f"{'means of ' if len(point.members) >= FEWEST else ''}{len(point.members)} seeds"
    seeds = f" ({counted})" if several else ""
    say_parts(
        [
            f"chosen: validation {accuracy(point, VALIDATION)}, test {accuracy(point, TEST)}{seeds}, compression "
            f"{times(point)}, {macs_left(macs)}, structure {member.result['structure']}"
        ]
    )
    best = f", seed {member.seed}, the best on validation" if several else ""
    say(f"folder: {near(member.folder)}{best}")
    say(f"again:  {command(member) if not several else point.command}")
