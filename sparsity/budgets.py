"""The number of a pruning rule that leaves just what a budget allows, found by bisection; nothing is trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.accounting import Report, account
from sparsity.errors import ConfigError
from sparsity.graph import Layer
from sparsity.kinds import Range
from sparsity.limits import RATIOS, Budget, Counts, Limits
from sparsity.population import Population
from sparsity.tensors import Layout, Tensors, denormals_kept, from_view, nonzero, to_view

SizeOf = Callable[[Tensors], int]  # one member's parameters and buffers → the bytes of its compact network's file
MasksOf = Callable[[Tensor], Tensors]  # the rule's number of each member [members] → masks bool [members, *shape]
LARGEST = torch.finfo(torch.float32).max


class Left:
    """Counts what masks leave of the members of a population."""

    def __init__(self, population: Population, graph: Mapping[str, Layer], size_of: SizeOf | None = None):
        """size_of: where bytes are asked for."""
        self.population, self.graph, self.size_of = population, graph, size_of
        weights = {name for name, layout in population.layouts.items() if layout.kind == "weight"}
        self.entries = {name: nonzero(population.parameters[name]) for name in population.parameters if name in weights}
        self.total = sum(entries[0].numel() for entries in self.entries.values())

    @cached_property
    def dense_macs(self) -> int:
        """The MACs of the network when nothing is pruned."""
        return self._report(0, {}).macs["dense"]

    @cached_property
    def dense_bytes(self) -> int:
        """The bytes of the file when nothing is pruned."""
        return self.bytes(0, {})

    def limits(self, budgets: Sequence[Budget]) -> list[Limits]:
        """The budgets in counts."""
        dense_macs = self.dense_macs if any(budget.limits_macs for budget in budgets) else None
        dense_bytes = self.dense_bytes if any(budget.limits_bytes for budget in budgets) else None
        return [budget.limits(Counts(0, self.total, None, dense_macs, None, dense_bytes)) for budget in budgets]

    def nonzero(self, masks: Tensors) -> Tensor:
        """The weights other than 0 of each member: int64 [members], on the CPU."""
        counts = torch.zeros(self.population.num_members, dtype=torch.int64, device=self.population.device)
        for name, entries in self.entries.items():
            counts += (entries & masks[name] if name in masks else entries).flatten(1).sum(1)
        return counts.cpu()

    def macs(self, member: int, masks: Tensors) -> int:
        """The MACs of one member that are left once all that can be cut out is."""
        return self._report(member, masks).macs["removable"]

    def bytes(self, member: int, masks: Tensors) -> int:
        """The bytes of the file of one member's compact network."""
        parameters, buffers = self._tensors(member, masks)
        return self.size_of({**parameters, **buffers})

    def counts(self, masks: Tensors, budgets: Sequence[Budget]) -> list[Counts]:
        """What is left of each member; its MACs and bytes where its budget limits them."""
        dense = self.dense_macs if any(budget.limits_macs for budget in budgets) else None
        found = []
        for member, (count, budget) in enumerate(zip(self.nonzero(masks).tolist(), budgets)):
            macs = (self.macs(member, masks), dense) if budget.limits_macs else (None, None)
            size = (self.bytes(member, masks), self.dense_bytes) if budget.limits_bytes else (None, None)
            found.append(Counts(count, self.total, *macs, *size))
        return found

    def _tensors(self, member: int, masks: Tensors) -> tuple[Tensors, Tensors]:
        parameters = {
            name: torch.where(masks[name][member], parameter[member], 0) if name in masks else parameter[member]
            for name, parameter in self.population.parameters.items()
        }
        return parameters, {name: buffer[member] for name, buffer in self.population.buffers.items()}

    def _report(self, member: int, masks: Tensors) -> Report:
        parameters, buffers = self._tensors(member, masks)
        stds = dict.fromkeys(parameters, 0.0)  # which nobody asks for
        return account(parameters, self.population.layouts, self.graph, buffers=buffers, stds=stds)


def counts(
    population: Population, graph: Mapping[str, Layer], budgets: Sequence[Budget], size_of: SizeOf | None = None
) -> list[Counts]:
    """What there is of each member as it stands, as far as its budget limits it."""
    return Left(population, graph, size_of).counts({}, budgets)


@dataclass(frozen=True)
class Reached:
    """What came of one member's budget."""

    budget: Budget
    number: float  # the rule's
    left: Counts
    is_met: bool
    is_idle: bool  # the budget holds at the lowest number already: nothing had to go for it
    other: Counts | None  # where the rule jumps over the budget, what the neighbouring float leaves: if met too much

    def record(self) -> dict[str, float | int | None]:
        """What was reached, by the names that results give it."""
        left = self.left
        return {
            "nonzero": left.nonzero,
            "compression": left.compression,
            "macs": left.macs,
            "macs_reduction": left.macs_reduction,
            "bytes": left.bytes,
        }

    def words(self) -> str | None:
        """One line on a budget that is not met, not used up or above what is there; None of one that is met exactly."""
        if not self.is_met:
            said = self._not_met()
        elif self.is_idle:
            said = [
                f"{key} is above what is there, {_said(alone, self.left)}: nothing had to go for it"
                for key, alone in self.budget.alone()
            ]
        else:
            said = self._not_used_up()
        return "; ".join(said) or None

    def _not_met(self) -> list[str]:
        if self.other is None and not self._broken(self.left):
            return [
                f"{key} is not met: {_said(alone, self.left)} is all there is" for key, alone in self.budget.alone()
            ]
        end = "" if self.other is None else ", or nothing at all"
        return [
            f"{key} is not met: the rule leaves {_said(alone, self.left)} at the least{end}"
            for key, alone in self._broken(self.left)
        ]

    def _not_used_up(self) -> list[str]:
        broken = [] if self.other is None else self._broken(self.other)
        if any(_slack(alone, self.left) == 0 for _, alone in broken):
            return []
        return [
            f"{key} is not used up: {_said(alone, self.left)} are left, {_slack(alone, self.left):,} fewer than it "
            f"allows; one step of the rule less leaves {_said(alone, self.other)}"
            for key, alone in broken
        ]

    def _broken(self, left: Counts) -> list[tuple[str, Budget]]:
        """Those limits that too much is left for."""
        return [(key, alone) for key, alone in self.budget.alone() if _slack(alone, left) < 0]


def _slack(alone: Budget, left: Counts) -> int:
    """How much less is left than one limit allows."""
    limits = alone.limits(left)
    if alone.limits_bytes:
        return limits.bytes - left.bytes
    return limits.macs - left.macs if alone.limits_macs else limits.nonzero - left.nonzero


def _said(alone: Budget, left: Counts) -> str:
    """What is left, as one limit counts it."""
    if alone.limits_bytes:
        return f"{left.bytes:,} bytes"
    if alone.limits_macs:
        count, ratio = f"{left.macs:,} MACs", left.macs_reduction
        word = None if alone.macs_reduction is None else "reduction"
    else:
        count, ratio = f"{left.nonzero:,} non-zero weights", left.compression
        word = None if alone.compression is None else "compression"
    return count if word is None or ratio is None else f"{count} ({word} {ratio:.4g})"


class Met(NamedTuple):
    """The rule's number of each member, the masks at it, and what is left."""

    numbers: Tensor  # float32 [members]
    masks: Tensors
    reached: list[Reached]


def meet(
    population: Population,
    masks_of: MasksOf,
    interval: Range,
    budgets: Sequence[Budget],
    graph: Mapping[str, Layer],
    *,
    enough: Sequence[Limits] | None = None,
    size_of: SizeOf | None = None,
) -> Met:
    """The smallest number of the rule with which each member keeps its budget, so that the most is left that does.

    masks_of: of a rule that prunes more the larger its number is; parameters that its masks do not name stay.
    interval: of the number; without an upper end, up to the largest float32. budgets: one a member. graph: `trace`'s.
    Bisection halves the float32 numbers of the interval about 31 times: at the one that is found the budget holds, at
    the next smaller one it does not. Where no number keeps it and leaves something, a member is not met, and gets the
    number that comes nearest. MACs and bytes are counted for members with a limit on them alone, above the number that
    their weights need. enough: for each member the counts that suffice: where so much is left, the search may end
    early. size_of: where bytes are limited.
    """
    with denormals_kept():
        left = Left(population, graph, size_of)
        limits = left.limits(budgets)
        low, high = _ends(interval)

        def masks_at(places: Tensor) -> Tensors:
            return masks_of(_float_at(places.clamp(low, high)).to(population.device))

        found = _first_that_hold(left, masks_at, limits, low, high, enough or [Limits(None, None)] * len(limits))
        places = found.clamp(max=high)
        masks = masks_at(places)
        here = left.counts(masks, budgets)
        before = left.counts(masks_at(found - 1), budgets)
        is_met = [limit.hold(each) for limit, each in zip(limits, here)]
        is_idle = [place == low for place in found.tolist()]
        returned = [not met and low < place <= high for met, place in zip(is_met, found.tolist())]  # from nothing left
        if any(returned):
            places = places - torch.tensor(returned).long()
            masks = masks_at(places)
        numbers = _float_at(places)
    reached = []
    for member, number in enumerate(numbers.tolist()):
        count, other = (before, here) if returned[member] else (here, before)
        jumps = returned[member] or (is_met[member] and not is_idle[member])
        neighbour = other[member] if jumps else None
        reached.append(Reached(budgets[member], number, count[member], is_met[member], is_idle[member], neighbour))
    return Met(numbers.to(population.device), masks, reached)


def _first_that_hold(
    left: Left, masks_at: MasksOf, limits: Sequence[Limits], low: int, high: int, enough: Sequence[Limits]
) -> Tensor:
    """The first place from low to high where each member's limits hold, high + 1 where none does: int64 [members]."""
    lowest, beyond = torch.full((len(limits),), low), torch.full((len(limits),), high + 1)
    most = torch.tensor([[left.total if n is None else n for n in limit] for limit in limits]).T  # of each kind
    floors = torch.tensor([[-1 if n is None else n for n in each] for each in enough]).T
    spare = torch.where(floors < 0, -1, most - floors)
    limited = torch.tensor([[n is not None for n in limit] for limit in limits]).T

    def weights(places: Tensor, _: Tensor) -> Tensor:
        return most[0] - left.nonzero(masks_at(places))

    def counted(count: Callable[[int, Tensors], int], most: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def unused(places: Tensor, asked: Tensor) -> Tensor:
            masks = masks_at(places)
            return most - torch.tensor([count(member, masks) if ask else 0 for member, ask in enumerate(asked)])

        return unused

    found = lowest
    for kind, unused in enumerate((weights, counted(left.macs, most[1]), counted(left.bytes, most[2]))):
        found = _bisect(unused, found - 1, torch.where(limited[kind], beyond, found), spare[kind])
    return found


def _bisect(unused: Callable[[Tensor, Tensor], Tensor], below: Tensor, above: Tensor, enough: Tensor) -> Tensor:
    """The first place after `below` where nothing is lacking, which is taken to be so at `above`, of each member.

    unused: places [members] and whether each is still of interest → what is left of the limit there, negative where it
    does not hold: int64 [members]. enough: of that, so much at most ends the search early; negative: it never ends so.
    """
    while (apart := above - below > 1).any():
        middle = (below + above) // 2
        spare = unused(middle, apart)
        holds = apart & (spare >= 0)
        above = torch.where(holds, middle, above)
        below = torch.where(holds & (spare <= enough), middle - 1, torch.where(apart & ~holds, middle, below))
    return above


def _ends(interval: Range) -> tuple[int, int]:
    """The places of the smallest and the largest finite float32 in an interval."""
    ends = [-LARGEST if interval.low is None else interval.low, LARGEST if interval.high is None else interval.high]
    bounded = torch.tensor(ends).clamp(-LARGEST, LARGEST)
    low, high = _place_of(bounded).tolist()
    return low + (float(bounded[0]) not in interval), high - (float(bounded[1]) not in interval)


def _place_of(numbers: Tensor) -> Tensor:
    """The place of a float32 among all in rising order, 0 at 0: int64."""
    sizes = numbers.abs().view(torch.int32).long()
    return torch.where(numbers < 0, -sizes, sizes)


def _float_at(places: Tensor) -> Tensor:
    """The inverse of `_place_of`."""
    sizes = places.abs().int().view(torch.float32)
    return torch.where(places < 0, -sizes, sizes)


def least_left(
    population: Population,
    masks_of: MasksOf,
    interval: Range,
    budgets: Sequence[Budget],
    graph: Mapping[str, Layer],
    size_of: SizeOf | None = None,
) -> list[Counts]:
    """What is left of each member when all goes that the rule may prune, whatever the weights are.

    MACs and bytes as the budgets limit them: of a chain of layers those of one channel from end to end through the
    layers that are pruned: with fewer the outputs do not depend on the images.
    """
    top = torch.inf if interval.high is None else interval.high  # ∞ takes a tensor whose entries are equal, too
    with denormals_kept():
        masks = masks_of(torch.full((population.num_members,), top, device=population.device))
        left = Left(population, graph, size_of)
        found = left.counts(masks, budgets)
        kept = [entries for name, entries in left.entries.items() if name not in masks]
        is_counted = any(budget.limits_macs or budget.limits_bytes for budget in budgets)
        if not is_counted or not _is_chain(population, graph) or not all(bool(entries.all()) for entries in kept):
            return found
        ones = {name: torch.ones_like(population.parameters[name]) for name in masks}
        thin = Left(replace(population, parameters=population.parameters | ones), graph, size_of)
        paths = {name: _with_one_path(mask, population.layouts[name]) for name, mask in masks.items()}
        return [_more_of(*pair) for pair in zip(found, thin.counts(paths, budgets))]


def _more_of(one: Counts, other: Counts) -> Counts:
    """The counts of one, with the larger MACs and bytes of two."""
    pairs = {"macs": (one.macs, other.macs), "bytes": (one.bytes, other.bytes)}
    return one._replace(**{name: max(pair) for name, pair in pairs.items() if None not in pair})


def _is_chain(population: Population, graph: Mapping[str, Layer]) -> bool:
    """Whether each layer reads all channels of the one before it, and nothing else."""
    names = list(graph)
    in_order = all(graph[name].source == before for name, before in zip(names[1:], names))
    return in_order and all(population.layouts[name].groups == 1 for name in names)


def _with_one_path(mask: Tensor, layout: Layout) -> Tensor:
    """The mask of a weight, with the connection of its first input and its first output kept; others' as they are."""
    if layout.kind != "weight":
        return mask
    views = torch.stack([to_view(member, layout) for member in mask])
    views[:, :, 0, 0] = True
    return torch.stack([from_view(view, layout, tuple(mask.shape[1:])) for view in views])


def check_reachable(
    population: Population,
    masks_of: MasksOf,
    interval: Range,
    budgets: Sequence[Budget],
    graph: Mapping[str, Layer],
    size_of: SizeOf | None = None,
) -> None:
    """Refuses a budget that what the rule leaves alone exceeds, before anything trains.

    masks_of: as `meet` takes it, but with the number for all that the rule prunes, layers with a sensitivity of their
    own too: how much that keeps of weights that are not trained yet is not known.
    """
    for budget, least in zip(budgets, least_left(population, masks_of, interval, budgets, graph, size_of)):
        for key, alone in budget.alone():
            remedy = "lower it" if alone.given.keys() <= RATIOS else "raise it"
            if 0 in alone.limits(least):
                raise ConfigError(f"{key} leaves nothing at all of the network: {remedy}")
            if _slack(alone, least) < 0:
                less = ", or exclude less by prune.exclude" if least.nonzero else ""
                raise ConfigError(
                    f"{key} cannot be met: {_said(alone, least)} are left at the least, when all goes that may: "
                    f"{remedy}{less}"
                )
