"""What a number of the configuration may be: annotations that a reader understands and `config` checks."""

from typing import Annotated, NamedTuple


class Range(NamedTuple):
    """The interval that a number lies in; an end is included unless said otherwise, None is no end."""

    low: float | None = None
    high: float | None = None
    above: bool = False  # low itself is outside
    below: bool = False  # high itself is outside

    def __contains__(self, value: object) -> bool:
        """Whether a number lies inside; NaN never does."""
        low = -float("inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return (low < value if self.above else low <= value) and (value < high if self.below else value <= high)

    def __str__(self) -> str:
        """The interval in a message, such as "> 0 and < 1"."""
        low = None if self.low is None else f"{'>' if self.above else '≥'} {self.low:g}"
        high = None if self.high is None else f"{'<' if self.below else '≤'} {self.high:g}"
        return " and ".join(end for end in (low, high) if end)


Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(0)]
PositiveCount = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
OWN_SHARE = "of a unit that leaves a share of its own, whatever the cut is"
