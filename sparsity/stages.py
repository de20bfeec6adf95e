"""The stages: pretrain → regularize → prune → finetune. Each maps a population to a population."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.compaction import compact, whole
from sparsity.data import Splits
from sparsity.errors import ConfigError
from sparsity.graph import Units
from sparsity.population import Population, over_members
from sparsity.step import Penalty
from sparsity.tensors import Layout, Tensors, bias_of, from_view, nonzero, to_view
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
    units: Units | None = None  # of the network, where the rule is structural: what goes with a filter

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
    with _denormals_kept():
        return _pruned(population, parts.rule)


@contextlib.contextmanager
def _denormals_kept() -> Iterator[None]:
    """Comparisons that tell denormals from zeros: not flushed, which is each thread's own setting, in one thread."""
    threads = torch.get_num_threads()
    smallest = torch.ones((), dtype=torch.int32).view(torch.float32)
    flushed = not bool(smallest != 0)
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


def _pruned(population: Population, rule: Rule) -> Pruned:
    masks = _masks(population, rule)
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
    held = _holding_zeros(population)
    small = (compact if parts.loops["finetune"].elementwise else whole)(held, parts.splits)
    trained = _train("finetune", small.population, replace(parts, splits=small.splits), select=True)
    return replace(trained, last=small.restore(trained.last), selected=small.restore(trained.selected))


def _holding_zeros(population: Population) -> Population:
    """The population with masks that hold every zero of weights and biases, and what the rule masked of others."""
    masks = dict(population.masks)
    for name, parameter in population.parameters.items():
        if population.layouts[name].kind in ("weight", "bias") and not (mask := nonzero(parameter)).all():
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


def _masks(population: Population, rule: Rule) -> Tensors:
    """The mask of every parameter that the rule is applied to: bool [members, *shape]."""
    layouts = population.layouts
    masks: Tensors = {}
    for pool, views in _applied(rule.mask, population, rule):
        for name in pool:
            shape = tuple(population.parameters[name].shape[1:])
            masks[name] = torch.stack([from_view(view, layouts[name], shape) for view in views[name]])
    if rule.structural:
        for name, mask in _bias_masks(population, masks).items():
            if name not in rule.excluded:
                masks[name] = mask & masks[name] if name in masks else mask
    return masks


def _bias_masks(population: Population, masks: Tensors) -> Tensors:
    """The masks of the biases beside masked weights: a filter that goes takes its bias."""
    found = {}
    for name, mask in masks.items():
        bias = bias_of(name)
        if population.layouts[name].kind == "weight" and bias in population.parameters and bias != name:
            views = [to_view(member, population.layouts[name]) for member in mask]
            found[bias] = torch.stack([view.any(3).any(2).flatten() for view in views])
    return found


def _applied(method: Method, population: Population, rule: Rule) -> list[tuple[list[str], Any]]:
    """A function of views and sensitivity applied to each pool of parameters of every member."""
    layouts = population.layouts

    def one(parameters: Tensors, sensitivity: Tensor, numbers: Tensors) -> Any:
        views = {name: to_view(parameter, layouts[name]) for name, parameter in parameters.items()}
        if rule.whole:
            return method.function(views, sensitivity=sensitivity, **numbers)
        return {name: method.function(view, sensitivity=sensitivity, **numbers) for name, view in views.items()}

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
    masks = _masks(population, parts.rule)
    _thresholds(population, parts.rule)
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise ConfigError(f"prune.rule must give a boolean mask, got {mask.dtype} for {name}")
