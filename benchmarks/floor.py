"""The floor of a training step: what its operations take at the rates that the machine was measured to have.

It is the sum of two times. The matrix products: floating-point operations over the rate of a product, which includes
reading its operands. The passes over memory that no product does: bytes over the bandwidth of arrays as large as what
the step holds. The sum and not the larger of both, because they wait for each other on the same cores: the optimizer
needs the gradients whole, and an activation its layer's outputs. A step whose passes are all fused into its products
could come nearer to the larger one, which is kept beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLOAT = 4  # bytes
OPTIMIZER_PASSES = 7  # Adam reads weight, gradient and both moments, and writes all but the gradient
GRADIENT_PASSES = 1  # the backward pass writes it
PENALTY_PASSES = 1  # its sums are needed before its gradient, which the optimizer's pass can make
ACTIVATION_PASSES = 4  # written and read going forward, and their gradients going back
COPIES_HELD = 4  # weight, gradient, both moments


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    products: dict[str, float]  # floating-point operations of the fastest product, by precision
    bandwidth: dict[int, float]  # bytes, by the bytes that are passed over again and again

    def bandwidth_of(self, num_bytes: int) -> float:
        """The bandwidth measured at the size nearest to the one given, by ratio."""
        size = min(self.bandwidth, key=lambda each: max(each / num_bytes, num_bytes / each))
        return self.bandwidth[size]


@dataclass(frozen=True)
class Work:
    """What one member's step of a batch comes to."""

    flops: int
    passed: int  # bytes read and written
    held: int  # bytes of weights, gradients, moments and activations

    def floor(self, rates: Rates, precision: str, members: int = 1) -> float:
        """The least seconds of a step of so many members."""
        return sum(self.times(rates, precision, members))

    def larger(self, rates: Rates, precision: str, members: int = 1) -> float:
        """The larger of both times: what even perfect fusion cannot beat."""
        return max(self.times(rates, precision, members))

    def times(self, rates: Rates, precision: str, members: int = 1) -> tuple[float, float]:
        """The seconds of the products, and of the passes over memory."""
        passes = members * self.passed / rates.bandwidth_of(members * self.held)
        return members * self.flops / rates.products[precision], passes


def work(module: nn.Module, input_shape: tuple[int, ...], batch_size: int, *, penalised: bool) -> Work:
    """The work of a training step with Adam, and with a penalty on all weights."""
    weights = sum(parameter.numel() for parameter in module.parameters())
    inputs = torch.Size(input_shape).numel()
    return work_of(layer_sizes(module, input_shape), inputs, weights, batch_size, penalised=penalised)


def work_of(
    layers: list[tuple[int, int]], inputs: int, weights: int, batch_size: int, *, penalised: bool = False
) -> Work:
    """The work of a step of layers with the multiply-accumulates and output units given, for one image."""
    activations = batch_size * (ACTIVATION_PASSES * sum(units for _, units in layers) + inputs)  # images are read once
    weight_passes = OPTIMIZER_PASSES + GRADIENT_PASSES + penalised * PENALTY_PASSES
    return Work(
        flops=step_flops([macs for macs, _ in layers], batch_size),
        passed=FLOAT * (weight_passes * weights + activations),
        held=FLOAT * (COPIES_HELD * weights + batch_size * (sum(units for _, units in layers) + inputs)),
    )


def step_flops(macs: list[int], batch_size: int) -> int:
    """The floating-point operations of a step; macs: of each layer in order, for one image.

    Two a multiply-accumulate; once forward, once for the weights' gradients, and once for the gradients of what a layer
    takes, which the first layer does not need.
    """
    return 2 * batch_size * (3 * sum(macs) - macs[0])


def layer_sizes(module: nn.Module, input_shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The multiply-accumulates and output units for one image of every linear and convolutional layer, in order."""
    found: list[tuple[int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
        positions = outputs[0].numel() // outputs.shape[1]
        found.append((layer.weight.numel() * positions, outputs[0].numel()))

    _with_hooks(module, note, input_shape)
    return found


def _with_hooks(module: nn.Module, note: Callable[..., None], input_shape: tuple[int, ...]) -> None:
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        module(torch.zeros(1, *input_shape))
    for hook in hooks:
        hook.remove()
