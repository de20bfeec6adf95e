"""A pruning rule's masks of a population: importance → unit → cut, what goes along, and what it must leave."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.errors import ConfigError
from sparsity.graph import Units
from sparsity.nodes import Call
from sparsity.population import Population, over_members
from sparsity.pruning.cut import at_least, in_order, rounded
from sparsity.pruning.unit import scores_of_entries
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

    importance: Method  # (weight view, and what it asks for) → scores of entries
    unit: Method  # (scores) → groups of them, or of all by name where it is coupled
    cut: Method  # (scores of units, sensitivity=) → threshold, or of all by name where it is whole
    whole: bool
    structural: bool
    pools: list[Pool]
    excluded: frozenset[str] = frozenset()  # names that are not pruned, whatever the rule
    keep_at_least: float = 0.0
    round_to: int = 1
    least: float = 0.0  # what a masked entry scores

    @property
    def names(self) -> list[str]:
        """The parameters that it is applied to."""
        return [name for pool in self.pools for name in pool.names]

    def take(self, members: list[int]) -> "AppliedRule":
        """The rule of some of the members."""
        pools = [pool._replace(sensitivity=pool.sensitivity[members]) for pool in self.pools]
        methods = {name: getattr(self, name).take(members) for name in ("importance", "unit", "cut")}
        return replace(self, **methods, pools=pools)

    def at(self, sensitivity: Tensor, *, everywhere: bool = False) -> "AppliedRule":
        """The rule with another sensitivity [members]; layers that were given their own keep it, or not everywhere."""
        pools = [
            pool if pool.is_own and not everywhere else pool._replace(sensitivity=sensitivity) for pool in self.pools
        ]
        return replace(self, pools=pools)

    @property
    def asks_for(self) -> set[str]:
        """What the importance asks for beside the weight."""
        return _asked(self.importance) & {*nodes.COMPUTED}

    @property
    def is_coupled(self) -> bool:
        """Whether its units reach across layers."""
        return is_coupled(self.unit.function)


@dataclass(frozen=True)
class Scores:
    """What the parameters that a rule is applied to score, as views [members, groups, outputs, inputs, positions]."""

    entries: Tensors
    units: Tensors  # each entry has that of its unit
    coupling: "Coupling | None" = None
    sorted: dict[tuple[str, ...], Tensor] = field(default_factory=dict)  # the units', by whose they are

    def in_order(self, *names: str) -> Tensor:
        """What the units of some parameters score together, in rising order [members, n]; sorted once."""
        if names not in self.sorted:
            members = zip(*(self.units[name] for name in names))
            self.sorted[names] = torch.stack([in_order(*member) for member in members])
        return self.sorted[names]


@dataclass(frozen=True)
class Coupling:
    """Which unit each output [groups · outputs] and each input [groups, inputs] of a weight is of; 0: such stay."""

    rows: Tensors
    columns: Tensors
    num_units: int
    is_head: Tensor  # [units]

    def given_to(self, unit: Callable[..., Any], *, columns: bool = False) -> dict[str, Any]:
        """What a unit's function asks for; columns: whether units are to have groups of what reads them."""
        found = {"unit_of_rows": self.rows, "num_units": self.num_units, "is_head": self.is_head}
        found |= {"unit_of_columns": self.columns} if columns else {}
        return {name: each for name, each in found.items() if name in inspect.signature(unit).parameters}

    def together(self, masks: Tensors) -> Tensors:
        """Masks [members, *view] by which a unit stays, and all that is of it, where one of its writers does."""
        first = next(iter(masks.values()))
        stays = torch.ones(len(first), self.num_units, dtype=torch.bool, device=first.device)
        for units in self.rows.values():
            stays[:, units] = False
        for name, units in self.rows.items():
            written = masks[name].any(4).any(3).flatten(1)
            stays |= torch.zeros_like(stays, dtype=torch.int32).index_add(1, units, written.int()) > 0
        stays[:, 0] = True

        def of(name: str, mask: Tensor) -> Tensor:
            _, groups, outputs, inputs, _ = mask.shape
            rows = stays[:, self.rows[name]].view(-1, groups, outputs, 1, 1)
            columns = stays[:, self.columns[name].flatten()].view(-1, groups, 1, inputs, 1)
            return (rows & columns).expand_as(mask)

        return {name: of(name, mask) if name in self.rows else mask for name, mask in masks.items()}


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
        importance=method_of([rule.importance.function for rule in rules], device),
        unit=method_of([rule.unit.function for rule in rules], device),
        cut=method_of([rule.cut.function for rule in rules], device),
        whole=first.scope == "network",
        structural=first.structural,
        pools=pools,
        excluded=frozenset(name for name in layouts if any(_is_in(name, layer) for layer in first.exclude)),
        keep_at_least=first.keep_at_least,
        round_to=first.round_to,
        least=-float("inf") if first.importance.of == "entries" else 0.0,
    )


def _check_prunes(rule: nodes.Rule, names: list[str]) -> None:
    """Refuses a rule, or a layer's own sensitivity, that would prune nothing."""
    importance = rule.importance
    asked = set(inspect.signature(importance.function.function).parameters) & READS
    if asked and not importance.batches:
        raise ConfigError(
            f"prune.importance.batches=0 leaves {importance.function.target.rpartition('.')[2]} nothing to read, which "
            f"asks for {', '.join(sorted(asked))}: give 1 or more"
        )
    if importance.batches and not asked:
        raise ConfigError(
            f"prune.importance.batches={importance.batches} does nothing: "
            f"{importance.function.target.rpartition('.')[2]} reads no images: leave it 0"
        )
    if importance.penalty is not None and (importance.penalty.penalty is None or not asked & OF_LOSS):
        why = (
            "has no penalty"
            if importance.penalty.penalty is None
            else "is asked for by no importance that reads a gradient"
        )
        raise ConfigError(f"prune.importance.penalty does nothing: it {why}: leave it null")
    if rule.round_to > 1 and not rule.structural:
        raise ConfigError(f"prune.round_to={rule.round_to} does nothing: the unit is no filter: take prune/unit=filter")
    is_of_filters = {"fixed", *nodes.COUPLING} & {*inspect.signature(rule.unit.function.function).parameters}
    meant = importance.of
    if (meant == "filters" and not is_of_filters) or (meant == "entries" and rule.structural):
        name = importance.function.target.rpartition(".")[2]
        unit = "prune/unit=filter" if meant == "filters" else "prune/unit=entry"
        raise ConfigError(f"prune.importance={name} scores {meant} alone: take {unit}")
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


def scores_of(
    population: Population, rule: AppliedRule, units: Units | None, computed: Mapping[str, Tensors] | None = None
) -> Scores:
    """What the parameters score that the rule is applied to; computed: what its importance asks for, by name."""
    layouts, names = population.layouts, rule.names
    parameters = {name: population.parameters[name] for name in names}
    given = {key: {name: each[name] for name in names} for key, each in (computed or {}).items()}
    masks = {name: population.masks[name] for name in names if name in population.masks} if given else {}
    coupling = coupling_of(population, names, units, rule.unit.function) if rule.is_coupled else None
    fixed = _fixed(population, rule, units) if "fixed" in _asked(rule.unit) and units is not None else {}

    def one(
        parameters: Tensors, masks: Tensors, given: dict[str, Tensors], of_importance: Tensors, of_unit: Tensors
    ) -> tuple[Tensors, Tensors]:
        views = {name: to_view(parameter, layouts[name]) for name, parameter in parameters.items()}
        more = {name: {key: each[name] for key, each in given.items()} for name in views}
        entries = {name: rule.importance.function(view, **more[name], **of_importance) for name, view in views.items()}
        for name, mask in masks.items():  # what is masked goes before all else, as its 0 does of magnitude
            entries[name] = torch.where(to_view(mask, layouts[name]), entries[name], rule.least)
        if coupling is not None:
            given = coupling.given_to(rule.unit.function)
            return entries, {**entries, **scores_of_entries(rule.unit.function(entries, **given, **of_unit))}
        own = {name: {"fixed": fixed[name]} if name in fixed else {} for name in views}
        groups = {name: rule.unit.function(each, **own[name], **of_unit) for name, each in entries.items()}
        return entries, {name: scores_of_entries(each) for name, each in groups.items()}

    mapped = over_members(one, population.num_members, (0,) * 5)
    found = mapped(parameters, masks, given, rule.importance.numbers, rule.unit.numbers)
    return Scores(*found, coupling)


def _asked(method: Method) -> set[str]:
    return {*inspect.signature(method.function).parameters}


def masks_of(population: Population, rule: AppliedRule, units: Units | None, scores: Scores | None = None) -> Tensors:
    """The mask of every parameter that the rule is applied to: bool [members, *shape]; what was masked stays masked.

    A structural rule leaves the filters alone that are outputs of the network, or whose use is not known. scores: the
    rule's; None: of an importance that asks for nothing but weights.
    """
    layouts = population.layouts
    scores = scores_of(population, rule, units) if scores is None else scores
    masks: Tensors = {}
    fixed = _fixed(population, rule, units) if rule.structural and units is not None else {}
    views = {
        name: scores.units[name] >= threshold.view(-1, 1, 1, 1, 1)
        for name, threshold in _thresholds(population, rule, scores).items()
    }
    for name, view in (views if scores.coupling is None else scores.coupling.together(views)).items():
        shape = tuple(population.parameters[name].shape[1:])
        if name in fixed:  # of a unit that does not ask which filters stay, too
            view = view | (view.any(2, keepdim=True).any(4, keepdim=True) & fixed[name][None, :, :, None, None])
        masks[name] = torch.stack([from_view(each, layouts[name], shape) for each in view])
    if rule.structural:
        for name, mask in _masks_beside(population, masks, fixed, rule, units).items():
            if name not in rule.excluded:
                masks[name] = mask & masks[name] if name in masks else mask
    earlier = population.masks
    return {**earlier, **{name: mask & earlier[name] if name in earlier else mask for name, mask in masks.items()}}


def _thresholds(population: Population, rule: AppliedRule, scores: Scores) -> Tensors:
    """The threshold of each parameter [members], at the pools' sensitivities."""
    layouts, asked = population.layouts, _asked(rule.cut)
    masks = population.masks if "mask" in asked else {}

    def one(
        parameters: Tensors,
        entries: Tensors,
        units: Tensors,
        masks: Tensors,
        each_ordered: Tensors,
        whole: Tensors,
        sensitivity: Tensor,
        numbers: Tensors,
    ) -> Tensors:
        more: dict[str, Tensors] = {name: {} for name in units}
        for name in more:
            if "ordered" in asked and not rule.whole:
                more[name]["ordered"] = each_ordered[name]
            if "signed" in asked:
                more[name]["signed"] = entries[name].copysign(to_view(parameters[name], layouts[name]))
            if name in masks:
                more[name]["mask"] = to_view(masks[name], layouts[name])
        if rule.whole:
            own = {"ordered_each": each_ordered} if "ordered_each" in asked else whole
            found = rule.cut.function(units, sensitivity=sensitivity, **own, **numbers)
            found = found if isinstance(found, dict) else dict.fromkeys(units, found)
        else:
            found = {
                name: rule.cut.function(each, sensitivity=sensitivity, **more[name], **numbers)
                for name, each in units.items()
            }
        return {name: _bounded(rule, units[name], each_ordered.get(name), each) for name, each in found.items()}

    mapped = over_members(one, population.num_members, (0,) * 8)
    is_each = bool(rule.keep_at_least) or "ordered_each" in asked or ("ordered" in asked and not rule.whole)
    found: Tensors = {}
    for pool in rule.pools:
        parameters = {name: population.parameters[name] for name in pool.names}
        entries, units = ({name: each[name] for name in pool.names} for each in (scores.entries, scores.units))
        own = {name: masks[name] for name in pool.names if name in masks}
        ordered = {name: scores.in_order(name) for name in pool.names} if is_each else {}
        whole = {"ordered": scores.in_order(*pool.names)} if rule.whole and "ordered" in asked else {}
        found |= mapped(parameters, entries, units, own, ordered, whole, pool.sensitivity, rule.cut.numbers)
    return found


def _bounded(rule: AppliedRule, scores: Tensor, ordered: Tensor | None, threshold: Tensor) -> Tensor:
    """The threshold, lowered where it would leave less of a parameter than the rule lets, or no whole multiple."""
    if rule.keep_at_least:
        threshold = torch.minimum(threshold, at_least(ordered, rule.keep_at_least))
    return threshold if rule.round_to == 1 else rounded(scores, threshold, rule.round_to)


def is_coupled(unit: Callable[..., Any]) -> bool:
    """Whether a unit reaches across layers."""
    return nodes.COUPLING[0] in inspect.signature(unit).parameters


def coupling_of(
    population: Population, names: Sequence[str], units: Units | None, function: Callable[..., Any]
) -> Coupling:
    """The units of the network that the named weights write and read; those of outputs and of images are none.

    function: the unit's, which says whether it is of heads alone.
    """
    if units is None:
        raise ConfigError("unit=coupled needs the units of the network, which are not known: take unit=filter")
    if "is_head" in inspect.signature(function).parameters and not units.heads.any():
        raise ConfigError("unit=head finds no heads of attention in the network: take unit=coupled, or unit=filter")
    rows, columns = {}, {}
    stays = torch.zeros(units.num_units, dtype=torch.bool)
    stays[units.of[torch.cat([units.outputs, units.frozen, units.inputs])]] = True
    own = torch.where(stays, 0, torch.arange(units.num_units))
    for layer in units.layers:
        name = layer.weight
        if name not in names or population.layouts[name].kind != "weight":
            continue
        groups, outputs, inputs, _ = to_view(population.parameters[name][0], population.layouts[name]).shape
        is_plain = layer.is_whole and (len(layer.outs), len(layer.ins)) == (groups * outputs, groups * inputs)
        if name in rows or not is_plain:  # used twice, or in part
            rows[name], columns[name] = torch.zeros(groups * outputs).long(), torch.zeros(groups, inputs).long()
            continue
        rows[name] = own[units.of[layer.outs]]
        columns[name] = own[units.of[layer.ins]].view(groups, inputs)
    device = population.device
    placed = ({name: each.to(device) for name, each in found.items()} for found in (rows, columns))
    return Coupling(*placed, units.num_units, units.heads.to(device))


def _fixed(population: Population, rule: AppliedRule, units: Units) -> Tensors:
    """The filters [groups, outputs] that a structural rule leaves alone, by weight."""
    found = {}
    for name in (name for pool in rule.pools for name in pool.names if population.layouts[name].kind == "weight"):
        shape = to_view(population.parameters[name][0], population.layouts[name]).shape[:2]
        rows = units.fixed_rows(name, shape.numel())
        if rows.any():
            found[name] = rows.view(shape).to(population.device)
    return found


READS = {*nodes.COMPUTED} - {"flow", "noise", "scale"}  # what is computed over batches of train

OF_LOSS = {"gradient", "squared_gradient", "curved_gradient"}  # of the loss, a penalty may be added to

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


def thresholds_of(population: Population, rule: AppliedRule, scores: Scores) -> dict[str, list[float]]:
    """The thresholds that the rule's cut comes to, by parameter, one a member."""
    found = _thresholds(population, rule, scores)
    return {name: threshold.tolist() for name, threshold in found.items()}


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
