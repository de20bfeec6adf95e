"""One optimizer step of a population, as three functions of tensors that can be recorded and replayed.

Masks are state of the step: they are changed in place, so that a step that was recorded reads them anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsity.capture import Function, Replayed, Way
from sparsity.data import Images, Splits, cut, lies_on, select
from sparsity.losses import cross_entropy
from sparsity.nodes import TEACHER
from sparsity.population import Population, over_members
from sparsity.teachers import Teacher
from sparsity.tensors import Tensors


@dataclass(frozen=True)
class Form:
    """A penalty in one expression: Σ function(view) over the parameters of these names."""

    function: Callable[[Tensor], Tensor]
    names: Sequence[str]


@dataclass(frozen=True)
class Penalty:
    """decay · penalty, to be added to the loss; what may differ between members is a tensor [members]."""

    function: Callable[..., Tensor]  # one member's parameters, and its numbers by keyword, to a scalar
    decay: Tensor
    numbers: Tensors
    rise: Tensor | None = None  # the share in [0, 1] of training over which the decay rises from 0; None: it is there
    form: Form | None = None  # what the function computes, where one expression says it

    def decay_at(self, progress: float) -> Tensor:
        """The decay [members] after a share of training."""
        if self.rise is None:
            return self.decay
        return self.decay * torch.where(self.rise > 0, progress / self.rise, 1).clamp(max=1)


@dataclass(frozen=True)
class Shrink(Penalty):
    """What follows the optimizer's step: one member's parameters, the strength, and its numbers to new parameters.

    The strength is the learning rate times the decay.
    """


@dataclass(frozen=True)
class Loss:
    """What is minimised beside the penalty; what may differ between members is a tensor [members]."""

    function: Callable[..., Tensor]  # one member's outputs and labels, and its numbers by keyword, to a scalar
    numbers: Tensors = field(default_factory=dict)
    teacher: Teacher | None = None  # whose outputs the function is given too


CROSS_ENTROPY = Loss(cross_entropy)
# float images [n, *shape] and numbers in [0, 1) drawn for each [n, draws] to images, whatever the member
Augmentation = Callable[[Tensor, Tensor], Tensor]
# the members' parameters, by name, to what the forward pass sees in their place, through which gradients reach them
Seen = Callable[[Tensors], Tensors]


class Moment(NamedTuple):
    """When a step is taken."""

    progress: float  # the share in [0, 1] of training that lies before it
    rate: float  # the learning rate


class Step:
    """Remembers what it has recorded, and where the epoch is: takes steps, each of which moves the parameters."""

    most = 1  # steps at a call

    def __init__(
        self,
        population: Population,
        splits: Splits,
        penalty: Penalty | None,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        precision: torch.dtype = torch.float32,
        way: Way = "eager",
        loss: Loss = CROSS_ENTROPY,
        augment: Augmentation | None = None,
        shrink: Shrink | None = None,
        straight_through: bool = False,
        seen: Seen | None = None,
    ):
        """population: its parameters are leaves that record gradients; way: how the step is computed.

        straight_through: the forward pass alone is under the masks, whose gradients reach what they leave out, as if it
        had been there; Bengio et al., 2013.

        Only the parameters that the population has masks for can be masked; gradients of others are not multiplied.
        """
        self.population, self.train, self.device = population, splits.train, population.device
        self.penalty = penalty
        if penalty is not None:  # its decay is state of the step, as masks are
            penalty = replace(penalty, decay=penalty.decay.clone(), rise=None)
        self.scale: Tensor | None = None  # what decays are multiplied by [members]; None: 1
        self.decay = None if penalty is None else penalty.decay
        self.shrink, self.strength = shrink, None if shrink is None else torch.zeros_like(shrink.decay)
        self.gathers = self.device.type == "cuda" and lies_on(self.train, self.device)
        # a teacher's outputs are kept, unless every step sees other images
        self.taught = None if loss.teacher is None or augment is not None else loss.teacher.kept
        moved = _moved(population, splits, penalty, loss, precision)
        self.optimizer = optimizer(list(moved.values()))
        if not can_be_recorded(self.optimizer):
            way = "eager"
        if way != "eager":
            _let_record(self.optimizer, self.device)
        self.factors = {name: mask.to(population.parameters[name].dtype) for name, mask in population.masks.items()}
        # what an optimizer that may move an entry whose gradient is 0 has put back
        self.held: Tensors = {}
        if not is_elementwise(self.optimizer) and not straight_through:
            self.held = {name: moved[name].detach().clone() for name in population.masks if name in moved}
        self.straight_through = straight_through
        held = {} if straight_through else self.factors
        self.seen = partial(_masked, factors=self.factors) if straight_through else seen
        functions = [
            _gradients(population, splits, loss, precision, moved, augment, self.seen),
            _penalised(population, penalty, moved, held),
            _update(self.optimizer, moved, self.held, population.masks, _shrinking(shrink, self.strength, population)),
        ]
        if self.gathers:
            here = self.taught is not None and self.taught.device == self.device
            functions.insert(0, _gathered(self.train, self.taught if here else None))
            self.taught = None if here else self.taught
        self.whole = _replayed(functions, way, population, self.optimizer)

    def begin(self, order: Tensor, batch_size: int, drawn: Tensor | None = None) -> None:
        """Begins an epoch, as of `batches`."""
        self.waiting = self.batches(order, batch_size, drawn)

    def advance(self, moments: Sequence[Moment]) -> Tensor:
        """Takes one step a moment; gives their loss, penalty and loss + decay · penalty, each times its images.

        [3, members], loss and penalty being means over a batch.
        """
        sums = torch.zeros(3, self.population.num_members, device=self.device)
        for moment, batch in zip(moments, self.waiting):
            self.rate = moment.rate
            self.strengthen(*moment)
            sums += self(*batch) * batch[-1].shape[1]
        return sums

    def batches(self, order: Tensor, batch_size: int, drawn: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The arguments of every step of an epoch, in the members' orders [members, n].

        drawn: numbers to augment images by, [members, n, draws] in the same order.
        """
        if self.gathers:
            found = ((index,) for index in cut(order.to(self.device), batch_size))
        else:
            found = ((batch.images, batch.labels) for batch in self.train.batches(order, batch_size))
        start = 0
        for batch in found:
            end = start + batch[-1].shape[1]
            more = () if drawn is None else (drawn[:, start:end].to(self.device),)
            if self.taught is not None:
                more = (select(self.taught, order[:, start:end].to(self.taught.device)).to(self.device),)
            yield (*batch, *more)
            start = end

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Takes the step on one batch; loss, penalty and objective [3, members]."""
        return self.whole(*arguments)[0]

    @torch.no_grad()
    def mask(self, masks: Tensors) -> None:
        """Masks some of the population's masked parameters anew, bool [members, *shape] by name; all in place.

        What a mask leaves out becomes 0, and what comes back begins at 0; what the optimizer remembers of either is
        forgotten.
        """
        for name, mask in masks.items():
            parameter, before = self.population.parameters[name], self.population.masks[name]
            stays = before & mask
            before.copy_(mask)
            self.factors[name].copy_(mask)
            if self.straight_through:
                continue
            # of a number p − p is 0, and of what has diverged it is NaN, which is seen when the epoch ends
            parameter.copy_(torch.where(stays, parameter, parameter - parameter))
            _forget(self.optimizer, parameter, ~stays)
            if name in self.held:
                self.held[name].copy_(parameter)

    def masked(self, population: Population) -> Population:
        """The population as the forward pass sees it, such as with zeros where masks are 0."""
        if self.seen is None:
            return population
        return replace(
            population, parameters=self.seen({name: p.detach() for name, p in population.parameters.items()})
        )

    def strengthen(self, progress: float, rate: float) -> None:
        """Sets the decay to what it is after a share of training, if it may change; of shrinking, times the rate."""
        scale = 1 if self.scale is None else self.scale
        if self.penalty is not None and (self.penalty.rise is not None or self.scale is not None):
            self.decay.copy_(self.penalty.decay_at(progress) * scale)
        if self.shrink is not None:
            self.strength.copy_(self.shrink.decay_at(progress) * rate * scale)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def try_step(
    population: Population, splits: Splits, precision: torch.dtype, num_images: int = 2, loss: Loss = CROSS_ENTROPY
) -> None:
    """Raises what a training step would raise on a batch of so many images; changes nothing."""
    if not _moved(leaves(population), splits, None, loss, precision, num_images):
        raise ValueError("its output depends on no parameter that is not frozen")


def is_finite(population: Population, images: Tensor) -> bool:
    """Whether outputs on images [batch, *shape], in evaluation, and their gradients are finite; changes nothing."""
    population = leaves(population)
    module = population.module.eval()
    function = partial(outputs, module, images=images, precision=torch.float32)
    with torch.random.fork_rng(devices=cuda_devices(population)):
        found = over_members(function, population.num_members, (0, 0))(population.parameters, population.buffers)
    trainable = list(population.trainable.values())
    slopes = torch.autograd.grad(found.sum(), trainable, allow_unused=True) if found.requires_grad else []
    return all(bool(each.isfinite().all()) for each in (found, *slopes) if each is not None)


def leaves(population: Population, *, contiguous: bool = False) -> Population:
    """A copy whose parameters are leaves, as they are best laid out; those that are not frozen record gradients."""
    arrange = Tensor.contiguous if contiguous else arrangement(population)
    population = population.clone()
    population = replace(population, parameters={name: arrange(p) for name, p in population.parameters.items()})
    for parameter in population.trainable.values():
        parameter.requires_grad_()
    return population


# --- the three functions: each takes what the one before gives -------------------------------------------------------


def _gathered(train: Images, taught: Tensor | None = None) -> Function:
    """An index [members, batch] to its images and labels, and a teacher's outputs on them where they are kept."""

    def gathered(index: Tensor, *more: Tensor) -> list[Tensor]:
        given = [] if taught is None else [select(taught, index)]
        return [select(train.images, index), train.labels[index], *given, *more]

    return gathered


def _gradients(
    population: Population,
    splits: Splits,
    loss: Loss,
    precision: torch.dtype,
    moved: Tensors,
    augment: Augmentation | None,
    seen: Seen | None,
) -> Function:
    """Images and labels [members, batch, …] to the members' losses [members] and their gradients.

    Images are augmented before, by the numbers drawn for each; a teacher then sees what the members see. seen: what
    the forward pass sees of the parameters.
    """
    losses_of_batch = losses_of(population, splits, loss, precision, seen)

    def gradients(images: Tensor, labels: Tensor, *more: Tensor) -> list[Tensor]:
        if augment is not None:
            images = augmented(augment, images, *more)
            more = () if loss.teacher is None else (loss.teacher(images),)
        with torch.enable_grad():
            losses = losses_of_batch(population.buffers, images, labels, *more)
            # no member's gradient depends on another's loss
            found = torch.autograd.grad(losses.sum(), list(moved.values()), materialize_grads=True)
        return [losses.detach(), *found]

    return gradients


def _penalised(population: Population, penalty: Penalty | None, moved: Tensors, factors: Tensors) -> Function:
    """Losses and gradients to the three rows and what the optimizer gets: decay · penalty added, the masked held.

    factors: masks as numbers, for gradients to be multiplied by.
    """
    penalties_of, touched = penalties(population, penalty), {}
    if penalty is not None:
        touched = _reached(penalties_of().sum(), moved)

    def penalised(losses: Tensor, *gradients: Tensor) -> list[Tensor]:
        found, rows = dict(zip(moved, gradients)), [losses, torch.zeros_like(losses), losses]
        if penalty is not None:
            with torch.enable_grad():
                values = penalties_of()
                weighted = penalty.decay * values
                own = torch.autograd.grad(weighted.sum(), list(touched.values())) if touched else ()
            found |= {name: found[name] + gradient for name, gradient in zip(touched, own)}
            rows = [losses, values.detach(), losses + weighted.detach()]
        held = (found[name] * factors[name] if name in factors else found[name] for name in moved)
        return [torch.stack(rows), *held]

    return penalised


def _update(
    optimizer: torch.optim.Optimizer,
    moved: Tensors,
    held: Tensors,
    masks: Tensors,
    shrunk: Callable[[Tensors], Tensors],
) -> Function:
    """The rows and gradients to the rows alone, the parameters moved, and shrunk after that.

    held: what the masked entries of an optimizer that may move them are put back to.
    """
    take = partial(getattr(type(optimizer).step, "__wrapped__", type(optimizer).step), optimizer)  # without a profiler

    def update(rows: Tensor, *gradients: Tensor) -> list[Tensor]:
        for parameter, gradient in zip(moved.values(), gradients):
            parameter.grad = _laid_like(parameter, gradient)
        take()
        with torch.no_grad():
            for name, value in shrunk(moved).items():
                moved[name].copy_(value)
            for name, value in held.items():
                moved[name].copy_(torch.where(masks[name], moved[name], value))
        return [rows]

    return update


def _shrinking(shrink: Shrink | None, strength: Tensor | None, population: Population) -> Callable[[Tensors], Tensors]:
    """The parameters that shrink, by how they are after the optimizer's step; strength [members] is read anew."""
    if shrink is None:
        return lambda moved: {}
    one = over_members(
        lambda tensors, by, numbers: shrink.function(tensors, by, **numbers), population.num_members, (0,) * 3
    )

    def shrunk(moved: Tensors) -> Tensors:
        found = one(population.parameters, strength, shrink.numbers)
        return {name: each for name, each in found.items() if name in moved}

    return shrunk


def _masked(parameters: Tensors, factors: Tensors) -> Tensors:
    """Parameters under masks as numbers, which gradients pass as if they were not there."""
    masked = {name: (parameters[name] * each).detach() for name, each in factors.items()}
    return parameters | {name: each + (parameters[name] - parameters[name].detach()) for name, each in masked.items()}


def augmented(augment: Augmentation, images: Tensor, drawn: Tensor) -> Tensor:
    """Images [members, batch, *shape] changed by numbers [members, batch, draws]; float, and as bright as before."""
    whole = 255.0 if images.dtype is torch.uint8 else 1.0
    with torch.no_grad():
        found = augment(images.flatten(0, 1).float(), drawn.flatten(0, 1))
        return found.unflatten(0, images.shape[:2]) / whole


BEGINS = {"step_size": "lr", "sum": "initial_accumulator_value"}  # what else than 0 a state begins as: Rprop, Adagrad


def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor, which: Tensor) -> None:
    """Sets what an optimizer remembers of some entries of a parameter to what it begins as, in place."""
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            for name, state in optimizer.state.get(parameter, {}).items():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.copy_(torch.where(which, group.get(BEGINS.get(name), 0), state))


def _laid_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in its parameter's memory order, in which fused optimizers read both."""
    axes = zip(parameter.shape, parameter.stride(), gradient.stride())
    is_laid = all(size == 1 or one == other for size, one, other in axes)
    return gradient if is_laid else torch.empty_like(parameter).copy_(gradient)


def losses_of(
    population: Population, splits: Splits, loss: Loss, precision: torch.dtype, seen: Seen | None = None
) -> Function:
    """The members' losses [members], as a function of their buffers and a batch of raw images and labels.

    Of a loss with a teacher it takes the teacher's outputs [members, batch, classes] too. seen: as of `_gradients`.
    """
    module, arrange, own = population.module, arrangement(population), population.parameters

    def one(parameters: Tensors, buffers: Tensors, images: Tensor, labels: Tensor, named: Tensors) -> Tensor:
        found = outputs(module, parameters, buffers, images, precision).float()
        return loss.function(outputs=found, labels=labels, **named)

    mapped = over_members(one, population.num_members, (0,) * 5)
    return lambda buffers, images, labels, *taught: mapped(
        own if seen is None else seen(own),
        buffers,
        arrange(splits.scale(images)),
        labels,
        loss.numbers | dict(zip([TEACHER], taught)),
    )


def weighted(population: Population, penalty: Penalty | None) -> Tensor:
    """decay · penalty of all members [members], at the parameters that there are."""
    found = penalties(population, penalty)()
    return found if penalty is None else penalty.decay * found


def penalties(population: Population, penalty: Penalty | None) -> Function:
    """The members' penalties [members], at the parameters that there are when it is called."""
    if penalty is None:
        return lambda: torch.zeros(population.num_members, device=population.device)
    one = over_members(lambda tensors, numbers: penalty.function(tensors, **numbers), population.num_members, (0, 0))
    return lambda: one(population.parameters, penalty.numbers)


def _moved(
    population: Population,
    splits: Splits,
    penalty: Penalty | None,
    loss: Loss,
    precision: torch.dtype,
    num_images: int = 2,
) -> Tensors:
    """The trainable parameters that loss or penalty depend on, found on a batch of which nothing stays."""
    population.module.train()
    (batch,) = splits.train.batches(torch.zeros(population.num_members, 1, dtype=torch.long), 1)
    images, labels = (_repeated(each, num_images) for each in (batch.images, batch.labels))
    size = (population.num_members, num_images, splits.num_classes)
    taught = () if loss.teacher is None else (torch.zeros(size, device=population.device),)
    buffers = {name: buffer.clone() for name, buffer in population.buffers.items()}
    with torch.random.fork_rng(devices=cuda_devices(population)):
        losses = losses_of(population, splits, loss, precision)(buffers, images, labels, *taught)
        return _reached((losses + penalties(population, penalty)()).sum(), population.trainable)


def _repeated(first: Tensor, count: int) -> Tensor:
    """What belongs to one image of each member, [members, 1, …], for a batch of them."""
    return first.repeat(1, count, *[1] * (first.ndim - 2))


def _reached(value: Tensor, tensors: Tensors) -> Tensors:
    """The tensors that a value depends on."""
    if not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    return {name: tensor for (name, tensor), gradient in zip(tensors.items(), found) if gradient is not None}


# --- how they are computed -------------------------------------------------------------------------------------------


def _replayed(
    functions: Sequence[Function], way: Way, population: Population, optimizer: torch.optim.Optimizer
) -> Function:
    """The functions one after the other, recorded in the pieces that are best for it."""
    if way == "eager":
        return _chain(functions)
    piece = partial(Replayed, device=population.device, changes=partial(_changing, population, optimizer))
    if population.device.type == "cuda":
        return piece(_chain(functions), way)
    *before, last = functions
    # the compiler's convolutions are slower than those that it replaces, and it has nothing to gain on the optimizer
    if convolves(population):
        first = [piece(each, "recorded" if index == 0 else way) for index, each in enumerate(before)]
    else:
        first = [piece(_chain(before), way)]
    return _chain([*first, piece(last, "recorded")])


def _changing(population: Population, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a step changes in place."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [*population.parameters.values(), *population.buffers.values(), *states]


def _chain(functions: Sequence[Function]) -> Function:
    """The functions one after the other."""
    if len(functions) == 1:
        return functions[0]

    def chain(*arguments: Tensor) -> list[Tensor]:
        for function in functions:
            arguments = function(*arguments)
        return arguments

    return chain


def can_be_recorded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step is the same operations every time: torch's fused ones."""
    return all(group.get("fused") for group in optimizer.param_groups)


ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer moves every entry by its own gradients alone, so that members keep apart."""
    return type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in ELEMENTWISE


def _let_record(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Makes the learning rate a tensor, so that a recorded step reads it anew."""
    # a GPU's fused kernels read float32, a CPU's take the number from the tensor, whatever its type
    kind = torch.float64 if device.type == "cpu" else torch.float32
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=kind, device=device)
        if "capturable" in group and device.type == "cuda":
            group["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not captured, and mean to be


# --- the forward pass, and how tensors lie in memory -----------------------------------------------------------------


def outputs(module: nn.Module, parameters: Tensors, buffers: Tensors, images: Tensor, precision: torch.dtype) -> Tensor:
    """One member's outputs [batch, classes]; below float32, only the forward pass is in that precision."""
    with torch.autocast(images.device.type, dtype=precision, enabled=precision is not torch.float32):
        return functional_call(module, (parameters, buffers), (images,))


def arrangement(population: Population) -> Callable[[Tensor], Tensor]:
    """How [members, batch, …] lies in memory: channels last, which is faster, for one member's 2-d convolutions."""
    return channels_last if population.num_members == 1 and convolves(population) else lambda images: images


def convolves(population: Population) -> bool:
    """Whether the network has 2-d convolutions."""
    return any(isinstance(part, nn.Conv2d) for part in population.module.modules())


def channels_last(tensor: Tensor) -> Tensor:
    """A tensor [1, n, channels, height, width] with its channels last in memory, and any other as it is.

    Of one channel, torch takes both orders for the same and would go on with channels first: the strides say it here.
    """
    if tensor.ndim != 5:
        return tensor
    _, count, channels, height, width = tensor.shape
    if channels > 1:
        return tensor.squeeze(0).contiguous(memory_format=torch.channels_last).unsqueeze(0)
    strides = (count * height * width, height * width, 1, width, 1)
    return tensor.contiguous().as_strided(tensor.shape, strides)


def cuda_devices(population: Population) -> list[torch.device]:
    """The GPUs whose random state a step may draw from."""
    return [population.device] if population.device.type == "cuda" else []
