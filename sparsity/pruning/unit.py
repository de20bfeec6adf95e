"""Units: entries, [groups, outputs, inputs, positions], to the norms of the groups that are kept or removed as one.

Of a rule entries are their scores, of a regularizer the weights themselves. A unit's score is the root mean square of
its entries'; an entry of several units has the least of theirs, and so goes with any of them. A penalty over units gets
their norms. None branches on a value, so all map over members.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from sparsity.kinds import OWN_SHARE, PositiveCount
from sparsity.tensors import Tensors


class Groups(NamedTuple):
    """One way to part entries into groups."""

    norms: Tensor  # ‖group‖₂ of each, in any shape; entries by themselves keep their sign
    sizes: Tensor | int  # how many entries each has; 0: there is no such group
    spread: Callable[[Tensor], Any]  # a number for each group to the entries, or to those of all weights by name

    @property
    def means(self) -> Tensor:
        """‖group‖₂ / √entries, the root mean square of each; ∞ of what is no group."""
        if isinstance(self.sizes, int):
            return self.norms if self.sizes == 1 else self.norms / self.sizes**0.5
        return torch.where(self.sizes > 0, self.norms / self.sizes.clamp_min(1).sqrt(), torch.inf)


def entry(entries: Tensor) -> list[Groups]:
    """Each entry by itself."""
    return [Groups(entries, 1, _same)]


def kernel(entries: Tensor) -> list[Groups]:
    """The positions of an input and an output together; of a linear layer each entry by itself."""
    return [_along(entries, (3,))]


def channel(entries: Tensor) -> list[Groups]:
    """All that reads one input."""
    return [_along(entries, (1, 3))]


def filter(entries: Tensor, *, fixed: Tensor | None = None) -> list[Groups]:
    """All that writes one output. fixed: filters [groups, outputs] that stay, such as the network's outputs."""
    filters = _along(entries, (2, 3))
    if fixed is None:
        return [filters]
    return [filters._replace(norms=torch.where(fixed[:, :, None, None], torch.inf, filters.norms))]


def filter_and_channel(entries: Tensor, *, fixed: Tensor | None = None) -> list[Groups]:
    """Filters and channels: an entry goes with either. fixed: filters [groups, outputs] that stay."""
    return filter(entries, fixed=fixed) + channel(entries)


def block(entries: Tensor, *, rows: PositiveCount, columns: PositiveCount) -> list[Groups]:
    """Blocks of so many outputs and inputs with all their positions; those at the edges may be smaller."""
    groups, outputs, inputs, positions = entries.shape
    padding = 0, 0, 0, -inputs % columns, 0, -outputs % rows

    def in_blocks(tensor: Tensor) -> Tensor:
        padded = pad(tensor, padding)
        return padded.view(groups, padded.shape[1] // rows, rows, padded.shape[2] // columns, columns, positions)

    def spread(each: Tensor) -> Tensor:
        whole = each.expand(-1, -1, rows, -1, columns, positions)
        whole = whole.reshape(groups, outputs + padding[5], inputs + padding[3], positions)
        return whole[:, :outputs, :inputs]

    norms = vector_norm(in_blocks(entries), dim=(2, 4, 5), keepdim=True)
    return [Groups(norms, in_blocks(torch.ones_like(entries)).sum((2, 4, 5), keepdim=True), spread)]


def n_of_m(entries: Tensor, *, n: Annotated[PositiveCount, OWN_SHARE], m: PositiveCount) -> list[Groups]:
    """The n largest of every m inputs in a row, such as 2 of 4; the others go whatever the cut is.

    Of equal ones the first stay. Inputs that are left over where m does not divide their number stay entries.
    """
    whole = entries.shape[2] // m * m
    rows = entries[:, :, :whole].unflatten(2, (-1, m))
    places = rows.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
    kept = torch.where(places < n, rows, -torch.inf).flatten(2, 3)
    return [Groups(torch.cat([kept, entries[:, :, whole:]], 2), 1, _same)]


def coupled(
    entries: Tensors, *, unit_of_rows: Tensors, num_units: int, unit_of_columns: Tensors | None = None
) -> list[Groups]:
    """Channels with all that can only be removed with them, across layers, by all filters that write them.

    Sums, concatenations, splits, grouped and depthwise convolutions tie channels together. unit_of_rows: which unit
    each output [groups · outputs] of a weight is of; 0: none. What reads a channel goes with it, and makes groups of
    its own where it is told, unit_of_columns: which unit each input [groups, inputs] is of.
    """
    first = next(iter(entries.values()))
    tiny = torch.finfo(first.dtype).tiny
    largest = torch.stack([each.detach().abs().amax() for each in entries.values()]).amax().clamp_min(tiny)

    def of(unit_of: Tensors, axes: tuple[int, int]) -> Groups:
        squares = torch.zeros(num_units, dtype=first.dtype, device=first.device)
        sizes, shapes = torch.zeros_like(squares), {}
        for name, units in unit_of.items():
            sums = (entries[name] / largest).square().sum(axes, keepdim=True)
            each = torch.full_like(sums.flatten(), entries[name].numel() // sums.numel())
            squares = squares.index_add(0, units.flatten(), sums.flatten())
            sizes, shapes[name] = sizes.index_add(0, units.flatten(), each), sums.shape

        def spread(each: Tensor) -> Tensors:
            views = {name: each[units.flatten()].view(shapes[name]) for name, units in unit_of.items()}
            return {name: view.expand_as(entries[name]) for name, view in views.items()}

        is_unit = torch.arange(num_units, device=first.device) > 0
        is_large = is_unit & (squares > 0)  # no slope of a root at 0
        norms = torch.where(is_large, torch.where(is_large, squares, 1).sqrt() * largest, 0)
        return Groups(norms, torch.where(is_unit, sizes, 0), spread)

    return [of(unit_of_rows, (2, 3))] + ([] if unit_of_columns is None else [of(unit_of_columns, (1, 3))])


def head(
    entries: Tensors,
    *,
    unit_of_rows: Tensors,
    num_units: int,
    is_head: Tensor,
    unit_of_columns: Tensors | None = None,
) -> list[Groups]:
    """Heads of attention, with their queries, keys, values and what reads them; all else stays; Michel et al., 2019.

    is_head: which units are heads, [units]; the others as of coupled channels.
    """
    rows, columns = (
        given and {name: torch.where(is_head[units], units, 0) for name, units in given.items()}
        for given in (unit_of_rows, unit_of_columns)
    )
    return coupled(entries, unit_of_rows=rows, num_units=num_units, unit_of_columns=columns)


def scores_of_entries(groups: list[Groups]) -> Any:
    """What every entry scores by the groups that it is of: the least of their means."""
    first, *others = (each.spread(each.means) for each in groups)
    for other in others:
        first = torch.minimum(first, other)
    return first


def _along(entries: Tensor, axes: tuple[int, ...]) -> Groups:
    """The groups that reach along some axes."""
    size = 1
    for axis in axes:
        size *= entries.shape[axis]
    return Groups(vector_norm(entries, dim=axes, keepdim=True), size, lambda each: each.expand_as(entries))


def _same(each: Tensor) -> Tensor:
    return each
