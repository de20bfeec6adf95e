"""The stage that puts weights in few bits, and trains them as such."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.errors import ConfigError
from sparsity.evaluation import evaluate, images_at_once
from sparsity.kinds import PositiveCount
from sparsity.nodes import Each, Optimizer, StageSchedule
from sparsity.population import PARTS, Population, over_members
from sparsity.quantizing import activations
from sparsity.stages.context import SELECTED, Context, Outcome
from sparsity.stages.holding import holding
from sparsity.stages.inputs import Between, Inputs
from sparsity.stages.rules import method_of
from sparsity.stages.training import loop_of, loss_of
from sparsity.step import arrangement, outputs
from sparsity.tensors import Tensors, from_view, to_view
from sparsity.training import train


def quantize(
    population: Population,
    context: Context,
    *,
    method: Each[nodes.Quantizer],
    schedule: StageSchedule,
    batch_size: PositiveCount,
    optimizer: Optimizer,
    loss: Each[nodes.Loss] | None = None,
    augment: nodes.Augment | None = None,
) -> Outcome:
    """Weights of few bits: those that training comes to whose forward pass sees them so, zeros held.

    It sees the inputs of layers in uint8 where the method says by how many batches their ranges are found. The epoch
    with the best validation accuracy is taken, the earliest of equals; epoch 0, quantized after training, counts, and
    is all that there is of a schedule of 0 epochs.
    """
    if method[0].function is None:
        key = context.key("method")
        said = f"{key}={context.choices.get(key)} quantizes nothing: weights stay as they are"
        return Outcome(population, notes=[{"said": [said]} for _ in method])
    held, generators = holding(population, "zeros", context.graph.units), context.generators()
    rounded = replace(held, parameters=quantized_by(method, held, context)(held.parameters))
    ranges = input_ranges(rounded, method[0], context, generators)
    whole = between(held, ranges)
    loop = loop_of(whole, context, schedule, batch_size, optimizer, losses=loss, augment=augment, as_it_is=False)
    watcher = context.watch(context.stage, loop, len(context.splits.train))
    try:
        trained = train(
            whole,
            context.splits,
            loop,
            generators,
            loss=loss_of(loss, population.device, context.teachers),
            seen=quantized_by(method, whole, context),
            select=context.stop is None,
            stop=context.stop,
            watcher=watcher,
        )
    finally:
        watcher.close()
    before, after = (_accuracies(each, context, batch_size) for each in (held, trained.selected))
    return Outcome(
        population=_without(trained.selected, held),
        did=(SELECTED,),
        notes=_notes(method, population, ranges, before, after, context),
        history=trained.history,
        selected_epoch=trained.selected_epoch,
        diverged=trained.diverged,
    )


Accuracies = list[dict[str, float | None]]  # validation and test, of each member


def _accuracies(population: Population, context: Context, batch_size: int) -> Accuracies:
    splits, at_once = context.splits, images_at_once(population, batch_size, context.image_bytes)
    sets = {"validation": splits.validation, "test": splits.test}
    found = {name: each and evaluate(population, each, splits, at_once) for name, each in sets.items()}
    return [{name: each and each[member] for name, each in found.items()} for member in range(population.num_members)]


def _notes(
    methods: Sequence[nodes.Quantizer],
    population: Population,
    ranges: Tensors,
    before: Accuracies,
    after: Accuracies,
    context: Context,
) -> list[dict[str, Any]]:
    """What there is to say of each member: the bits of its layers, the ranges of their inputs, what it costs."""
    name = context.choices.get(context.key("method")) or methods[0].function.target.rpartition(".")[2]
    layers = _names(methods[0], population)
    floats = [layer for layer in layers if methods[0].activations and layer not in ranges]
    said = [f"inputs of {layer} stay float32: no linear layer or convolution uses it directly" for layer in floats]
    return [
        {
            "quantized": {
                "method": name,
                "bits": each.bits,
                "layers": layers,
                "inputs": {layer: ends[member].tolist() for layer, ends in ranges.items()},
                "accuracy": {"before": before[member], "after": after[member]},
            },
            "said": said,
        }
        for member, each in enumerate(methods)
    ]


# --- inputs ----------------------------------------------------------------------------------------------------------


def input_ranges(
    population: Population, method: nodes.Quantizer, context: Context, generators: Sequence[torch.Generator]
) -> Tensors:
    """The lowest and highest inputs [members, 2] of each weight over batches of train, each member's own; {} if none.

    Of a weight that several layers share they are those of all.
    """
    if method.activations is None:
        return {}
    module, arrange, names = population.module.eval(), arrangement(population), _names(method, population)

    def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensors:
        found: Tensors = {}

        def note(name: str, inputs: Tensor, _: Tensor) -> Tensor:
            found[name] = _wider(found.get(name), torch.stack([inputs.amin(), inputs.amax()]))
            return inputs

        with Inputs({name: parameters[name] for name in names}, note):
            outputs(module, parameters, buffers, images, torch.float32)
        return found

    mapped = over_members(one, population.num_members, (0, 0, 0))
    train_set, ranges = context.splits.train, {}
    order = torch.stack([torch.randperm(len(train_set), generator=generator) for generator in generators])
    count = method.activations.batches * method.activations.batch_size
    with torch.no_grad():
        for batch in train_set.batches(order[:, :count], method.activations.batch_size):
            images = arrange(context.splits.scale(batch.images))
            found = mapped(population.parameters, population.buffers, images)
            ranges = {name: _wider(ranges.get(name), ends) for name, ends in found.items()}
    return ranges


def _wider(before: Tensor | None, ends: Tensor) -> Tensor:
    """The range [..., 2] that holds both, and is finite."""
    most = torch.finfo(ends.dtype).max
    if before is not None:
        ends = torch.stack([torch.minimum(before, ends)[..., 0], torch.maximum(before, ends)[..., 1]], -1)
    return ends.clamp(-most, most)


PREFIX = "network."  # of what is in `Between`


def between(population: Population, ranges: Tensors) -> Population:
    """A population whose layers' inputs are seen in uint8 between their ranges."""
    if not ranges:
        return population
    module = Between(copy.deepcopy(population.module), {name: ends[0] for name, ends in ranges.items()}, activations)
    parts = {part: _prefixed(getattr(population, part)) for part in ("layouts", *PARTS)}
    parts["buffers"] |= {place: ranges[name] for name, place in module.places.items()}
    return Population(module, **parts)


def _without(population: Population, like: Population) -> Population:
    """What `between` was given, with the tensors as they are now."""
    if population.module is like.module:
        return population
    parts = {
        part: {name: tensor for name, tensor in getattr(population, part).items() if name.startswith(PREFIX)}
        for part in PARTS
    }
    return replace(
        like, **{part: {name.removeprefix(PREFIX): t for name, t in of.items()} for part, of in parts.items()}
    )


def _prefixed(named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": each for name, each in named.items()}


# --- weights ---------------------------------------------------------------------------------------------------------


def _names(method: nodes.Quantizer, population: Population) -> list[str]:
    return [name for name, layout in population.layouts.items() if layout.kind in method.apply_to]


def quantized_by(
    methods: Sequence[nodes.Quantizer], population: Population, context: Context
) -> Callable[[Tensors], Tensors]:
    """What the forward pass sees of a population's parameters, as a function of them; one node a member."""
    first, layouts = methods[0], population.layouts
    names = _names(first, population)
    if not names:
        raise ConfigError(f"{context.key('method')}.apply_to={first.apply_to}: the model has no such parameters")
    method, asks = method_of([each.function for each in methods], population.device), {}
    if "codes" in inspect.signature(first.function.function).parameters:
        if first.codes is None:
            raise ConfigError(f"{context.key('method')}.codes=null: {first.function.target} needs what gives them")
        codes, parameters = first.codes.partial(bits=first.bits), population.parameters
        views = {name: [to_view(member.detach(), layouts[name]) for member in parameters[name]] for name in names}
        asks["codes"] = {name: torch.stack([codes(view) for view in members]) for name, members in views.items()}

    def one(parameters: Tensors, asked: dict[str, Tensors], numbers: Tensors) -> Tensors:
        found = {}
        for name in names:
            given = {kind: each[name] for kind, each in asked.items()}
            view = method.function(to_view(parameters[name], layouts[name]), **given, **numbers, bits=first.bits)
            found[name] = from_view(view, layouts[name], parameters[name].shape)
        return found

    mapped = over_members(one, population.num_members, (0, 0, 0))
    return lambda parameters: parameters | mapped(parameters, asks, method.numbers)
