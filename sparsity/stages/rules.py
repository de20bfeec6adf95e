"""A pruning rule's masks of a population: what it is applied to, what goes along, what it must leave."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.errors import ConfigError
from sparsity.graph import Units
from sparsity.nodes import Call
from sparsity.population import Population, over_members
from sparsity.tensors import Layout, Tensors, bias_of, from_view, to_view


@dataclass(frozen=True)
class Method:
    """A function and those of its numbers that may differ between members, each a tensor [members]."""

    function: Callable[..., Any]
    numbers: Tensors = field(default_factory=dict)

    def take(self, members: list[int]) -> "Method":
        """The method of some of the members."""
        return replace(self, numbers={name: number[members] for name, number in self.numbers.items()})


class Pool(NamedTuple):
    """Names of parameters that are pruned together, and their sensitivity [members]."""

    names: list[str]
    sensitivity: Tensor
    is_own: bool = False  # of a layer that was given its own


@dataclass(frozen=True)
class AppliedRule:
    """A pruning rule and what it is applied to; what may differ between members is a tensor [members]."""

    mask: Method  # (weight view, sensitivity=) → mask, or of the whole dict where `whole`
    cut: Method | None  # the same arguments → the threshold
    whole: bool
    structural: bool
    pools: list[Pool]
    excluded: frozenset[str] = frozenset()  # names that are not pruned, whatever the rule

    @property
    def names(self) -> list[str]:
        """The parameters that it is applied to."""
        return [name for pool in self.pools for name in pool.names]

    def take(self, members: list[int]) -> "AppliedRule":
        """The rule of some of the members."""
        pools = [pool._replace(sensitivity=pool.sensitivity[members]) for pool in self.pools]
        return replace(self, mask=self.mask.take(members), cut=self.cut and self.cut.take(members), pools=pools)

    def at(self, sensitivity: Tensor, *, everywhere: bool = False) -> "AppliedRule":
        """The rule with another sensitivity [members]; layers that were given their own keep it, or not everywhere."""
        pools = [
            pool if pool.is_own and not everywhere else pool._replace(sensitivity=sensitivity) for pool in self.pools
        ]
        return replace(self, pools=pools)


# --- from a config's nodes -------------------------------------------------------------------------------------------


def method_of(calls: Sequence[Call], device: torch.device) -> Method:
    """A method of all members: its floats, which may differ between them, apart from what they share."""
    numbers = calls[0].numbers
    shared = {name: number for name, number in numbers.items() if not isinstance(number, float)}
    floats = {
        name: torch.tensor([call.numbers[name] for call in calls], device=device)
        for name in numbers
        if name not in shared
    }
    return Method(partial(calls[0].function, **shared), floats)


def rule_of(rules: Sequence[nodes.Rule], sensitivities: Sequence[float], population: Population) -> AppliedRule:
    """The pruning rule of all members, its parameters in pools of one sensitivity a member; one node a member."""
    first, layouts, device = rules[0], population.layouts, population.device
    _check_layers(first, layouts)
    names = [name for name, layout in layouts.items() if layout.kind in first.apply_to]
    names = [name for name in names if not any(_is_in(name, layer) for layer in first.exclude)]
    _check_prunes(first, names)
    owners = {name: owner_of(name, first.layers) for name in names}
    pools = []
    for owner in dict.fromkeys(owners.values()):
        numbers = sensitivities if owner is None else [rule.layers[owner] for rule in rules]
        pool = [name for name in names if owners[name] == owner]
        pools.append(Pool(pool, torch.tensor(numbers, device=device), is_own=owner is not None))
    return AppliedRule(
        mask=method_of([rule.rule for rule in rules], device),
        cut=None if first.cut is None else method_of([rule.cut for rule in rules], device),
        whole=first.scope == "network",
        structural=first.structural,
        pools=pools,
        excluded=frozenset(name for name in layouts if any(_is_in(name, layer) for layer in first.exclude)),
    )


def _check_prunes(rule: nodes.Rule, names: list[str]) -> None:
    """Refuses a rule, or a layer's own sensitivity, that would prune nothing."""
    if not names:
        raise ConfigError(f"prune.apply_to={rule.apply_to} and prune.exclude={rule.exclude} leave nothing to prune")
    for layer in rule.layers:
        if not any(_is_in(name, layer) for name in names):
            raise ConfigError(f"prune.layers.{layer} does nothing: prune.apply_to={rule.apply_to} leaves it alone")


def _check_layers(rule: nodes.Rule, layouts: dict[str, Layout]) -> None:
    for key, layers in (("prune.exclude", rule.exclude), ("prune.layers", list(rule.layers))):
        for layer in layers:
            if not any(_is_in(name, layer) for name in layouts):
                known = dict.fromkeys(name.rpartition(".")[0] for name in layouts)
                raise ConfigError(f"{key} names '{layer}', which the model lacks: its layers are {', '.join(known)}")


def _is_in(name: str, layer: str) -> bool:
    """Whether a parameter is of a layer: fc1.weight of fc1.weight, of fc1, and features.0.weight of features."""
    return name == layer or name.startswith(f"{layer}.")


def owner_of(name: str, layers: Mapping[str, float]) -> str | None:
    """The longest of the layers' names that a parameter is of."""
    return max((layer for layer in layers if _is_in(name, layer)), key=len, default=None)


# --- masks -----------------------------------------------------------------------------------------------------------


def masks_of(population: Population, rule: AppliedRule, units: Units | None) -> Tensors:
    """The mask of every parameter that the rule is applied to: bool [members, *shape]; what was masked stays masked.

    A structural rule leaves the filters alone that are outputs of the network, or whose use is not known.
    """
    layouts = population.layouts
    masks: Tensors = {}
    fixed = _fixed(population, rule, units) if rule.structural and units is not None else {}
    for pool, views in _applied(rule.mask, population, rule, fixed):
        for name in pool.names:
            shape, view = tuple(population.parameters[name].shape[1:]), views[name]
            if name in fixed:  # of a rule that does not ask which filters stay, too
                view = view | (view.any(2, keepdim=True).any(4, keepdim=True) & fixed[name][None, :, :, None, None])
            masks[name] = torch.stack([from_view(each, layouts[name], shape) for each in view])
    if rule.structural:
        for name, mask in _masks_beside(population, masks, fixed, rule, units).items():
            if name not in rule.excluded:
                masks[name] = mask & masks[name] if name in masks else mask
    earlier = population.masks
    return {**earlier, **{name: mask & earlier[name] if name in earlier else mask for name, mask in masks.items()}}


def _fixed(population: Population, rule: AppliedRule, units: Units) -> Tensors:
    """The filters [groups, outputs] that a structural rule leaves alone, by weight."""
    found = {}
    for name in (name for pool in rule.pools for name in pool.names if population.layouts[name].kind == "weight"):
        shape = to_view(population.parameters[name][0], population.layouts[name]).shape[:2]
        rows = units.fixed_rows(name, shape.numel())
        if rows.any():
            found[name] = rows.view(shape).to(population.device)
    return found


GO_ALONG = ("weight", "bias", "normalization", "scale")  # kinds of parameters that may go with a filter


def _masks_beside(
    population: Population, masks: Tensors, fixed: Tensors, rule: AppliedRule, units: Units | None
) -> Tensors:
    """The masks of what goes with filters: biases, and the normalisations, scales and depthwise rows behind them."""
    rows, found = {}, {}
    for name, mask in masks.items():
        if population.layouts[name].kind != "weight":
            continue
        views = [to_view(member, population.layouts[name]) for member in mask]
        kept = torch.stack([view.any(3).any(2).flatten() for view in views])
        if name in fixed:
            kept = kept | fixed[name].flatten()
        rows[name] = ~kept
        bias = bias_of(name)
        if bias in population.parameters and bias != name:
            found[bias] = kept
    if units is None:
        return found
    free = {name for name, layout in population.layouts.items() if layout.kind in GO_ALONG} - rule.excluded
    for member in range(population.num_members):
        going = units.going({name: each[member].cpu() for name, each in rows.items()}, free)
        for (name, axis), went in going.items():
            parameter = population.parameters[name]
            if went.any():
                mask = found.setdefault(name, torch.ones_like(parameter, dtype=torch.bool))
                mask[member].movedim(axis, 0)[went.to(mask.device)] = False
    return found


def _applied(
    method: Method, population: Population, rule: AppliedRule, fixed: Mapping[str, Tensor] = MappingProxyType({})
) -> list[tuple[Pool, Any]]:
    """A function of views and sensitivity applied to each pool of parameters of every member.

    fixed: by name, filters that stay; of use to a function that asks for them, as the masks of earlier stages are.
    """
    layouts, asked = population.layouts, inspect.signature(method.function).parameters
    masks = population.masks if "mask" in asked else {}
    fixed = fixed if "fixed" in asked else {}

    def one(parameters: Tensors, masks: Tensors, sensitivity: Tensor, numbers: Tensors) -> Any:
        views = {name: to_view(parameter, layouts[name]) for name, parameter in parameters.items()}
        if rule.whole:
            return method.function(views, sensitivity=sensitivity, **numbers)
        more: dict[str, Tensors] = {name: {} for name in views}
        for name in views:
            more[name] |= {"fixed": fixed[name]} if name in fixed else {}
            more[name] |= {"mask": to_view(masks[name], layouts[name])} if name in masks else {}
        return {
            name: method.function(view, sensitivity=sensitivity, **more[name], **numbers)
            for name, view in views.items()
        }

    mapped = over_members(one, population.num_members, (0, 0, 0, 0))
    found = []
    for pool in rule.pools:
        parameters = {name: population.parameters[name] for name in pool.names}
        own = {name: masks[name] for name in pool.names if name in masks}
        found.append((pool, mapped(parameters, own, pool.sensitivity, method.numbers)))
    return found


def thresholds_of(population: Population, rule: AppliedRule) -> dict[str, list[float]]:
    """The thresholds that the rule's cut comes to, by parameter, one a member."""
    if rule.cut is None:
        return {}
    return {
        name: (cuts[name] if isinstance(cuts, dict) else cuts).tolist()
        for pool, cuts in _applied(rule.cut, population, rule)
        for name in pool.names
    }


def stds_of(population: Population) -> dict[str, list[float]]:
    """The standard deviation of every parameter (population form), of what earlier stages left of it."""

    def std(name: str, parameter: Tensor) -> list[float]:
        values = parameter.double().reshape(len(parameter), -1)
        if name not in population.masks:
            return values.std(1, correction=0).tolist()
        left = population.masks[name].reshape(len(parameter), -1)
        count = left.sum(1, keepdim=True).clamp_min(1)
        mean = (values * left).sum(1, keepdim=True) / count
        return (((values - mean).square() * left).sum(1) / count[:, 0]).sqrt().tolist()

    return {name: std(name, parameter) for name, parameter in population.parameters.items()}
