"""Shrinkage: magnitudes of entries, or norms of units, to what the optimizer's step is followed by; never larger.

A regularizer's other form: in place of a gradient it moves weights by itself, so that they become exactly 0. strength:
learning rate × decay. None branches on a value, so all map over members.
"""

from typing import Annotated

import torch
from torch import Tensor

from sparsity.kinds import Range


def soft_threshold(norms: Tensor, *, strength: Tensor) -> Tensor:
    """max(‖·‖ - strength, 0), the proximal map of strength · Σ‖·‖: L1 of entries, group lasso of units.

    Daubechies, Defrise, De Mol, 2004; of groups Yuan, Lin, 2006.
    """
    return (norms - strength).clamp_min(0)


def p_decay(norms: Tensor, *, strength: Tensor, p: Annotated[float, Range(0, 2)]) -> Tensor:
    """‖·‖ / (1 + strength · ‖·‖^(p - 2)), decoupled decay by Σ‖·‖^p / p; Outmezguine, Levi, 2024.

    p = 2 is weight decay; below 1 what is small falls faster than any gradient could take it, and stays finite.
    """
    slope = (norms ** (p - 2)).clamp_max(torch.finfo(norms.dtype).max)  # no 0 · ∞
    return norms / (1 + strength * slope)
