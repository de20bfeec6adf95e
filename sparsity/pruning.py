"""Pruning rules: a parameter, as the view [groups, outputs, inputs, positions], and a sensitivity to a mask.

A mask is boolean and of the view's shape; True keeps an entry, and an entry at the threshold stays. None branches on a
value, so all map over members. The function of the same name with `_cut` gives the threshold that the report shows.
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.linalg import vector_norm

from sparsity.kinds import Range
from sparsity.tensors import BITS, Tensors, reread

AtLeastZero = Annotated[Tensor, Range(0)]
Share = Annotated[Tensor, Range(0, 1)]


def threshold(weight: Tensor, *, sensitivity: AtLeastZero) -> Tensor:
    """Keeps |w| ≥ sensitivity."""
    return weight.abs() >= threshold_cut(weight, sensitivity=sensitivity)


def threshold_cut(weight: Tensor, *, sensitivity: AtLeastZero) -> Tensor:
    """The sensitivity itself."""
    return sensitivity


def std(weight: Tensor, *, sensitivity: AtLeastZero, mask: Tensor | None = None) -> Tensor:
    """Keeps |w| ≥ sensitivity · std(w), each tensor by its own; Han et al., 2015.

    mask: what earlier pruning left, over which the standard deviation is taken; None: all.
    """
    return weight.abs() >= std_cut(weight, sensitivity=sensitivity, mask=mask)


def std_cut(weight: Tensor, *, sensitivity: AtLeastZero, mask: Tensor | None = None) -> Tensor:
    """sensitivity · std(w), the population form (ddof 0), of the entries that a mask keeps, if there is one."""
    if mask is None:
        return sensitivity * weight.std(correction=0)
    count = mask.sum().clamp_min(1)
    mean = (weight * mask).sum() / count
    return sensitivity * (((weight - mean).square() * mask).sum() / count).sqrt()


def percentile(weights: Tensors, *, sensitivity: Share) -> Tensors:
    """Removes the share `sensitivity` of all weights together, the smallest first; equal ones stay together."""
    cut = percentile_cut(weights, sensitivity=sensitivity)
    return {name: weight.abs() >= cut for name, weight in weights.items()}


def percentile_cut(weights: Tensors, *, sensitivity: Share) -> Tensor:
    """The smallest magnitude that stays: number round(sensitivity · n) of n in rising order from 0; ∞ if none does."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    bits = BITS[magnitudes.dtype]  # floats without a sign order as their bits, which torch sorts faster
    magnitudes = reread(reread(magnitudes, bits).sort().values, magnitudes.dtype)
    magnitudes = torch.cat([magnitudes, magnitudes.new_full((1,), torch.inf)])
    index = (sensitivity.double() * (magnitudes.numel() - 1)).round().long()
    return magnitudes.gather(0, index.reshape(1)).reshape(())


def group_threshold(weight: Tensor, *, sensitivity: AtLeastZero, fixed: Tensor | None = None) -> Tensor:
    """Keeps an entry if its filter and its channel both have a root mean square ≥ sensitivity.

    fixed: filters [groups, outputs] that stay whatever their size, such as the network's outputs.
    """
    return _keep_groups(weight, threshold_cut(weight, sensitivity=sensitivity), fixed)


def group_std(
    weight: Tensor, *, sensitivity: AtLeastZero, fixed: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Keeps an entry if its filter and its channel both have a root mean square ≥ sensitivity · std(w).

    fixed: filters [groups, outputs] that stay whatever their size, such as the network's outputs; mask: what earlier
    pruning left, over which the standard deviation is taken.
    """
    return _keep_groups(weight, std_cut(weight, sensitivity=sensitivity, mask=mask), fixed)


def _keep_groups(weight: Tensor, cut: Tensor, fixed: Tensor | None) -> Tensor:
    """The mask of whole filters and channels, each measured by ‖group‖₂ / √entries."""
    _, outputs, inputs, positions = weight.shape
    filters = vector_norm(weight, dim=(2, 3), keepdim=True) / (inputs * positions) ** 0.5
    channels = vector_norm(weight, dim=(1, 3), keepdim=True) / (outputs * positions) ** 0.5
    kept = filters >= cut if fixed is None else (filters >= cut) | fixed[:, :, None, None]
    return (kept & (channels >= cut)).expand_as(weight)
