"""The members of a population before their first stage, and how many of them are trained as one."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsity.config import Run, shown
from sparsity.data import Splits
from sparsity.errors import ConfigError, SparsityError, reason
from sparsity.experiment.plan import Planned
from sparsity.graph import Layer
from sparsity.memory import free_bytes
from sparsity.models import build, check_fits
from sparsity.population import Population, stack
from sparsity.stages.context import Context, derived_seed
from sparsity.stages.regularizing import penalty_of, shrink_of
from sparsity.stages.training import loss_of
from sparsity.step import try_step
from sparsity.tensors import to_view
from sparsity.training import Loop, train
from sparsity.weights import fill, read_states

log = logging.getLogger("sparsity")


def first_population(runs: Sequence[Run], splits: Splits, device: torch.device) -> tuple[Population, list[str]]:
    """The members before the first stage, drawn by their seeds or with the weights given, and warnings of these."""
    model = runs[0].model
    name = runs[0].name.get("model", model.factory.target)
    modules, warnings = [_build(run, splits, name) for run in runs], []
    images = splits.example()
    if model.weights is not None:
        states = read_states(model.weights)
        for module in modules:
            warnings = fill(module, states, model.weights, images=images, new_head=model.head == "new").warnings
        if model.head == "new" and not any("schedule" in stage.call.numbers for stage in runs[0].recipe):
            warnings.append(f"model.head=new: stages={shown(runs[0].stages)} does not train the new last layer")
    check_fits(modules[0], images, splits.num_classes, name)
    return stack(modules, device, images), warnings


def _build(run: Run, splits: Splits, name: str) -> torch.nn.Module:
    try:
        return build(
            run.model.factory.partial(), splits.input_shape, splits.num_classes, derived_seed(run.seed, "weights")
        )
    except SparsityError:
        raise
    except Exception as error:  # whatever a custom factory may raise
        raise ConfigError(
            f"model={name} cannot be built for images {list(splits.input_shape)}: {reason(error)}"
        ) from error


# --- how many are trained as one -------------------------------------------------------------------------------------


def members_at_a_time(
    stages: Sequence[Planned], population: Population, context: Context, stacked: bool | None, limit: int | None
) -> int:
    """How many members are trained as one: as many as memory takes, or one where stacking is no gain or impossible.

    stacked: None asks a short measurement on a CPU, and stacks on a GPU. Kernels take members side by side, one a core,
    which needs no measurement.
    """
    members = population.num_members
    trained = [(stage, loop) for stage in stages if (loop := stage.loop(population, context)) is not None]
    if not trained:
        return members
    if members == 1 or stacked is False:
        return 1
    obstacle = _obstacle(population, trained, context)
    if obstacle is not None:
        log.info(f"{members} members are trained one after another: {obstacle}")
        return 1
    most = min(members, limit or members)
    stage, loop = max(trained, key=lambda entry: entry[1].epochs)
    fitting = min(most, _fitting(population, context, trained[0][1]))
    if fitting < most:
        log.info(f"{members} members are trained {fitting} at a time: more do not fit")
    device = population.device
    if stacked is None and device.type == "cpu" and loop.kernels is None:
        some = list(range(fitting))
        if not _stacking_pays(population.take(some), stage.take(some), context.take(some), loop):
            return 1
    return fitting


def _obstacle(population: Population, trained: Sequence[tuple[Planned, Loop]], context: Context) -> str | None:
    """Why members cannot be trained as one; a random forward pass, among others, cannot be mapped over them."""
    if not all(loop.elementwise for _, loop in trained):
        return "the optimizer would mix them"
    stage, loop = trained[0]
    try:
        loss = loss_of(stage.take([0, 1]).losses, population.device, context.teachers)
        try_step(population.take([0, 1]), context.splits, loop.precision, loss=loss)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a custom module may raise
        return f"the network cannot be mapped over members ({reason(error)})"
    return None


def _fitting(population: Population, context: Context, loop: Loop) -> int:
    """How many members fit into half of the free memory, by a generous count of what training holds."""
    parameters = population.parameters
    weights = sum(parameter[0].numel() for parameter in parameters.values())
    layers = context.graph.values()
    units = sum(layer.num_positions * _num_outputs(parameters[layer.name], population, layer) for layer in layers)
    images = torch.Size(context.splits.input_shape).numel()
    num_bytes = FLOAT_BYTES * (COPIES_OF_WEIGHTS * weights + loop.batch_size * (COPIES_OF_UNITS * units + images))
    return max(1, int(free_bytes(population.device) / 2 / num_bytes))


FLOAT_BYTES = 4
COPIES_OF_WEIGHTS = 10  # itself, gradient, Adam's two, last and best state, masks, what the penalty makes of it
COPIES_OF_UNITS = 6  # what a layer gives, what pooling and ReLU make of it, and their gradients


def _num_outputs(weight: Tensor, population: Population, layer: Layer) -> int:
    view = to_view(weight[0], population.layouts[layer.name])
    return view.shape[0] * view.shape[1]


def _stacking_pays(population: Population, stage: Planned, context: Context, loop: Loop) -> bool:
    """Whether a stacked step takes clearly less time than that of one member as many times, by a few steps of each."""
    members = population.num_members
    together, alone = (
        _seconds(some, stage.take(range(some.num_members)), context.take(list(range(some.num_members))), loop)
        for some in (population, population.member(0))
    )
    share = together / (members * alone)
    pays = share < WORTH_STACKING
    how = "as one" if pays else "one after another"
    log.info(f"{members} members are trained {how}: stacked, they take {share:.2f} of the time")
    return pays


WORTH_STACKING = 0.9  # of the time of one after another: less than noise may say
ROUNDS = 5
FEW_STEPS = 4


def _seconds(population: Population, stage: Planned, context: Context, loop: Loop) -> float:
    """The time of a few steps of a stage, the least of several."""
    way = "recorded" if loop.way == "compiled" else loop.way  # compiling takes longer than it would tell
    loop = replace(loop, epochs=1 + ROUNDS, way=way)  # the first one records
    train_set = context.splits.train
    few = train_set.take(torch.arange(min(len(train_set), FEW_STEPS * loop.batch_size)))
    generators = [torch.Generator().manual_seed(seed) for seed in context.seeds]
    splits = replace(context.splits, train=few, validation=None)
    nodes, units = stage.regularizers, context.graph.units
    penalty, shrink = (of(nodes, population, units) if nodes else None for of in (penalty_of, shrink_of))
    loss = loss_of(stage.losses, population.device, context.teachers)
    history = train(population, splits, loop, generators, loss=loss, penalty=penalty, shrink=shrink).history
    return min(row.seconds for row in history[1:] or history)
