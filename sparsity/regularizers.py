"""Penalty functions: one parameter tensor, as the view [groups, outputs, inputs, positions], to one scalar.

All are differentiable, and finite with their gradients on a tensor that is all zero or has all-zero groups; none
branches on a value, so all map over members. Formulas as in DeepHoyer (Yang, Wen, Li, ICLR 2020).
"""

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from sparsity.kinds import Positive


def l1(weight: Tensor) -> Tensor:
    """Σ|w|; Tibshirani, 1996."""
    return weight.abs().sum()


def hoyer(weight: Tensor) -> Tensor:
    """Σ|w| / √Σw², the Hoyer measure; between 1 (one entry is left) and √n (all are equal), whatever the scale."""
    return _over(weight.abs().sum(), vector_norm(weight))


def hs(weight: Tensor) -> Tensor:
    """(Σ|w|)² / Σw², Hoyer-square; between 1 and n, whatever the scale: a smooth stand-in for the number of non-zeros.

    Entries below Σw² / Σ|w| shrink and larger ones grow.
    """
    size, square = _Sums.apply(weight)
    return _over(size.square(), square)


def transformed_l1(weight: Tensor, *, a: Positive) -> Tensor:
    """Σ (a + 1)|w| / (a + |w|); near the number of non-zeros for small a and near L1 for large a; Zhang, Xin, 2018."""
    magnitude = weight.abs()
    return ((a + 1) * magnitude / (a + magnitude)).sum()


def group_lasso(weight: Tensor) -> Tensor:
    """Σ ‖filter‖₂ + Σ ‖channel‖₂; Yuan, Lin, 2006, with filters and channels both as groups (Wen et al., 2016)."""
    filters, channels = _group_norms(weight)
    return filters.sum() + channels.sum()


def group_hs(weight: Tensor) -> Tensor:
    """[(Σ ‖filter‖₂)² + (Σ ‖channel‖₂)²] / Σw²: Hoyer-square of the group norms, for filters and for channels."""
    filters, channels = _group_norms(weight)
    return _over(filters.sum().square() + channels.sum().square(), filters.square().sum())


def _group_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The 2-norms of a weight's filters [groups, outputs] (one per output) and channels [groups, inputs]."""
    return _GroupNorms.apply(weight)


class _Sums(torch.autograd.Function):
    """Σ|w| and Σw², with their gradient in one expression; autograd's own passes over the weight twice as often."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> tuple[Tensor, Tensor]:
        flat = weight.reshape(-1)
        return weight.abs().sum(), flat.dot(flat)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: Any, to_size: Tensor, to_square: Tensor) -> Tensor:
        (weight,) = context.saved_tensors
        return weight.sgn().mul_(to_size).add_(weight * (2 * to_square))  # in place: memory is what costs here


class _GroupNorms(torch.autograd.Function):
    """Both norms and their gradient in one pass over the weight each; autograd's own takes three times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> tuple[Tensor, Tensor]:
        squares = weight.square().sum(3)
        return squares.sum(2).sqrt(), squares.sum(1).sqrt()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        context.save_for_backward(*inputs, *outputs)

    @staticmethod
    def backward(context: Any, to_filters: Tensor, to_channels: Tensor) -> Tensor:
        weight, filters, channels = context.saved_tensors
        per_filter, per_channel = _quotient(to_filters, filters), _quotient(to_channels, channels)
        return (per_filter[:, :, None, None] + per_channel[:, None, :, None]) * weight


def _quotient(gradient: Tensor, norm: Tensor) -> Tensor:
    """gradient / norm, and 0 for a group that is all zero."""
    return torch.where(norm > 0, gradient / torch.where(norm > 0, norm, 1), 0)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A ratio that is 0, with gradient 0, where both are 0."""
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)
