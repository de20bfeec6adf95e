"""Units: the scores of entries, [groups, outputs, inputs, positions], to that of the unit that each entry is of.

A unit's score is the root mean square of its entries'; an entry of several units has the least of theirs, and so goes
with any of them. None branches on a value, so all map over members.
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from sparsity.kinds import OWN_SHARE, PositiveCount
from sparsity.tensors import Tensors


def entry(scores: Tensor) -> Tensor:
    """Each entry by itself."""
    return scores


def kernel(scores: Tensor) -> Tensor:
    """The positions of an input and an output together; of a linear layer each entry by itself."""
    return _rms(scores, (3,)).expand_as(scores)


def channel(scores: Tensor) -> Tensor:
    """All that reads one input."""
    return _rms(scores, (1, 3)).expand_as(scores)


def filter(scores: Tensor, *, fixed: Tensor | None = None) -> Tensor:
    """All that writes one output. fixed: filters [groups, outputs] that stay, such as the network's outputs."""
    return _stay(_rms(scores, (2, 3)), fixed).expand_as(scores)


def filter_and_channel(scores: Tensor, *, fixed: Tensor | None = None) -> Tensor:
    """Filters and channels: an entry goes with either. fixed: filters [groups, outputs] that stay."""
    return torch.minimum(filter(scores, fixed=fixed), channel(scores))


def block(scores: Tensor, *, rows: PositiveCount, columns: PositiveCount) -> Tensor:
    """Blocks of so many outputs and inputs with all their positions; those at the edges may be smaller."""
    groups, outputs, inputs, positions = scores.shape
    padding = 0, 0, 0, -inputs % columns, 0, -outputs % rows

    def in_blocks(tensor: Tensor) -> Tensor:
        padded = pad(tensor, padding)
        return padded.view(groups, padded.shape[1] // rows, rows, padded.shape[2] // columns, columns, positions)

    counts = in_blocks(torch.ones_like(scores)).sum((2, 4, 5), keepdim=True)
    norms = vector_norm(in_blocks(scores), dim=(2, 4, 5), keepdim=True) / counts.sqrt()
    whole = norms.expand(-1, -1, rows, -1, columns, positions)
    return whole.reshape(groups, outputs + padding[5], inputs + padding[3], positions)[:, :outputs, :inputs]


def n_of_m(scores: Tensor, *, n: Annotated[PositiveCount, OWN_SHARE], m: PositiveCount) -> Tensor:
    """The n largest of every m inputs in a row, such as 2 of 4; the others go whatever the cut is.

    Of equal ones the first stay. Inputs that are left over where m does not divide their number stay entries.
    """
    whole = scores.shape[2] // m * m
    rows = scores[:, :, :whole].unflatten(2, (-1, m))
    places = rows.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
    kept = torch.where(places < n, rows, -torch.inf).flatten(2, 3)
    return torch.cat([kept, scores[:, :, whole:]], 2)


def coupled(scores: Tensors, *, unit_of_rows: Tensors, num_units: int) -> Tensors:
    """Channels with all that can only be removed with them, across layers, scored by all filters that write them.

    Sums, concatenations, splits, grouped and depthwise convolutions tie channels together. unit_of_rows: which unit
    each output [groups · outputs] of a weight is of; 0: none, and such stay. What reads a channel goes with it.
    """
    first = next(iter(scores.values()))
    tiny = torch.finfo(first.dtype).tiny
    largest = torch.stack([each.abs().amax() for each in scores.values()]).amax().clamp_min(tiny)
    squares = torch.zeros(num_units, dtype=first.dtype, device=first.device)
    counts = torch.zeros_like(squares)
    for name, units in unit_of_rows.items():
        of_rows = (scores[name] / largest).square().sum((2, 3)).flatten()
        squares = squares.index_add(0, units, of_rows)
        counts = counts.index_add(0, units, torch.full_like(of_rows, scores[name][0, 0].numel()))
    is_unit = (counts > 0) & (torch.arange(num_units, device=first.device) > 0)
    sizes = torch.where(is_unit, (squares / counts.clamp_min(1)).sqrt() * largest, torch.inf)
    return {
        name: sizes[unit_of_rows[name]].view(*each.shape[:2], 1, 1).expand_as(each) if name in unit_of_rows else each
        for name, each in scores.items()
    }


def _rms(scores: Tensor, axes: tuple[int, ...]) -> Tensor:
    """‖unit‖₂ / √entries."""
    count = 1
    for axis in axes:
        count *= scores.shape[axis]
    return vector_norm(scores, dim=axes, keepdim=True) / count**0.5


def _stay(filters: Tensor, fixed: Tensor | None) -> Tensor:
    """Filters [groups, outputs, 1, 1], those that stay above every cut."""
    return filters if fixed is None else torch.where(fixed[:, :, None, None], torch.inf, filters)
