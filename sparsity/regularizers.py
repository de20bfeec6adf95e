"""Penalty functions: one parameter tensor, as the view [groups, outputs, inputs, positions], to one scalar.

All are differentiable, and finite with their gradients on a tensor that is all zero or has all-zero groups; none
branches on a value, so all map over members. Formulas as in DeepHoyer (Yang, Wen, Li, ICLR 2020).
"""

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
    return _over(weight.abs().sum().square(), weight.square().sum())


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
    return _over(filters.sum().square() + channels.sum().square(), weight.square().sum())


def _group_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The 2-norms of a weight's filters (one per output) and channels (one per input)."""
    return vector_norm(weight, dim=(2, 3)), vector_norm(weight, dim=(1, 3))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A ratio that is 0, with gradient 0, where both are 0."""
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)
