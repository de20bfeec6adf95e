"""Figures, printed and written as they come, so that what is cut short keeps what it has."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WIDTH = 66  # characters of a figure's name


@dataclass(frozen=True)
class Target:
    """What a figure should reach."""

    bound: float
    at_least: bool = False  # or at most

    def is_reached(self, value: float) -> bool:
        """Whether a value is on the right side of the bound, or on it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    part: str
    name: str
    value: float
    unit: str
    ratio: float | None = None  # times faster than what the name or its part says
    target: Target | None = None  # of the ratio where there is one, else of the value
    floor: float | None = None  # the least that the machine could do, in the same unit
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.target.is_reached(self.value if self.ratio is None else self.ratio)

    @property
    def times_floor(self) -> float | None:
        """How far from the floor the value is, 1 being there."""
        return None if self.floor is None else self.value / self.floor

    def line(self) -> str:
        """The row of the table."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}×"
        target = "" if self.target is None else f"{self.target} {'reached' if self.is_reached else 'NOT reached'}"
        floor = "" if self.times_floor is None else f"{self.times_floor:.1f}× floor"
        row = f"{self.name:<{WIDTH}}{shown(self.value):>10} {self.unit:<20}{ratio:>8}  {target:<20}{floor:>13}"
        return row.rstrip()

    def record(self) -> dict[str, Any]:
        """What the JSON holds of it."""
        target = None if self.target is None else str(self.target)
        return {**asdict(self), "target": target, "reached": self.is_reached, "times_floor": self.times_floor}


def shown(value: float) -> str:
    """A number with three or four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


class Report:
    """The figures so far: a table on standard output, and a JSON file."""

    def __init__(self, path: Path, machine: dict[str, Any]):
        self.path, self.machine = path, machine
        self.figures: list[Figure] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def heading(self, text: str) -> None:
        """Says what comes."""
        print(f"\n{text}", flush=True)

    def add(self, figure: Figure) -> None:
        """Prints a figure, and writes all of them."""
        self.figures.append(figure)
        print(figure.line(), flush=True)
        written = {"machine": self.machine, "figures": [each.record() for each in self.figures]}
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)

    def summary(self) -> str:
        """How many targets are reached, and which are not."""
        judged = [figure for figure in self.figures if figure.target is not None]
        missed = [f"  {figure.part}: {figure.line()}" for figure in judged if not figure.is_reached]
        return "\n".join([f"{len(judged) - len(missed)} of {len(judged)} targets reached", *missed])
