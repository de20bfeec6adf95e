"""The stage that trains: every training stage of a recipe is this one, with other arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.augmentation import check_augmentation
from sparsity.capture import Way, is_known
from sparsity.compaction import compact, whole
from sparsity.data import count_batches
from sparsity.errors import ConfigError, reason
from sparsity.kernels import Kernels, UnsupportedError, kernels_of
from sparsity.kinds import PositiveCount
from sparsity.limits import Budget
from sparsity.losses import cross_entropy
from sparsity.nodes import Call, Curve, Each, Optimizer, Regularizer, StageSchedule
from sparsity.population import Population
from sparsity.schedules import CURVES, learning_rate
from sparsity.stages.adapting import adaptation_of
from sparsity.stages.context import MASKED, PENALIZED, SELECTED, Context, Outcome
from sparsity.stages.holding import Hold, holding
from sparsity.stages.pruning import Pruner
from sparsity.stages.regrowing import regrowth_of
from sparsity.stages.regularizing import may_be_compacted, penalty_of, shrink_of
from sparsity.stages.rules import method_of
from sparsity.step import CROSS_ENTROPY, Loss, can_be_recorded, convolves, is_elementwise
from sparsity.teachers import Teacher
from sparsity.training import Gradual, Loop
from sparsity.training import train as run_loop


def train(
    population: Population,
    context: Context,
    *,
    schedule: StageSchedule,
    batch_size: PositiveCount,
    optimizer: Optimizer,
    loss: Each[nodes.Loss] | None = None,
    augment: nodes.Augment | None = None,
    average: nodes.Average | None = None,
    penalty: Each[Regularizer] | None = None,
    hold: Hold = "masks",
    select: bool = False,
    rule: Each[nodes.Rule] | None = None,
    sensitivity: Each[float | None] | None = None,
    budget: Each[Budget | None] | None = None,
    curve: Curve | None = None,
    every: PositiveCount | None = None,
    straight_through: bool = False,
    regrow: nodes.Regrow | None = None,
    adapt: Each[nodes.Adapt] | None = None,
) -> Outcome:
    """Every member trained by loss + decay · penalty, or shrunk step by step; what is held at zero takes no part in it.

    loss: cross-entropy where none is given. augment: how images are changed, each time anew. average: of the weights,
    in place of the last ones. hold: what stays at zero, as `holding` says; whatever is dead by that is left out of the
    computation, unless images are augmented or the optimizer makes entries depend on each other. select: hands back the
    epoch with the best validation accuracy, the earliest of equals, the state before the first one among them; else the
    last. rule: prunes meanwhile, `every` so many steps, by a number or to a budget that rises along a curve; only what
    has all of it is selected. straight_through: what the rule leaves out meanwhile is trained on, and may come back.
    regrow: exchanges entries that are masked before it for others. adapt: the decay is multiplied by what it takes for
    a rule to leave what the budget allows.
    """
    held = holding(population, hold, context.graph.units)
    loop = loop_of(
        held, context, schedule, batch_size, optimizer, penalty, loss, augment, as_it_is=not straight_through
    )
    loop = replace(loop, average=average)
    num_batches = count_batches(len(context.splits.train), batch_size)
    minimised = loss_of(loss, population.device, context.teachers)
    pruner = Pruner(rule, sensitivity, budget, held, context, minimised, comes_back=straight_through) if rule else None
    if pruner:
        changing = replace(gradual_of(pruner, curve, every, loop), straight_through=straight_through)
    else:
        changing = regrowth_of(regrow, held, context, loop, minimised) if regrow else None
    is_alone = loop.elementwise and (not penalty or may_be_compacted(penalty[0]))
    is_compacted = hold == "zeros" and is_alone and changing is None and adapt is None and loop.augment is None
    is_compacted &= loop.kernels is None  # which leave out what is masked
    small = (compact if is_compacted else whole)(held, context.splits)
    kinds = {"penalty": penalty_of, "shrink": shrink_of} if penalty else {}
    regularized = {name: of(penalty, small.population, context.graph.units) for name, of in kinds.items()}
    watcher = context.watch(context.stage, loop, len(context.splits.train))
    try:
        trained = run_loop(
            small.population,
            small.splits,
            loop,
            context.generators(),
            loss=minimised,
            **regularized,
            select=select and context.stop is None,
            gradual=changing,
            adaptation=adaptation_of(adapt, budget, held, context, minimised) if adapt else None,
            stop=context.stop,
            watcher=watcher,
        )
    finally:
        watcher.close()
    notes = []
    if pruner:
        courses = pruner.courses(list(changing.shares(loop.epochs * num_batches)))
        own = pruner.notes(final_from(changing, loop, num_batches))
        notes = [{**note, "course": course} for note, course in zip(own, courses)]
    if adapt:
        notes = [{"decay": node.decay * factor} for node, factor in zip(penalty, trained.scale)]
    return Outcome(
        population=small.restore(trained.selected),
        did=((PENALIZED,) if penalty else ()) + ((MASKED,) if rule else ()) + ((SELECTED,) if select else ()),
        notes=notes,
        history=trained.history,
        selected_epoch=trained.selected_epoch,
        diverged=trained.diverged,
        errors=pruner.errors() if pruner else None,
    )


def gradual_of(pruner: Pruner, curve: Curve | None, every: int | None, loop: Loop) -> Gradual:
    """Pruning along a curve while training; refuses what says no curve, or a stage that has no steps for it."""
    if curve is None or every is None:
        raise ConfigError("a stage that trains with a rule needs curve={shape: cubic, until: 0.5} and every=STEPS")
    if not loop.epochs:
        raise ConfigError("a stage that prunes while it trains needs epochs: its schedule has 0")
    return Gradual(pruner.masks, pruner.names, CURVES[curve.shape], curve.until, every)


def final_from(gradual: Gradual, loop: Loop, num_batches: int) -> int:
    """The first epoch at whose end the masks are the final ones."""
    return -(-max(gradual.shares(loop.epochs * num_batches)) // num_batches)


# --- from a config's nodes -------------------------------------------------------------------------------------------


def loss_of(
    losses: Sequence[nodes.Loss] | None, device: torch.device, teachers: Mapping[str, Teacher] = MappingProxyType({})
) -> Loss:
    """The loss of all members, one node a member; they share one of the teachers."""
    if not losses:
        return CROSS_ENTROPY
    method, path = method_of([each.function for each in losses], device), losses[0].teacher
    return Loss(method.function, method.numbers, None if path is None else teachers[path])


def loop_of(
    population: Population,
    context: Context,
    schedule: StageSchedule,
    batch_size: int,
    optimizer: Call,
    penalty: Sequence[Regularizer] | None = None,
    losses: Sequence[nodes.Loss] | None = None,
    augment: nodes.Augment | None = None,
    as_it_is: bool = True,
) -> Loop:
    """The loop of a stage; refuses an optimizer that refuses its settings.

    as_it_is: whether the forward pass sees the parameters as they are.
    """
    added = [each.method.target for each in (penalty or [])[:1] if each.method is not None]
    changing = None if augment is None else augment.function
    if changing is not None:
        name = str(context.choices.get("augment"))
        check_augmentation(changing.partial(), augment.draws, context.splits.input_shape, name)
    targets = [context.model, optimizer.target, *added, *(each.function.target for each in (losses or [])[:1])]
    if changing is not None:  # a teacher then runs in the step
        models = [each.teacher_model for each in losses or [] if each.teacher_model is not None]
        targets += [changing.target, *(each.factory.target for each in models[:1])]
    made = partial(_optimizer, optimizer, schedule.lr, schedule.weight_decay)
    tried = _tried(made, context)
    num_steps = schedule.epochs * count_batches(len(context.splits.train), batch_size)
    how = {
        "loss": losses[0].function.function if losses else cross_entropy,
        "augments": changing is not None,
        "shrinks": any(each.shrink is not None for each in penalty or []),
        "straight_through": not as_it_is,
    }
    kernels = _kernels(context, population, tried, num_steps, how)
    way = way_of(context, population, num_steps, targets, bool(added))
    return Loop(
        epochs=schedule.epochs,
        batch_size=batch_size,
        learning_rate=partial(learning_rate, lr=schedule.lr, shape=schedule.shape, warmup=schedule.warmup),
        optimizer=made,
        precision=context.precision,
        way="kernels" if kernels is not None else way,
        elementwise=is_elementwise(tried),
        augment=changing and changing.partial(),
        draws=augment.draws if changing is not None else 0,
        image_bytes=context.image_bytes,
        kernels=kernels,
    )


def _kernels(
    context: Context, population: Population, optimizer: torch.optim.Optimizer, num_steps: int, how: dict[str, Any]
) -> Kernels | None:
    """The kernels that a stage's steps are computed by; refuses `kernels` where there are none for it."""
    if context.step not in ("auto", "kernels"):
        return None
    is_asked = context.step == "kernels"
    is_low = context.precision_is_asked and context.precision is not torch.float32
    if not is_asked and (is_low or num_steps < WORTH_BUILDING or not pays(population)):
        return None
    try:
        if is_low:
            raise UnsupportedError("they compute in float32, and precision is another")
        return kernels_of(population, context.splits, optimizer, **how)
    except UnsupportedError as error:
        if is_asked:
            raise ConfigError(f"step=kernels: there are none, as {error}: take step=auto") from error
        return None


def pays(population: Population) -> bool:
    """Whether kernels are known to be faster than torch: of what masks have left, or of weights that caches hold."""
    weights = [name for name, layout in population.layouts.items() if layout.kind == "weight"]
    sizes = {name: population.parameters[name].numel() for name in weights}
    left = sum(int(population.masks[name].sum()) if name in population.masks else sizes[name] for name in weights)
    most = MOST_CONVOLVED if convolves(population) else MOST_DENSE
    return left <= max(SPARSE * sum(sizes.values()), most * population.num_members)


def _optimizer(optimizer: Call, lr: float, weight_decay: float, tensors: list[Tensor]) -> torch.optim.Optimizer:
    return optimizer.partial(lr=lr, weight_decay=weight_decay)(tensors)


def _tried(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], context: Context) -> torch.optim.Optimizer:
    """The optimizer of one number, after a step."""
    tensor = torch.zeros(1, requires_grad=True)
    tensor.sum().backward()
    name = context.choices.get("optimizer")
    try:
        tried = optimizer([tensor])
        tried.step()
    except Exception as error:  # each optimizer refuses in its own way
        raise ConfigError(f"optimizer={name}: {reason(error)}") from error
    if context.step in ("recorded", "compiled") and not can_be_recorded(tried):
        raise ConfigError(f"step={context.step} needs a fused optimizer, and optimizer={name} is none: take step=eager")
    return tried


def way_of(context: Context, population: Population, num_steps: int, targets: Sequence[str], is_penalized: bool) -> Way:
    """How the steps of a stage are computed; `auto` leaves code alone that may depend on values.

    Of a network with convolutions the penalty alone is compiled: the compiler's own convolutions are slower. targets:
    the names of the functions that a step runs.
    """
    device = population.device.type
    if context.step == "compiled" and device != "cpu":
        raise ConfigError(f"step=compiled is for a CPU, and the device is {device}: take step=recorded, a CUDA graph")
    if context.step not in ("auto", "kernels"):
        return context.step
    if num_steps < WORTH_RECORDING or not is_known(population.module, *targets) or device not in ("cpu", "cuda"):
        return "eager"
    has_gain = not convolves(population) or is_penalized
    is_compiled = has_gain and num_steps >= WORTH_COMPILING and device == "cpu"
    return "compiled" if is_compiled else "recorded"


# Steps of a stage. Recording takes 0.3 s and gains 0.5 ms a step on LeNet-300-100 with HS; compiling gains 0.7 ms more
# and takes 2 s, or once 11 s on a machine that has not compiled the network before.
WORTH_RECORDING, WORTH_COMPILING = 1_000, 8_000
WORTH_BUILDING = 2_000  # steps: a library takes 4 s once, and gains 1 ms a step and more
SPARSE = 0.1  # the share of the weights, below which kernels are faster than torch whatever the network
MOST_DENSE, MOST_CONVOLVED = 1_500_000, 500_000  # weights of a network without convolutions, and of one with them
