"""Weights in few bits: what the forward pass sees in place of a weight; zeros stay zeros, and gradients pass.

weight: the view [groups, outputs, inputs, positions]. A function may ask by name for `codes`, by which entries share a
value, found once before training. None branches on a value, so all map over members.
"""

import torch
from torch import Tensor

from sparsity.kinds import PositiveCount


def symmetric(weight: Tensor, *, bits: int) -> Tensor:
    """round(w / s) · s, s = max |w| / (2^(bits − 1) − 1) of each output; Jacob et al., 2018.

    The gradient passes as if nothing were rounded; Bengio et al., 2013.
    """
    levels = 2 ** (bits - 1) - 1
    scale = weight.detach().abs().amax((2, 3), keepdim=True) / levels
    codes = (weight / torch.where(scale > 0, scale, 1)).round().clamp(-levels, levels)
    return (codes * scale).detach() + (weight - weight.detach())


def shared(weight: Tensor, codes: Tensor, *, bits: int) -> Tensor:
    """The mean of the entries of the same code, 0 of code 0; codes: of `clusters`; Han et al., 2016.

    The gradient of a value is the sum of its entries', which share it evenly.
    """
    places, entries = codes.flatten(), weight.flatten().double()
    sums = torch.zeros(2**bits, dtype=entries.dtype, device=weight.device).scatter_add(0, places, entries)
    counts = torch.zeros_like(sums).scatter_add(0, places, torch.ones_like(entries))
    means = (sums / counts.clamp_min(1)).to(weight.dtype)
    return torch.where(codes > 0, means.gather(0, places).view_as(weight), 0)


def clusters(weight: Tensor, *, bits: int, rounds: PositiveCount) -> Tensor:
    """Codes 1 to 2^bits − 1 of the entries by k-means, from centers at even steps, and 0 of zeros; Han et al., 2016.

    rounds: of k-means. Int64, in the shape of the weight.
    """
    entries, there, num = weight.flatten().double(), weight.flatten() != 0, 2**bits - 1
    low, high = (torch.where(there.any(), end, 0) for end in (entries.where(there, torch.inf).amin(),
                                                              entries.where(there, -torch.inf).amax()))  # fmt: skip
    centers = low + (high - low) * torch.linspace(0, 1, num, dtype=entries.dtype, device=weight.device)
    counted = there.to(entries.dtype)
    for _ in range(rounds):
        codes = torch.bucketize(entries, (centers[1:] + centers[:-1]) / 2)
        sums, counts = (torch.zeros_like(centers).scatter_add(0, codes, each) for each in (entries * counted, counted))
        centers = torch.where(counts > 0, sums / counts.clamp_min(1), centers)
    codes = torch.bucketize(entries, (centers[1:] + centers[:-1]) / 2)
    return torch.where(there, codes + 1, 0).view_as(weight)
