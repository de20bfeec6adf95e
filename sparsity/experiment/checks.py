"""What is tried before anything trains: methods, batches, the pruned network."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsity.budgets import check_reachable
from sparsity.config import SEARCHED
from sparsity.data import Splits
from sparsity.errors import ConfigError, DataError, SparsityError, reason
from sparsity.experiment.plan import Planned
from sparsity.limits import Budget
from sparsity.models import check_fits
from sparsity.nodes import TEACHER, sensitivity_range
from sparsity.population import Population
from sparsity.stages import Context
from sparsity.stages.pruning import scored
from sparsity.stages.quantizing import quantized_by
from sparsity.stages.regularizing import penalty_of, shrink_of
from sparsity.stages.rules import AppliedRule, Scores, masks_of, rule_of, thresholds_of
from sparsity.stages.sizing import size_of
from sparsity.stages.training import loss_of
from sparsity.step import is_finite, try_step
from sparsity.tensors import from_view, normalised, to_view
from sparsity.training import Loop

log = logging.getLogger("sparsity")


def check_stages(stages: Sequence[Planned], population: Population, context: Context) -> None:
    """Refuses what fails on the population, or on the batches that training will make, before anything trains.

    Stages of several rounds are tried once.
    """
    first = list({stage.node: stage for stage in reversed(stages)}.values())[::-1]
    for stage in first:
        _check_normalised(stage, population)
        _check_methods(stage, population, context)
    for stage in stages:
        _check_budget(stage, population, context)
    for stage in first:
        if stage.rules:
            _check_pruned(population.member(0), rule_of(stage.rules, [0.0] * len(stage.rules), population), context)
    loops = [loop for stage in first if (loop := stage.loop(population, context)) is not None]
    _check_trains(loops, population, context.splits)


def _check_trains(loops: Sequence[Loop], population: Population, splits: Splits) -> None:
    """Refuses a module that cannot be trained on the batches that training will make."""
    member = population.member(0)
    for loop in loops[:1]:  # what one stage can train, all can
        batch_size, num_images = loop.batch_size, len(splits.train)
        for size in batch_sizes(num_images, batch_size):
            trouble = _trouble(member, splits, loop, size)
            if trouble is None:
                continue
            if _trouble(member, splits, loop, 2) is not None:
                raise ConfigError(f"the model cannot be trained on this data: {trouble}")
            images = f"a batch of {size} image{'s' * (size > 1)}"
            if num_images == 1:
                raise DataError(f"data: the training set is 1 image, and the model cannot train on {images}: {trouble}")
            raise ConfigError(
                f"schedule.batch_size={batch_size}: the model cannot train on {images}: {trouble}: take another number"
            )
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        if part is not None and len(part) == 1:
            shown = f"{type(population.module).__name__} on one image, as the {name} set is,"
            check_fits(population.module, splits.example()[:1], splits.num_classes, shown)


def batch_sizes(num_images: int, batch_size: int) -> list[int]:
    """The sizes of the batches that `cut` makes, each once: a last batch of one image joins the one before."""
    last = num_images % batch_size or batch_size
    if num_images <= batch_size:
        return [num_images]
    last += batch_size if last == 1 else 0
    return list(dict.fromkeys((batch_size, last) if num_images > last else (last,)))


def _trouble(member: Population, splits: Splits, loop: Loop, num_images: int) -> str | None:
    """What keeps a member from training on a batch of so many images, in one line."""
    try:
        try_step(member, splits, loop.precision, num_images)
    except torch.OutOfMemoryError as error:
        return f"out of memory ({reason(error)})"
    except Exception as error:  # whatever a custom module may raise
        return reason(error)
    return None


def _check_methods(stage: Planned, population: Population, context: Context) -> None:
    """Refuses a loss, a penalty or a rule that fails on the population; changes nothing."""
    try:
        if stage.losses:
            device, num_classes = population.device, context.splits.num_classes
            loss, outputs = loss_of(stage.losses, device, context.teachers), torch.zeros(2, num_classes, device=device)
            named = {name: number[0] for name, number in loss.numbers.items()}
            named |= {} if loss.teacher is None else {TEACHER: outputs}
            value = loss.function(outputs=outputs, labels=torch.arange(2, device=device), **named)
            if value.shape != ():
                key = f"{stage.key('loss')}.function"
                raise ConfigError(f"{key} must give a scalar, got one of shape {list(value.shape)}")
        one = {name: parameter[0].detach() for name, parameter in population.parameters.items()}
        if (
            stage.regularizers
            and (penalty := penalty_of(stage.regularizers, population, context.graph.units)) is not None
        ):
            value = penalty.function(one, **{name: number[0] for name, number in penalty.numbers.items()})
            if value.shape != ():
                key = f"{stage.key('penalty')}.penalty"
                raise ConfigError(f"{key} must give a scalar, got one of shape {list(value.shape)}")
        if (
            stage.regularizers
            and (shrink := shrink_of(stage.regularizers, population, context.graph.units)) is not None
        ):
            numbers = {name: number[0] for name, number in shrink.numbers.items()}
            shrink.function(one, torch.tensor(0.0, device=population.device), **numbers)
        if stage.quantizers and stage.quantizers[0].function is not None:
            here = replace(context, stage=stage.name, sources=stage.sources)
            quantized_by(stage.quantizers, population, here)({**population.map(torch.Tensor.detach).parameters})
        if stage.rules:
            rule = rule_of(stage.rules, stage.sensitivities, population)
            scores = _scored(stage, rule, population, context)
            masks_of(population, rule, context.graph.units, scores)
            thresholds_of(population, rule, scores)
    except SparsityError:
        raise
    except Exception as error:  # whatever a custom method may raise
        methods = ", ".join(f"{group}={context.choices.get(group)}" for group in (*SEARCHED, "loss"))
        raise ConfigError(f"{methods}: a method fails on the model: {reason(error)}") from error


def _scored(stage: Planned, rule: AppliedRule, population: Population, context: Context) -> Scores:
    """The scores of a rule by one small batch."""
    importances = [rule.importance for rule in stage.rules]
    little = [replace(each, batches=min(1, each.batches), batch_size=min(2, each.batch_size)) for each in importances]
    losses = loss_of(stage.losses, population.device, context.teachers)
    return scored(population.map(torch.Tensor.detach), rule, little, context, losses, context.generators())


def _check_budget(stage: Planned, population: Population, context: Context) -> None:
    """Refuses a budget that what the rule leaves alone exceeds, such as excluded layers."""
    budgets = stage.arguments.get("budget")
    if not stage.rules or not isinstance(budgets, list) or not isinstance(budgets[0], Budget):
        return
    rule, units = rule_of(stage.rules, stage.sensitivities, population), context.graph.units
    scores = _scored(stage, rule, population, context)
    with torch.no_grad():
        check_reachable(
            population.map(torch.Tensor.detach),
            lambda numbers: masks_of(population, rule.at(numbers, everywhere=True), units, scores),
            sensitivity_range(stage.rules[0]),
            budgets,
            context.graph,
            size_of(population, context, budgets),
        )


def _check_normalised(stage: Planned, population: Population) -> None:
    """Refuses rules and penalties on parameters that a weight is made of anew in every pass."""
    makers, layouts = normalised(population.module), population.layouts
    ruled = set(rule_of(stage.rules, stage.sensitivities, population).names) if stage.rules else set()
    regularizer = (stage.regularizers or [None])[0]
    kinds = regularizer.apply_to if regularizer is not None and regularizer.method is not None else ()
    penalised = {name for name, layout in layouts.items() if layout.kind in kinds}
    for name, maker in makers.items():
        layer = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        remedy = f"leave it out by prune.exclude=[{layer}]" if name in ruled else "take reg=none"
        if name in ruled | penalised:
            raise ConfigError(
                f"{name} cannot be pruned or penalised: {maker} makes the weight of it anew in every pass, by its "
                f"parametrization, and zeros of the one are not the other's: build the model without, or {remedy}"
            )


def _check_pruned(member: Population, rule: AppliedRule, context: Context) -> None:
    """Refuses weights that the network divides by: with a whole output pruned, it would give NaN."""
    names = [name for name in rule.names if member.layouts[name].kind == "weight"]
    images = context.splits.example().to(member.device)

    def without(names: list[str]) -> Population:
        first = {name: to_view(member.parameters[name][0], member.layouts[name]).clone() for name in names}
        for view in first.values():
            view[:, 0] = 0
        pruned = {
            name: from_view(view, member.layouts[name], tuple(member.parameters[name].shape[1:])).unsqueeze(0)
            for name, view in first.items()
        }
        return replace(member, parameters={**member.parameters, **pruned})

    try:
        if is_finite(without(names), images) or not is_finite(member, images):
            return
    except Exception as error:  # a module that cannot be differentiated, which training it tells of
        log.debug(f"the pruned network is not tried: {reason(error)}")
        return
    culprit = next((name for name in names if not is_finite(without([name]), images)), ", ".join(names))
    raise ConfigError(
        f"{culprit} cannot be pruned: without one of its outputs the network gives NaN, as where a weight is divided "
        f"by its own length: leave it out by prune.exclude=[{culprit}], or build the model without"
    )
