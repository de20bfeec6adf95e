"""How much of a network may be left: a budget, and the counts that it comes to."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, NamedTuple

from sparsity.kinds import PositiveCount, Range


class Counts(NamedTuple):
    """What is left of one member."""

    nonzero: int  # weights other than 0, of the whole network
    total: int  # weights
    macs: int | None = None  # left once all that can be cut out is; None where no budget asks for them
    dense_macs: int | None = None
    bytes: int | None = None  # of the compact network's file, in float32; None where no budget asks for them
    dense_bytes: int | None = None  # of the file when nothing is pruned

    @property
    def compression(self) -> float | None:
        """Weights / non-zero weights; None where none is left."""
        return self.total / self.nonzero if self.nonzero else None

    @property
    def macs_reduction(self) -> float | None:
        """Dense MACs / MACs that are left; None where none are, or they are not known."""
        return self.dense_macs / self.macs if self.dense_macs is not None and self.macs else None


class Limits(NamedTuple):
    """A budget in counts: so much may be left at most; None: any number."""

    nonzero: int | None
    macs: int | None
    bytes: int | None = None

    def hold(self, left: Counts) -> bool:
        """Whether something is left, and not too much of it."""
        if not left.nonzero or (self.nonzero is not None and left.nonzero > self.nonzero):
            return False
        if self.macs is not None and not 0 < (left.macs or 0) <= self.macs:
            return False
        return self.bytes is None or 0 < (left.bytes or 0) <= self.bytes


RATIOS = {"compression", "macs_reduction"}  # limits of which more prunes more


@dataclass(frozen=True)
class Budget:
    """What may be left of a network; of several limits all hold."""

    compression: Annotated[float, Range(1)] | None = None  # at least so many weights for each that is not 0
    nonzero: PositiveCount | None = None  # at most so many weights other than 0, of the whole network
    macs: PositiveCount | None = None  # at most so many MACs, once all that can be cut out is
    macs_reduction: Annotated[float, Range(1)] | None = None  # dense MACs / those, at least
    bytes: PositiveCount | None = None  # at most so large a file of the compact network, in float32

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by their key."""
        values = {field.name: getattr(self, field.name) for field in fields(Budget)}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def limits_macs(self) -> bool:
        """Whether it limits MACs."""
        return self.macs is not None or self.macs_reduction is not None

    @property
    def limits_bytes(self) -> bool:
        """Whether it limits the file."""
        return self.bytes is not None

    def turned(self, *, pruning: Literal["less", "more"]) -> str:
        """How to turn the limits so that less or more is pruned, such as raise budget.nonzero=5000.

        For less all of them, for more the first.
        """
        ways = [
            f"{'raise' if (alone.given.keys() <= RATIOS) == (pruning == 'more') else 'lower'} {name}"
            for name, alone in self.alone()
        ]
        return " and ".join(ways) if pruning == "less" else ways[0]

    def limits(self, dense: Counts) -> Limits:
        """The budget in counts, for a network that has `dense.total` weights and `dense.dense_macs` MACs."""
        nonzeros = [self.nonzero, _most(dense.total, self.compression)]
        macs = [self.macs, None if dense.dense_macs is None else _most(dense.dense_macs, self.macs_reduction)]
        return Limits(
            *(min((n for n in each if n is not None), default=None) for each in (nonzeros, macs, [self.bytes]))
        )

    def alone(self) -> "Iterator[tuple[str, Budget]]":
        """Each limit as a budget of its own, with the words that name it, such as budget.nonzero=5000."""
        for key, value in self.given.items():
            others = {other: None for other in self.given if other != key}
            yield f"budget.{key}={repr(value).removesuffix('.0')}", replace(self, **others)


def _most(total: int, ratio: float | None) -> int | None:
    """The largest n with total / n ≥ ratio, as floats divide; 0 where there is none; None without a ratio."""
    if ratio is None:
        return None
    n = int(total / ratio)
    while n and total / n < ratio:
        n -= 1
    while total / (n + 1) >= ratio:
        n += 1
    return n


Way = Literal["linear", "geometric"]


@dataclass(frozen=True)
class PartOfBudget(Budget):
    """A budget met in part: so far on the way from the dense network to it."""

    share: float = 1.0
    way: Way = "geometric"

    def limits(self, dense: Counts) -> Limits:
        """The part of the budget in counts."""
        whole = Counts(dense.total, dense.total, dense.dense_macs, dense.dense_macs, dense.dense_bytes)
        return _between(whole, super().limits(dense), self.share, self.way)

    def alone(self) -> "Iterator[tuple[str, Budget]]":
        """Each limit as a budget of its own, with the words that name it."""
        for key, budget in super().alone():
            yield f"{self.share:.0%} of the way to {key}", budget


def part(budget: Budget, share: float, start: Counts, *, way: Way) -> Budget:
    """The budget that lies a share of the way from the counts at the start to the budget's own; itself at 1.

    linear: start + (limit - start) · share are left, geometric: start · (limit / start)^share, to the nearest number,
    of weights, of MACs and of bytes alike. A limit that the start keeps already stays as it is.
    """
    if share == 1:
        return budget
    limits = _between(start, budget.limits(start), share, way)
    return Budget(nonzero=limits.nonzero, macs=limits.macs, bytes=limits.bytes)


def _between(start: Counts, end: Limits, share: float, way: Way) -> Limits:
    def between(start: int | None, limit: int | None) -> int | None:
        if limit is None or start is None or limit >= start or share == 1:
            return limit
        limit = max(limit, 1)
        left = start + (limit - start) * share if way == "linear" else start * (limit / start) ** share
        return max(round(left), limit)

    return Limits(*(between(getattr(start, name), limit) for name, limit in end._asdict().items()))
