"""Penalty functions: one parameter tensor, as the view [groups, outputs, inputs, positions], to one scalar.

Over units it is the norms of these, [1, units, 1, 1], that they are given, and their sizes where they ask for them.

All are differentiable, and finite with their gradients on a tensor that is all zero or has all-zero groups; none
branches on a value, so all map over members. What is squared is multiplied by a power of two first, which brings the
largest magnitude near 1: this rounds nothing, and changes no number but those that would be too large or too small for
floats. Sums that are too large end at the largest float; denormals count as zeros. Formulas as in DeepHoyer (Yang,
Wen, Li, ICLR 2020).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import threshold

from sparsity.kinds import Positive


def l1(weight: Tensor) -> Tensor:
    """Σ|w|; Tibshirani, 1996."""
    return weight.abs().sum().clamp_max(torch.finfo(weight.dtype).max)


def hoyer(weight: Tensor) -> Tensor:
    """Σ|w| / √Σw², the Hoyer measure; between 1 (one entry is left) and √n (all are equal), whatever the scale."""
    return _Hoyer.apply(weight)[0]


def hs(weight: Tensor) -> Tensor:
    """(Σ|w|)² / Σw², Hoyer-square; between 1 and n, whatever the scale: a smooth stand-in for the number of non-zeros.

    Entries below Σw² / Σ|w| shrink and larger ones grow.
    """
    return _HoyerSquare.apply(weight)[0]


def transformed_l1(weight: Tensor, *, a: Positive) -> Tensor:
    """Σ (a + 1)|w| / (a + |w|); near the number of non-zeros for small a and near L1 for large a; Zhang, Xin, 2018."""
    return _Transformed.apply(weight, a)[0]


def group_lasso(weight: Tensor) -> Tensor:
    """Σ ‖filter‖₂ + Σ ‖channel‖₂; Yuan, Lin, 2006, with filters and channels both as groups (Wen et al., 2016)."""
    filters, channels, *_ = _GroupNorms.apply(weight, False)
    return (filters.sum() + channels.sum()).clamp_max(torch.finfo(weight.dtype).max)


def sized_lasso(norms: Tensor, *, sizes: Tensor) -> Tensor:
    """Σ √size · ‖group‖₂, by which large groups fall no later than small ones; Yuan, Lin, 2006."""
    return (norms * sizes.sqrt()).abs().sum().clamp_max(torch.finfo(norms.dtype).max)


def group_hs(weight: Tensor) -> Tensor:
    """[(Σ ‖filter‖₂)² + (Σ ‖channel‖₂)²] / Σw²: Hoyer-square of the group norms, for filters and for channels."""
    filters, channels, *_ = _GroupNorms.apply(weight, True)
    square = filters.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)  # 0, with gradient 0, of zeros
    return (filters.sum().square() + channels.sum().square()) / square


# Functions with their gradient in one expression: autograd's own passes over the weight twice as often. What follows
# the values among their outputs is what the gradient needs.


class _HoyerSquare(torch.autograd.Function):
    """(Σ|w|)² / Σw²."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> tuple[Tensor, ...]:
        magnitude = weight.abs()
        factor = scaling(magnitude.amax())
        magnitude.mul_(factor)
        size, flat = magnitude.sum(), magnitude.reshape(-1)
        square = flat.dot(flat).clamp_min(torch.finfo(weight.dtype).tiny)
        value = size.square() / square
        return value, magnitude, size, square, value / square, -2 * factor

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, ...]) -> None:
        _keep(context, outputs[1:], (*inputs, *outputs[1:]))

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: None) -> Tensor:
        if gradient is None:
            return None
        weight, magnitude, size, square, fall, factor = context.saved_tensors
        gradient = gradient * factor
        slope = (magnitude * (gradient * fall)).sub_(gradient / square * size)  # in place: memory is what costs here
        return slope.mul_(weight.sgn())


class _Hoyer(torch.autograd.Function):
    """Σ|w| / √Σw²."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> tuple[Tensor, ...]:
        magnitude = weight.abs()
        factor = scaling(magnitude.amax())
        magnitude.mul_(factor)
        norm = vector_norm(magnitude).clamp_min(torch.finfo(weight.dtype).tiny)
        value = magnitude.sum() / norm
        return value, magnitude, norm, value / norm, factor

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, ...]) -> None:
        _keep(context, outputs[1:], (*inputs, *outputs[1:]))

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: None) -> Tensor:
        if gradient is None:
            return None
        weight, magnitude, norm, fall, factor = context.saved_tensors
        gradient = gradient * factor
        slope = (magnitude / norm).mul_(-gradient * fall).add_(gradient / norm)
        return slope.mul_(weight.sgn())


class _Transformed(torch.autograd.Function):
    """Σ (a + 1)|w| / (a + |w|)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, a: Any) -> tuple[Tensor, ...]:
        limit = torch.finfo(weight.dtype).max ** 0.75  # so that products stay finite; the value is a + 1 there
        magnitude = weight.abs().clamp_max_(limit)
        larger = magnitude + a
        each = magnitude.mul_(a + 1).div_(larger)
        return each.sum(), each, larger, torch.as_tensor(a + 1, dtype=weight.dtype, device=weight.device)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        _keep(context, outputs[1:], (inputs[0], *outputs[1:]))

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: None) -> tuple[Tensor, None]:
        if gradient is None:
            return None, None
        weight, each, larger, factor = context.saved_tensors
        slope = (gradient / larger).mul_(factor).add_((each / larger).mul_(-gradient))
        return slope.mul_(weight.sgn()), None


class _GroupNorms(torch.autograd.Function):
    """The norms of filters and channels; where only their ratio counts, times a power of two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, is_ratio: bool) -> tuple[Tensor, ...]:
        factor = scaling(torch.maximum(weight.amax(), -weight.amin()))
        scaled = weight * factor
        squares = scaled.square()
        squares = squares.sum(3) if squares.shape[3] > 1 else squares.squeeze(3)
        filters, channels = squares.sum(2).sqrt(), squares.sum(1).sqrt()
        if is_ratio:
            return filters, channels, scaled, filters / factor, channels / factor
        return filters / factor, channels / factor, scaled, filters, channels

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, bool], outputs: tuple[Tensor, ...]) -> None:
        _keep(context, outputs[2:], outputs[2:])

    @staticmethod
    def backward(context: Any, to_filters: Tensor, to_channels: Tensor, *_: None) -> tuple[Tensor, None]:
        scaled, filters, channels = context.saved_tensors
        per_filter, per_channel = _quotient(to_filters, filters), _quotient(to_channels, channels)
        both = per_filter[:, :, None, None] + per_channel[:, None, :, None]
        return both.mul_(scaled) if both.shape == scaled.shape else both * scaled, None


def _keep(context: Any, aside: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> None:
    """Keeps tensors for the gradient; those aside are outputs without one."""
    context.mark_non_differentiable(*aside)
    context.set_materialize_grads(False)
    context.save_for_backward(*kept)


def times(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor · factor, whose gradient is the tensor's: of what is divided by the factor later."""
    return _Times.apply(tensor, factor)


class _Times(torch.autograd.Function):
    """tensor · factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, factor: Tensor) -> Tensor:
        return tensor * factor

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def scaling(largest: Tensor) -> Tensor:
    """The power of two that brings the largest magnitude to about 2; of denormals and zeros one that makes them 0."""
    limits = torch.finfo(largest.dtype)
    exponent = threshold(largest, limits.tiny, limits.max).log2().floor()
    # a logarithm that was rounded up would ask for a power below the normal ones
    return (1 - exponent).clamp(math.log2(limits.tiny), math.log2(1 / limits.tiny) + 1).exp2()


def _quotient(gradient: Tensor | None, norm: Tensor) -> Tensor:
    """gradient / norm, and 0 for a group that is all zero."""
    if gradient is None:  # nothing depends on these norms
        return torch.zeros_like(norm)
    return torch.where(norm > 0, gradient / torch.where(norm > 0, norm, 1), 0)
