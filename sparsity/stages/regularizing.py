"""A regularizer's node to what is added to the loss, or follows the optimizer's step, of entries or of units."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity import regularizers
from sparsity.errors import ConfigError
from sparsity.graph import Units
from sparsity.nodes import Regularizer
from sparsity.population import Population
from sparsity.pruning import unit
from sparsity.pruning.unit import Groups
from sparsity.regularizers import scaling, times
from sparsity.stages.rules import coupling_of, is_coupled, method_of
from sparsity.step import Form, Penalty, Shrink
from sparsity.tensors import Layout, Tensors, from_view, to_view


@dataclass(frozen=True)
class Grouping:
    """How the entries of some weights are parted into groups."""

    names: list[str]
    groups: Callable[[Tensors], list[Groups]]  # of their views by name; each spreads to views by name


# penalties over units that are one expression over the weight, which is faster
IN_ONE = {
    (regularizers.hs, unit.filter_and_channel): regularizers.group_hs,
    (regularizers.l1, unit.filter_and_channel): regularizers.group_lasso,
}


def penalty_of(nodes: Sequence[Regularizer], population: Population, units: Units | None = None) -> Penalty | None:
    """The penalty of all members, one node a member; None of a regularizer without one. units: of the network."""
    first, device = nodes[0], population.device
    if first.penalty is None:
        return None
    names, method = _names(first, population), method_of([each.penalty for each in nodes], device)
    in_one = IN_ONE.get((first.penalty.function, first.unit and first.unit.function.function))
    groupings = [] if in_one else _groupings(first, names, population, units)
    function = total_penalty(in_one or method.function, population.layouts, names, groupings)
    has_form = not groupings and not first.penalty.numbers
    form = Form(in_one or first.penalty.function, names) if has_form else None
    return Penalty(function, _decay(nodes, device), method.numbers, _rise(nodes, device), form)


def shrink_of(nodes: Sequence[Regularizer], population: Population, units: Units | None = None) -> Shrink | None:
    """What all members' weights shrink by, one node a member; None of a regularizer that has none. units: as above."""
    first, device = nodes[0], population.device
    if first.shrink is None:
        return None
    names, method = _names(first, population), method_of([each.shrink for each in nodes], device)
    function = shrinkage(method.function, population.layouts, names, _groupings(first, names, population, units))
    return Shrink(function, _decay(nodes, device), method.numbers, _rise(nodes, device))


def may_be_compacted(node: Regularizer) -> bool:
    """Whether leaving out what is dead changes nothing of it: entries by themselves, or whole filters and channels."""
    own = node.unit and node.unit.function.function
    is_sized = node.penalty is not None and _asks_for_sizes(node.penalty.function)
    return own in (None, unit.entry, unit.filter_and_channel) and not is_sized


def total_penalty(
    function: Callable[..., Tensor], layouts: dict[str, Layout], names: list[str], groupings: Sequence[Grouping] = ()
) -> Callable[..., Tensor]:
    """Σ function(view) over the named parameters of one member, as a function of them and of the method's numbers.

    Where it asks for `sizes`, entries by themselves are of size 1.
    """
    grouped = {name for each in groupings for name in each.names}
    single, asks = [name for name in names if name not in grouped], _asks_for_sizes(function)

    def penalty(parameters: Tensors, **numbers: Tensor) -> Tensor:
        views = {name: to_view(parameters[name], layouts[name]) for name in names}
        sizes = {name: {"sizes": torch.ones_like(views[name])} if asks else {} for name in single}
        values = [function(views[name], **sizes[name], **numbers) for name in single]
        for grouping in groupings:
            values.append(penalty_of_groups(function, grouping, views, **numbers))
        return torch.stack(values).sum()

    return penalty


def penalty_of_groups(function: Callable[..., Tensor], grouping: Grouping, views: Tensors, **numbers: Tensor) -> Tensor:
    """Σ function(norms) of the groups of some views, over the ways that part them; and of their sizes, if it asks."""
    found = []
    for norms, sizes, _ in _scaled(grouping, views):
        flat = norms.reshape(1, -1, 1, 1)
        given = {}
        if _asks_for_sizes(function):  # made where the norms are: a GPU's capture lets nothing in from outside
            counts = sizes if isinstance(sizes, Tensor) else torch.full_like(norms, sizes)
            given["sizes"] = counts.to(norms.dtype).expand_as(norms).reshape(flat.shape)
        found.append(function(flat, **given, **numbers))
    total = torch.stack(found).sum()
    return total.clamp_max(torch.finfo(total.dtype).max)


def _asks_for_sizes(function: Callable[..., Any]) -> bool:
    return "sizes" in inspect.signature(function).parameters


def shrinkage(
    function: Callable[..., Tensor], layouts: dict[str, Layout], names: list[str], groupings: Sequence[Grouping]
) -> Callable[..., Tensors]:
    """The named parameters of one member with magnitudes function(|entry|), or norms function(‖group‖) of groups.

    Where groups are parted in several ways, one after the other. As a function of the parameters, the strength, and
    the method's numbers.
    """
    grouped = {name for each in groupings for name in each.names}

    def shrunk(parameters: Tensors, strength: Tensor, **numbers: Tensor) -> Tensors:
        views = {name: to_view(parameters[name], layouts[name]) for name in names}
        for name in names:
            if name not in grouped:
                views[name] = function(views[name].abs(), strength=strength, **numbers).copysign(views[name])
        for grouping in groupings:
            for way in range(len(_scaled(grouping, views))):
                norms, _, spread = _scaled(grouping, views)[way]
                shares = function(norms, strength=strength, **numbers) / torch.where(norms > 0, norms, 1)
                shares = spread(torch.where(norms > 0, shares, 1))
                views |= {name: views[name] * share for name, share in shares.items()}
        return {name: from_view(view, layouts[name], parameters[name].shape) for name, view in views.items()}

    return shrunk


def _scaled(grouping: Grouping, views: Tensors) -> list[Groups]:
    """The groups of some views; what is squared is near 1, whatever their scale."""
    own = {name: views[name] for name in grouping.names}
    factor = scaling(torch.stack([each.detach().abs().amax() for each in own.values()]).amax())
    groups = grouping.groups({name: times(each, factor) for name, each in own.items()})
    most = torch.finfo(factor.dtype).max
    return [each._replace(norms=times(each.norms, 1 / factor).clamp(-most, most)) for each in groups]


def _names(node: Regularizer, population: Population) -> list[str]:
    names = [name for name, layout in population.layouts.items() if layout.kind in node.apply_to]
    if not names:
        raise ConfigError(f"reg.apply_to={node.apply_to}: the model has no such parameters")
    return names


def _decay(nodes: Sequence[Regularizer], device: torch.device) -> Tensor:
    return torch.tensor([each.decay for each in nodes], device=device)


def _rise(nodes: Sequence[Regularizer], device: torch.device) -> Tensor | None:
    rises = [each.rise for each in nodes]
    return torch.tensor(rises, device=device) if any(rises) else None


def _groupings(node: Regularizer, names: Sequence[str], population: Population, units: Units | None) -> list[Grouping]:
    """How the weights among the names are parted by a regularizer's unit; what is no weight stays by itself."""
    if node.unit is None or node.unit.function.function is unit.entry:
        return []
    weights = [name for name in names if population.layouts[name].kind == "weight"]
    call = node.unit.function
    if not weights:
        raise ConfigError(f"reg.apply_to={node.apply_to} leaves {call.target.rpartition('.')[2]} no weights to part")
    if is_coupled(call.function):
        coupling = coupling_of(population, weights, units, call.function)
        given = coupling.given_to(call.function, columns=True)
        return [Grouping(list(coupling.rows), call.partial(**given))]

    def of(name: str, views: Tensors) -> list[Groups]:
        found = call.partial()(views[name])
        return [each._replace(spread=lambda number, each=each: {name: each.spread(number)}) for each in found]

    return [Grouping([name], partial(of, name)) for name in weights]
