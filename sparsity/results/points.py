"""Points of a sweep: members that differ in nothing but the seed, with their means; the front, and a choice on it."""

import functools
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES, SIZES, Size, hypervolume, non_dominated
from sparsity.results import objectives
from sparsity.results.members import MemberFolder, canonical, has_effect

CONFIDENCE = 0.95
FEWEST = 3  # seeds that have an interval: by Student's t, that of two is 13 standard errors long
VALIDATION, TEST = "accuracy.final.validation", "accuracy.final.test"
DENSE = "accuracy.dense.test"


class Estimate(NamedTuple):
    """A mean over seeds and the half-width of its interval; None where there is nothing to say."""

    mean: float | None
    interval: float | None


def estimate(numbers: Sequence[float | None]) -> Estimate:
    """The mean of numbers, and its 95 % interval by Student's t, which two numbers say nothing about.

    No mean where a number is missing.
    """
    if not numbers or any(number is None or not math.isfinite(number) for number in numbers):
        return Estimate(None, None)
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < FEWEST:
        return Estimate(mean, None)
    from scipy.special import stdtrit

    variance = math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    quantile = float(stdtrit(len(numbers) - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, quantile * math.sqrt(variance / len(numbers)))


@dataclass(frozen=True)
class Point:
    """Finished members that differ in nothing but the seed."""

    members: tuple[MemberFolder, ...]  # one a seed

    def estimate(self, key: str) -> Estimate:
        """The mean of a number of the results under its dotted key."""
        return estimate(self.numbers(key))

    def numbers(self, key: str) -> list[float | None]:
        """A number of the results under its dotted key, one a seed."""
        return [member.number(key) for member in self.members]

    def mean(self, key: str) -> float:
        """The mean of a number; NaN where it was not measured."""
        mean = self.estimate(key).mean
        return math.nan if mean is None else mean

    def value(self, key: str) -> str | None:
        """The value of a setting; of several seeds all."""
        if key == "seed":
            return ",".join(str(member.seed) for member in self.members)
        return self.members[0].value(key)

    def objectives(self, names: Sequence[str]) -> tuple[float, ...]:
        """The means of the numbers that a search looks at; accuracy is validation accuracy."""
        each = zip(*(objectives(member.result, names) for member in self.members))
        return tuple(math.nan if (mean := estimate(numbers).mean) is None else mean for numbers in each)

    @functools.cached_property
    def best(self) -> MemberFolder:
        """The member with the best validation accuracy; the earliest of equals."""
        return max(self.members, key=lambda member: member.number(VALIDATION) or 0.0)

    @property
    def overrides(self) -> list[str]:
        """What the members have in common on the command line."""
        several = len(self.members) > 1
        return [entry for entry in self.members[0].overrides if not (several and _is_seed(entry))]

    @property
    def command(self) -> str:
        """The line that runs it again; of several seeds all of them, and nothing else."""
        first = self.members[0]
        needs_sweeper = any(flag.startswith("hydra/sweeper=") for flag in first.flags)
        if len(self.members) == 1 or needs_sweeper:  # with -m, a sweeper of its own would search
            return " && ".join(map(command, self.members))
        key = next((entry.partition("=")[0] for entry in first.overrides if _is_seed(entry)), "seed")
        return _command(["-m", *first.flags, *self.overrides, f"{key}={self.value('seed')}"])


def command(member: MemberFolder) -> str:
    """The line that runs one member again."""
    return _command([*member.flags, *member.overrides])


def _command(arguments: Iterable[str]) -> str:
    return " ".join(["python main.py", *map(shlex.quote, arguments)])


def _is_seed(override: str) -> bool:
    return override.lstrip("+").startswith("seed=")


def points_of(members: Iterable[MemberFolder]) -> list[Point]:
    """The finished members, those apart in the seed alone put together; a run that was repeated counts once."""
    done = [member for member in members if member.result is not None]
    keys = sorted({key for member in done for key in member.settings if has_effect(key)} - {"seed"})
    groups: dict[Any, dict[str | None, MemberFolder]] = {}
    for member in done:
        unknown = None if member.overrides or "overrides" in member.result else member.folder
        place = (unknown, *(canonical(member.value(key)) for key in keys))
        groups.setdefault(place, {}).setdefault(member.seed, member)
    return [Point(tuple(seeds.values())) for seeds in groups.values()]


def front_of(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """The points that no other dominates, in the order of the second objective."""
    values = [point.objectives(names) for point in points]
    kept = non_dominated(values, directions(names))
    found = [(value, index) for index, value in enumerate(values) if kept[index]]
    return [points[index] for _, index in sorted(found, key=lambda entry: (*entry[0][1:], *entry))]


def directions(names: Iterable[str]) -> list[str]:
    """Which way each objective is better."""
    return [OBJECTIVES[name].direction for name in names]


def size_objective(names: Iterable[str]) -> str:
    """The objective that says how small a network is."""
    return next((name for name in names if name in SIZES), "compression")


# --- choosing --------------------------------------------------------------------------------------------------------


def smallest(points: Sequence[Point], accuracy: float, names: Sequence[str]) -> Point:
    """The smallest network whose validation accuracy, the mean over seeds, is at least the one asked for."""
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"--at-least-accuracy must be a share in [0, 1], got {accuracy:g}: 98.4 % is 0.984")
    measured = [point for point in points if point.estimate(VALIDATION).mean is not None]
    if not measured:
        raise ConfigError("no member has a validation accuracy to choose by: was it run with data.validation=0?")
    size = size_objective(names)
    key, direction, _ = OBJECTIVES[size]
    sign = -1 if direction == "maximize" else 1
    fitting = [point for point in measured if point.mean(VALIDATION) >= accuracy and point.mean(key) > 0]
    if not fitting:
        best = max(point.mean(VALIDATION) for point in measured)
        raise ConfigError(f"no member reaches --at-least-accuracy {accuracy:g} on validation: the best has {best:.4f}")
    return min(fitting, key=lambda point: (sign * point.mean(key), -point.mean(VALIDATION)))


# --- comparing -------------------------------------------------------------------------------------------------------


def dominated_volume(front: Sequence[Point], names: Sequence[str], accuracy: str, reference: float) -> float:
    """The hypervolume of points: accuracy above a reference × log10 of the reduction against the dense network.

    accuracy: the key of the accuracy that is taken.
    """
    values = [
        [point.mean(accuracy) if name == "accuracy" else _reduction(point, SIZES[name]) for name in names]
        for point in front
    ]
    start = [reference if name == "accuracy" else 0.0 for name in names]
    return hypervolume(values, start, ["maximize"] * len(names))


def _reduction(point: Point, size: Size) -> float:
    """log10 of how many times smaller a network is than the dense one."""
    return math.log10(max(point.mean(size.dense), 1.0) / max(point.mean(size.left), 1.0))


# --- words -----------------------------------------------------------------------------------------------------------


def describe(point: Point, names: Sequence[str], base: Path) -> dict[str, Any]:
    """A point under the keys of `front.json`; folders as seen from `base`."""

    def interval(key: str) -> dict[str, Any]:
        found = point.estimate(key)
        return {"mean": found.mean, "interval": found.interval, "seeds": point.numbers(key)}

    return {
        "overrides": point.overrides,
        "seeds": [member.result.get("seed") for member in point.members],
        "folders": [relative(member.folder, base) for member in point.members],
        "best_folder": relative(point.best.folder, base),
        "objectives": dict(zip(names, point.objectives(names))),
        "accuracy": {"validation": interval(VALIDATION), "test": interval(TEST)},
        **{name: _means(point, name) for name in ("compression", "macs", "nonzero")},
        "structure": [member.result.get("structure") for member in point.members],
        "training": point.best.result.get("training") or {},
        "command": point.command,
    }


def _means(point: Point, name: str) -> dict[str, float | None]:
    return {key: point.estimate(f"{name}.{key}").mean for key in point.members[0].result[name]}


def relative(folder: Path, base: Path) -> str:
    """A folder as seen from another."""
    return Path(os.path.relpath(folder, base)).as_posix()
