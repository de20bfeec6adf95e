"""The stages: pretrain → regularize → prune → finetune. Each maps a population to a population."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.compaction import compact, whole
from sparsity.data import Splits
from sparsity.errors import ConfigError
from sparsity.graph import Facts, Units
from sparsity.population import Population, over_members
from sparsity.step import Penalty
from sparsity.tensors import Layout, Tensors, bias_of, denormals_kept, from_view, nonzero, to_view
from sparsity.training import Loop, Trained, Watcher, train


@dataclass(frozen=True)
class Method:
    """A function and those of its numbers that may differ between members, each a tensor [members]."""

    function: Callable[..., Any]
    numbers: Tensors = field(default_factory=dict)

    def take(self, members: list[int]) -> "Method":
        """The method of some of the members."""
        return replace(self, numbers={name: number[members] for name, number in self.numbers.items()})


@dataclass(frozen=True)
class Rule:
    """A pruning rule and what it is applied to; what may differ between members is a tensor [members]."""

    mask: Method  # (weight view, sensitivity=) → mask, or of the whole dict where `whole`
    cut: Method | None  # the same arguments → the threshold
    whole: bool
    structural: bool
    pools: list[tuple[list[str], Tensor]]  # names of parameters that are pruned together, and their sensitivity
    excluded: frozenset[str] = frozenset()  # names that are not pruned, whatever the rule

    def take(self, members: list[int]) -> "Rule":
        """The rule of some of the members."""
        pools = [(names, sensitivity[members]) for names, sensitivity in self.pools]
        return replace(self, mask=self.mask.take(members), cut=self.cut and self.cut.take(members), pools=pools)


@dataclass(frozen=True)
class Ingredients:
    """What the stages of one population are made of."""

    splits: Splits
    loops: dict[str, Loop]
    penalty: Penalty | None
    rule: Rule
    seeds: list[int]
    watcher: Callable[[str], Watcher]
    units: Units | None = None  # of the network; None where they are not known
    image_bytes: int = 0  # what evaluating one image of one member takes; 0: no bound

    def take(self, members: list[int]) -> "Ingredients":
        """The ingredients of some of the members."""
        rule, penalty = self.rule.take(members), self.penalty
        if penalty is not None:
            numbers = {name: number[members] for name, number in penalty.numbers.items()}
            penalty = replace(penalty, decay=penalty.decay[members], numbers=numbers)
        seeds = [self.seeds[member] for member in members]
        return replace(self, penalty=penalty, rule=rule, seeds=seeds)


class Pruned(NamedTuple):
    """What pruning gives back: the population, and by parameter what the rule saw, one entry a member."""

    population: Population
    stds: dict[str, list[float]]
    thresholds: dict[str, list[float]]


def pretrain(population: Population, parts: Ingredients) -> Trained:
    """Dense training."""
    return _train("pretrain", population, parts)


def regularize(population: Population, parts: Ingredients) -> Trained:
    """Training with decay · penalty added to the loss; nothing is pruned yet."""
    return _train("regularize", population, parts, penalty=parts.penalty)


def prune(population: Population, parts: Ingredients) -> Pruned:
    """The rule's masks, and zeros where they are 0."""
    with denormals_kept():
        return _pruned(population, parts.rule, parts.units)


def _pruned(population: Population, rule: Rule, units: Units | None) -> Pruned:
    masks = _masks(population, rule, units)
    parameters = {
        name: torch.where(masks[name], parameter, 0) if name in masks else parameter
        for name, parameter in population.parameters.items()
    }
    return Pruned(
        replace(population, parameters=parameters, masks=masks),
        {name: _stds(parameter) for name, parameter in population.parameters.items()},
        _thresholds(population, rule),
    )


def finetune(population: Population, parts: Ingredients) -> Trained:
    """Training in which every zero weight and bias stays zero; the epoch is selected on validation.

    What this makes dead takes no part in it, unless the optimizer makes entries depend on each other.
    """
    held = _holding_zeros(population, parts.units)
    small = (compact if parts.loops["finetune"].elementwise else whole)(held, parts.splits)
    trained = _train("finetune", small.population, replace(parts, splits=small.splits), select=True)
    return replace(trained, last=small.restore(trained.last), selected=small.restore(trained.selected))


def _holding_zeros(population: Population, units: Units | None = None) -> Population:
    """The population with masks that hold every zero of weights and biases, and what the rule masked of others.

    Scale and shift of a normalisation are held where both are 0 and what they get is, such as behind a filter that an
    earlier run removed.
    """
    masks = dict(population.masks)
    for name, parameter in population.parameters.items():
        if population.layouts[name].kind in ("weight", "bias") and not (mask := nonzero(parameter)).all():
            masks[name] = mask
    norms = [name for name, layout in population.layouts.items() if layout.kind == "normalization"]
    if units is not None and any(not nonzero(population.parameters[name]).all() for name in norms):
        for member in range(population.num_members):
            tensors = {**population.parameters, **population.buffers}
            facts = Facts({name: tensor[member].detach() for name, tensor in tensors.items()})
            for name, silent in units.silent_norms(facts).items():
                if name in norms:
                    mask = masks[name].clone() if name in masks else torch.ones_like(population.parameters[name]).bool()
                    mask[member] &= ~silent.to(mask.device)
                    masks[name] = mask
    return replace(population, masks=masks)


def _train(stage: str, population: Population, parts: Ingredients, **more: Any) -> Trained:
    generators = [torch.Generator().manual_seed(derived_seed(seed, stage)) for seed in parts.seeds]
    watcher = parts.watcher(stage)
    try:
        return train(population, parts.splits, parts.loops[stage], generators, watcher=watcher, **more)
    finally:
        watcher.close()


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose of a member, unlike those of its other purposes and of other seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def total_penalty(function: Callable[..., Tensor], layouts: dict[str, Layout], names: list[str]) -> Callable[..., Any]:
    """Σ function(view) over the named parameters of one member, as a function of them and of the method's numbers."""

    def penalty(parameters: Tensors, **numbers: Tensor) -> Tensor:
        values = [function(to_view(parameters[name], layouts[name]), **numbers) for name in names]
        return torch.stack(values).sum()

    return penalty


def _masks(population: Population, rule: Rule, units: Units | None) -> Tensors:
    """The mask of every parameter that the rule is applied to: bool [members, *shape].

    A structural rule leaves the filters alone that are outputs of the network, or whose use is not known.
    """
    layouts = population.layouts
    masks: Tensors = {}
    fixed = _fixed(population, rule, units) if rule.structural and units is not None else {}
    for pool, views in _applied(rule.mask, population, rule, fixed):
        for name in pool:
            shape, view = tuple(population.parameters[name].shape[1:]), views[name]
            if name in fixed:  # of a rule that does not ask which filters stay, too
                view = view | (view.any(2, keepdim=True).any(4, keepdim=True) & fixed[name][None, :, :, None, None])
            masks[name] = torch.stack([from_view(each, layouts[name], shape) for each in view])
    if rule.structural:
        for name, mask in _masks_beside(population, masks, fixed, rule, units).items():
            if name not in rule.excluded:
                masks[name] = mask & masks[name] if name in masks else mask
    return masks


def _fixed(population: Population, rule: Rule, units: Units) -> Tensors:
    """The filters [groups, outputs] that a structural rule leaves alone, by weight."""
    found = {}
    for name in (name for pool, _ in rule.pools for name in pool if population.layouts[name].kind == "weight"):
        shape = to_view(population.parameters[name][0], population.layouts[name]).shape[:2]
        rows = units.fixed_rows(name, shape.numel())
        if rows.any():
            found[name] = rows.view(shape).to(population.device)
    return found


GO_ALONG = ("weight", "bias", "normalization", "scale")  # kinds of parameters that may go with a filter


def _masks_beside(population: Population, masks: Tensors, fixed: Tensors, rule: Rule, units: Units | None) -> Tensors:
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
    method: Method, population: Population, rule: Rule, fixed: Mapping[str, Tensor] = MappingProxyType({})
) -> list[tuple[list[str], Any]]:
    """A function of views and sensitivity applied to each pool of parameters of every member.

    fixed: by name, filters that stay; of use to a function that asks for them.
    """
    layouts, asks = population.layouts, "fixed" in inspect.signature(method.function).parameters

    def one(parameters: Tensors, sensitivity: Tensor, numbers: Tensors) -> Any:
        views = {name: to_view(parameter, layouts[name]) for name, parameter in parameters.items()}
        if rule.whole:
            return method.function(views, sensitivity=sensitivity, **numbers)
        more = {name: {"fixed": fixed[name]} if asks and name in fixed else {} for name in views}
        return {
            name: method.function(view, sensitivity=sensitivity, **more[name], **numbers)
            for name, view in views.items()
        }

    mapped = over_members(one, population.num_members, (0, 0, 0))
    return [
        (pool, mapped({name: population.parameters[name] for name in pool}, sensitivity, method.numbers))
        for pool, sensitivity in rule.pools
    ]


def _thresholds(population: Population, rule: Rule) -> dict[str, list[float]]:
    if rule.cut is None:
        return {}
    return {
        name: (cuts[name] if isinstance(cuts, dict) else cuts).tolist()
        for pool, cuts in _applied(rule.cut, population, rule)
        for name in pool
    }


def _stds(parameter: Tensor) -> list[float]:
    return parameter.double().reshape(len(parameter), -1).std(1, correction=0).tolist()


def rehearse(population: Population, parts: Ingredients) -> None:
    """Raises what the penalty or the rule would raise on the population, before anything trains; changes nothing."""
    if parts.penalty is not None:
        one = {name: parameter[0].detach() for name, parameter in population.parameters.items()}
        value = parts.penalty.function(one, **{name: number[0] for name, number in parts.penalty.numbers.items()})
        if value.shape != ():
            raise ConfigError(f"reg.penalty must give a scalar, got one of shape {list(value.shape)}")
    masks = _masks(population, parts.rule, parts.units)
    _thresholds(population, parts.rule)
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise ConfigError(f"prune.rule must give a boolean mask, got {mask.dtype} for {name}")
