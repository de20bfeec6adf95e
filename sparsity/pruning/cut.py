"""Cuts: the scores of a parameter's units and one number, the sensitivity, to the threshold: what scores less goes.

Scores are a tensor of the parameter's view, where every entry has its unit's. A cut over the network gets all of them
by name, and gives one threshold, or one for each name. What asks for `ordered` gets the scores of all entries that it
cuts in rising order, [n], and for `ordered_each` those of every parameter by name: they are sorted once, however many
sensitivities are tried. None branches on a value, so all map over members.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from sparsity.kinds import Range
from sparsity.tensors import BITS, Tensors, reread

AtLeastZero = Annotated[Tensor, Range(0)]
Share = Annotated[Tensor, Range(0, 1)]


def threshold(scores: Tensor, *, sensitivity: AtLeastZero) -> Tensor:
    """The sensitivity itself."""
    return sensitivity


def std(scores: Tensor, *, sensitivity: AtLeastZero, signed: Tensor, mask: Tensor | None = None) -> Tensor:
    """sensitivity · std, each tensor by its own, the population form (ddof 0); Han et al., 2015.

    signed: the entries' own scores with the signs of the weights, of magnitude the weights themselves, over which the
    standard deviation is taken; mask: what earlier pruning left, which alone counts; None: all.
    """
    if mask is None:
        return sensitivity * signed.std(correction=0)
    count = mask.sum().clamp_min(1)
    mean = (signed * mask).sum() / count
    return sensitivity * (((signed - mean).square() * mask).sum() / count).sqrt()


def share_of_layer(scores: Tensor, *, sensitivity: Share, ordered: Tensor) -> Tensor:
    """Removes the share `sensitivity` of each tensor, the smallest first; equal ones stay together."""
    return _at(ordered, sensitivity)


def share_of_all(scores: Tensors, *, sensitivity: Share, ordered: Tensor) -> Tensor:
    """Removes the share `sensitivity` of all tensors together, the smallest first; equal ones stay together."""
    return _at(ordered, sensitivity)


def erdos_renyi(scores: Tensors, *, sensitivity: Share, ordered_each: Tensors) -> Tensors:
    """Removes the share `sensitivity` of all, each tensor its own share; Evci et al., 2020 (the ERK form).

    What is left of a tensor is ε · (outputs + inputs + width + height) / (outputs · inputs · positions), and 1 at most,
    of a kernel that is square; ε is what leaves as much as is to be left of all.
    """
    kind = next(iter(scores.values()))
    shapes = [tuple(each.shape) for each in scores.values()]
    sizes = torch.tensor([float(each.numel()) for each in scores.values()], dtype=torch.float64, device=kind.device)
    sums = [
        groups * (outputs + inputs) + (2 * positions**0.5 if positions > 1 else 0)
        for groups, outputs, inputs, positions in shapes
    ]
    odds = torch.tensor(sums, dtype=torch.float64, device=kind.device) / sizes
    left = (1 - sensitivity.double()) * sizes.sum()
    is_full = torch.zeros_like(odds, dtype=torch.bool)
    for _ in sums:  # those that would be more than whole are whole, and the others share the rest
        rest = left - torch.where(is_full, sizes, 0).sum()
        density = rest / torch.where(is_full, 0, sizes * odds).sum().clamp_min(1) * odds
        is_full = is_full | (density >= 1)
    density = torch.where(is_full, 1, density.clamp(0, 1))
    return {name: _at(ordered_each[name], 1 - density[index]) for index, name in enumerate(scores)}


def lamp(scores: Tensors, *, sensitivity: Share, ordered_each: Tensors) -> Tensors:
    """Removes the share `sensitivity` of all, by score² / Σ of the squares of those of its tensor that are no smaller.

    Layer-adaptive magnitude pruning; Lee et al., 2021: the largest of each tensor has 1, so that no layer goes whole.
    """
    adapted = {}
    for name, each in ordered_each.items():
        squares = torch.where(each.isfinite(), each, 0).double().square()
        above = squares.flip(0).cumsum(0).flip(0)
        adapted[name] = torch.where(each.isfinite(), squares / torch.where(above > 0, above, 1), each.double())
    least = _at(torch.cat(list(adapted.values())).sort().values, sensitivity)
    return {name: torch.where(adapted[name] >= least, each, torch.inf).amin() for name, each in ordered_each.items()}


def at_least(ordered: Tensor, share: float) -> Tensor:
    """The largest threshold that leaves a share of the scores, [n] in rising order."""
    return ordered[ordered.numel() - max(1, math.ceil(share * ordered.numel()))]


def rounded(scores: Tensor, threshold: Tensor, multiple: int) -> Tensor:
    """The threshold that leaves filters in a whole multiple: the next larger one, or all; none where none was left."""
    filters = scores.flatten(2).amax(2).flatten().sort(descending=True).values
    count = (filters >= threshold).sum()
    wanted = torch.where(count > 0, (-(-count // multiple) * multiple).clamp(max=filters.numel()), 1)
    return torch.where(count > 0, torch.minimum(threshold, filters.gather(0, (wanted - 1).reshape(1))[0]), threshold)


def in_order(*scores: Tensor) -> Tensor:
    """All entries in rising order, [n]."""
    flat = torch.cat([each.flatten() for each in scores]).detach()
    bits = BITS[flat.dtype]
    # floats order as their bits, and negative ones the other way round; torch sorts whole numbers faster
    whole = reread(flat, bits)
    turned = torch.where(whole < 0, whole ^ torch.iinfo(bits).max, whole).sort().values
    return reread(torch.where(turned < 0, turned ^ torch.iinfo(bits).max, turned), flat.dtype)


def _at(ordered: Tensor, share: Tensor) -> Tensor:
    """Number round(share · n) of n in rising order from 0; ∞ where that is none of them."""
    index = (share.double() * ordered.numel()).round().long()
    return torch.cat([ordered, ordered.new_full((1,), torch.inf)]).gather(0, index.reshape(1)).reshape(())
