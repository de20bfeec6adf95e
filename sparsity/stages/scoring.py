"""What importances ask for by name, of all members at once: gradients and the like over batches of train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsity import nodes
from sparsity.data import Images
from sparsity.errors import ConfigError
from sparsity.population import Population, over_members
from sparsity.stages.context import Context
from sparsity.stages.inputs import Inputs
from sparsity.step import CROSS_ENTROPY, Loss, Penalty, arrangement, cuda_devices, losses_of, outputs, weighted
from sparsity.tensors import Tensors, to_view

# by what was asked for, and by parameter: [members, *view], or what broadcasts to it
Computed = dict[str, Tensors]


def computed(
    population: Population,
    names: Sequence[str],
    asked: set[str],
    reading: nodes.Reading,
    context: Context,
    loss: Loss,
    generators: Sequence[torch.Generator],
    penalty: Penalty | None = None,
) -> Computed:
    """What an importance asks for, of the named parameters; changes nothing but the generators' states.

    Batches are each member's own, drawn by its generator; those of the loss are means over a batch, and gradients means
    over batches. Masked entries are 0 as they stand, and have gradients all the same. penalty: added to the loss.
    """
    found: Computed = {}
    scorer = _Scorer(population, names, reading, context, loss, generators, penalty)
    with _as_it_reads(population, reading.mode):
        for name in sorted(asked):
            found[name] = scorer.views(COMPUTERS[name](scorer))
    return found


class _Scorer:
    """Remembers what is asked about, and the batches, which are the same for all that is asked."""

    def __init__(
        self,
        population: Population,
        names: Sequence[str],
        reading: nodes.Reading,
        context: Context,
        loss: Loss,
        generators: Sequence[torch.Generator],
        penalty: Penalty | None = None,
    ):
        self.penalty = penalty
        self.population = population.map(Tensor.detach)
        self.names, self.context, self.loss, self.generators = list(names), context, loss, generators
        self.reading = reading
        self._batches: list[Images] | None = None

    @property
    def batches(self) -> list[Images]:
        """As many batches [members, batch, …] as the importance reads, or all that there are."""
        if self._batches is None:
            train, size = self.context.splits.train, self.reading.batch_size
            order = torch.stack([torch.randperm(len(train), generator=each) for each in self.generators])
            self._batches = list(train.batches(order[:, : size * self.reading.batches], size))
        return self._batches

    def fresh(self) -> Population:
        """The population with leaves of its own that record gradients, and buffers of its own."""
        wanted = {name: self.population.parameters[name].clone().requires_grad_() for name in self.names}
        return replace(self.population.clone(), parameters=self.population.parameters | wanted)

    def losses(
        self, population: Population, batch: Images, labels: Tensor | None = None, loss: Loss | None = None
    ) -> Tensor:
        """The members' losses [members] on a batch; with other labels, or by another loss, where they are given."""
        labels = batch.labels if labels is None else labels
        added = weighted(population, None if loss else self.penalty)
        loss = loss or self.loss
        function = losses_of(population, self.context.splits, loss, torch.float32)
        taught = () if loss.teacher is None else (loss.teacher(batch.images),)
        return function(population.buffers, batch.images, labels, *taught) + added

    def mean(self, of_batch: Callable[[Population, Images], Sequence[Tensor]]) -> Tensors:
        """The mean over batches of what a function gives of each, a tensor for each of the names."""
        sums: list[Tensor] | None = None
        fresh = self.fresh()
        for batch in self.batches:
            buffers = {name: buffer.clone() for name, buffer in self.population.buffers.items()}
            found = of_batch(replace(fresh, buffers=buffers), batch)
            sums = list(found) if sums is None else [total.add_(each) for total, each in zip(sums, found)]
        return {name: total / len(self.batches) for name, total in zip(self.names, sums)}

    def views(self, found: Tensors) -> Tensors:
        """What is of a parameter's shape, as the view of it; what is a view already, as it is."""
        layouts, parameters = self.population.layouts, self.population.parameters
        return {
            name: torch.stack([to_view(member, layouts[name]) for member in each])
            if each.shape == parameters[name].shape
            else each
            for name, each in found.items()
        }

    def wanted(self, population: Population) -> list[Tensor]:
        """The named parameters."""
        return [population.parameters[name] for name in self.names]


def _gradients(value: Tensor, tensors: list[Tensor], **more: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, tensors, materialize_grads=True, allow_unused=True, **more)


def _gradient(scorer: _Scorer) -> Tensors:
    """The gradient of the mean loss."""
    return scorer.mean(lambda leaves, batch: _gradients(scorer.losses(leaves, batch).sum(), scorer.wanted(leaves)))


def _squared_gradient(scorer: _Scorer) -> Tensors:
    """The sum over batches of the squared gradient of each."""

    def squares(leaves: Population, batch: Images) -> list[Tensor]:
        return [
            each.double().square() for each in _gradients(scorer.losses(leaves, batch).sum(), scorer.wanted(leaves))
        ]

    return {name: each * len(scorer.batches) for name, each in scorer.mean(squares).items()}


def _curved_gradient(scorer: _Scorer) -> Tensors:
    """H g, the Hessian of the mean loss on a batch times its gradient there; the mean over batches."""

    def product(leaves: Population, batch: Images) -> tuple[Tensor, ...]:
        wanted = scorer.wanted(leaves)
        slopes = _gradients(scorer.losses(leaves, batch).sum(), wanted, create_graph=True)
        return _gradients(sum((each * each.detach()).sum() for each in slopes), wanted)

    return scorer.mean(product)


def _curvature(scorer: _Scorer) -> Tensors:
    """The diagonal of the Gauss-Newton matrix of cross-entropy, whose mean is that of squared gradients.

    Labels are drawn from the outputs: then gradients of images are independent and their mean is 0, so that the square
    of their sum has the mean of the sum of their squares.
    """

    def squares(leaves: Population, batch: Images) -> list[Tensor]:
        with torch.no_grad():
            shares = _outputs(scorer, leaves, batch).double().softmax(2).cpu()
        drawn = [
            torch.multinomial(member, 1, generator=generator).squeeze(1)
            for member, generator in zip(shares, scorer.generators)
        ]
        labels = torch.stack(drawn).to(batch.labels.device)
        found = _gradients(scorer.losses(leaves, batch, labels, CROSS_ENTROPY).sum(), scorer.wanted(leaves))
        return [each.double().square() * labels.shape[1] for each in found]

    return scorer.mean(squares)


def _outputs(scorer: _Scorer, population: Population, batch: Images) -> Tensor:
    """The members' outputs [members, batch, classes]."""
    module, arrange = population.module, arrangement(population)

    def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
        return outputs(module, parameters, buffers, images, torch.float32)

    mapped = over_members(one, population.num_members, (0, 0, 0))
    return mapped(population.parameters, population.buffers, arrange(scorer.context.splits.scale(batch.images)))


class _WithoutSoftmax(TorchFunctionMode):
    """Leaves the softmax at a network's end out, whose outputs sum to a constant."""

    SOFTMAX = (F.log_softmax, F.softmax, torch.log_softmax, torch.softmax, Tensor.log_softmax, Tensor.softmax)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function in self.SOFTMAX else function(*args, **(kwargs or {}))


def _flow(scorer: _Scorer) -> Tensors:
    """∂R/∂|w|, in double precision, as R is a sum of products of as many weights as there are layers."""
    population = scorer.population
    population = population.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    sizes = {name: each.abs().requires_grad_() for name, each in population.parameters.items()}
    population = replace(population, parameters=sizes)
    ones = torch.ones(population.num_members, 1, *scorer.context.splits.train.shape, device=population.device).double()
    module = population.module

    def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
        return torch.func.functional_call(module, (parameters, buffers), (images,)).sum()

    with _WithoutSoftmax(), torch.autocast(population.device.type, enabled=False):
        total = over_members(one, population.num_members, (0, 0, 0))(sizes, population.buffers, ones).sum()
    found = _gradients(total, [sizes[name] for name in scorer.names])
    return {name: _bounded(each) for name, each in zip(scorer.names, found)}


def _bounded(tensor: Tensor) -> Tensor:
    """The tensor in single precision; what is too large for it is the largest number."""
    most = torch.finfo(torch.float32).max ** 0.5
    return tensor.clamp(-most, most).float()


def _input_norm(scorer: _Scorer) -> Tensors:
    """‖x‖₂ of each input of a layer over all batches and positions, [members, groups, 1, inputs, 1]."""
    population, layouts = scorer.population, scorer.population.layouts
    module, arrange = population.module, arrangement(population)

    def one(parameters: Tensors, buffers: Tensors, images: Tensor) -> Tensors:
        squares: Tensors = {}

        def note(name: str, inputs: Tensor, weight: Tensor) -> Tensor:
            groups, _, count, _ = to_view(weight.detach(), layouts[name]).shape
            axis = inputs.ndim - 1 if weight.ndim == 2 else inputs.ndim - (weight.ndim - 1)
            others = [each for each in range(inputs.ndim) if each != axis]
            found = inputs.detach().double().square().sum(others).view(groups, 1, count, 1)
            squares[name] = squares[name] + found if name in squares else found
            return inputs

        with Inputs({name: parameters[name] for name in scorer.names}, note):
            torch.func.functional_call(module, (parameters, buffers), (images,))
        return squares

    mapped = over_members(one, population.num_members, (0, 0, 0))
    sums: Tensors = {}
    for batch in scorer.batches:
        own = population.clone()
        with torch.no_grad():
            found = mapped(own.parameters, own.buffers, arrange(scorer.context.splits.scale(batch.images)))
        sums = {name: sums[name] + each if sums else each for name, each in found.items()}
    if lacking := [name for name in scorer.names if name not in sums]:
        raise ConfigError(
            f"prune.importance asks for the inputs of {lacking[0]}, which is no weight of a linear layer or a "
            f"convolution that runs by itself: take prune.apply_to=[weight], or prune.exclude=[{lacking[0]}]"
        )
    return {name: _bounded(each.sqrt()) for name, each in sums.items()}


def _noise(scorer: _Scorer) -> Tensors:
    """Numbers drawn evenly from [0, 1) by each member's generator."""

    def drawn(name: str) -> Tensor:
        shape = scorer.population.parameters[name].shape[1:]
        each = [torch.rand(shape, generator=generator) for generator in scorer.generators]
        return torch.stack(each).to(scorer.population.device)

    return {name: drawn(name) for name in scorer.names}


def _scale(scorer: _Scorer) -> Tensors:
    """The scale of the normalisation behind each filter, [members, groups, outputs, 1, 1]."""
    units, parameters = scorer.context.graph.units, scorer.population.parameters
    behind = units.scales_behind() if units is not None else {}
    found = {}
    for name in scorer.names:
        if name not in behind:
            raise ConfigError(
                f"prune.importance asks for the scale of a normalisation behind {name}, and there is none: leave it "
                f"out by prune.exclude=[{name.rpartition('.')[0]}], or take prune/importance=magnitude"
            )
        factor, index = behind[name]
        groups, outputs = to_view(parameters[name][0], scorer.population.layouts[name]).shape[:2]
        found[name] = parameters[factor][:, index.to(parameters[factor].device)].view(-1, groups, outputs, 1, 1)
    return found


COMPUTERS: dict[str, Callable[[_Scorer], Tensors]] = {
    "gradient": _gradient,
    "squared_gradient": _squared_gradient,
    "curved_gradient": _curved_gradient,
    "curvature": _curvature,
    "flow": _flow,
    "input_norm": _input_norm,
    "noise": _noise,
    "scale": _scale,
}


@contextmanager
def _as_it_reads(population: Population, mode: str) -> Iterator[None]:
    """The module in a mode, and its random state its own; both as before afterwards."""
    before = population.module.training
    population.module.train(mode == "train")
    try:
        with torch.random.fork_rng(devices=cuda_devices(population)), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        population.module.train(before)
