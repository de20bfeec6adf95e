"""The stage that puts weights in few bits, and trains them as such."""

import inspect
from collections.abc import Callable, Sequence

import torch

from sparsity import nodes
from sparsity.errors import ConfigError
from sparsity.kinds import PositiveCount
from sparsity.nodes import Each, Optimizer, StageSchedule
from sparsity.population import Population, over_members
from sparsity.stages.context import SELECTED, Context, Outcome
from sparsity.stages.holding import holding
from sparsity.stages.rules import method_of
from sparsity.stages.training import loop_of, loss_of
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

    The epoch with the best validation accuracy is taken, the earliest of equals; epoch 0, quantized after training,
    counts, and is all that there is of a schedule of 0 epochs.
    """
    held = holding(population, "zeros", context.graph.units)
    loop = loop_of(held, context, schedule, batch_size, optimizer, losses=loss, augment=augment, as_it_is=False)
    watcher = context.watch(context.stage, loop, len(context.splits.train))
    try:
        trained = train(
            held,
            context.splits,
            loop,
            context.generators(),
            loss=loss_of(loss, population.device, context.teachers),
            seen=quantized_by(method, held, context),
            select=context.stop is None,
            stop=context.stop,
            watcher=watcher,
        )
    finally:
        watcher.close()
    name = context.choices.get(context.key("method")) or method[0].function.target.rpartition(".")[2]
    return Outcome(
        population=trained.selected,
        did=(SELECTED,),
        notes=[{"quantized": {"method": name, "bits": each.bits}} for each in method],
        history=trained.history,
        selected_epoch=trained.selected_epoch,
        diverged=trained.diverged,
    )


def quantized_by(
    methods: Sequence[nodes.Quantizer], population: Population, context: Context
) -> Callable[[Tensors], Tensors]:
    """What the forward pass sees of a population's parameters, as a function of them; one node a member."""
    first, layouts = methods[0], population.layouts
    names = [name for name, layout in layouts.items() if layout.kind in first.apply_to]
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
