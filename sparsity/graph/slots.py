"""Slots while they are read off a pass: which tensor has which, which are tied, and what belongs to them.

A tensor of the pass has labels: the slot of each entry, kept with length 1 along the axes that slots do not depend on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsity.graph.units import ANYTHING, NOTHING, Entry, Join, Link, Matmul, Node, Role, Units


@dataclass(frozen=True)
class Held:
    """A parameter or buffer, or what is made of one alone: for each entry its place along each axis of it."""

    name: str
    sizes: tuple[int, ...]
    places: tuple[Tensor, ...]  # one for each axis, of length 1 along the axes that it does not depend on
    exact: bool = True  # whether entries are those of the parameter itself


Value = Tensor | Held | None  # labels; a parameter; or what no unit is known for


class Slots:
    """Remembers the labels of every tensor of a pass, and what there is to say of slots."""

    def __init__(self, module: nn.Module, images: Tensor):
        super().__init__()
        self.num_slots = 2
        self.nodes: list[Node] = []
        self.matmuls: list[Matmul] = []
        self.links: dict[tuple[str, int], tuple[Tensor, Role]] = {}
        self.same: list[tuple[Tensor, Tensor]] = []  # slots that can only be removed together
        self.heard: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.unknown: dict[str, None] = {}
        self.values: dict[Any, Value] = {}
        self.by_storage: dict[int, set[Any]] = {}
        self.alive: list[Any] = [module, images]  # storages are only told apart while they live
        self.buffers = {name for name, _ in module.named_buffers()}
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            sizes = tuple(tensor.shape)
            self.put(tensor, Held(name, sizes, tuple(laid(a, n, len(sizes)) for a, n in enumerate(sizes))))
        pixels = self.pixels = self.new(images[0].numel())
        labels = pixels.view(1, *images.shape[1:])
        self.put(images, labels)
        self.nodes.append(Join(pixels, pixels[:0], pixels[:0], always=True))

    def put(self, tensor: Tensor, value: Value) -> None:
        """Keeps what a tensor is."""
        key = key_of(tensor)
        self.values[key] = value
        self.by_storage.setdefault(key[0], set()).add(key)

    def value_of(self, tensor: Any) -> Value:
        """What is known of a tensor; None of anything else."""
        return self.values.get(key_of(tensor)) if isinstance(tensor, Tensor) else None

    def new(self, count: int) -> Tensor:
        """As many new slots."""
        first, self.num_slots = self.num_slots, self.num_slots + count
        return torch.arange(first, self.num_slots)

    def tie(self, ones: Tensor, others: Tensor) -> None:
        """Slots that can only be removed together; what is tied to what is never removed is not either."""
        ones, others = torch.broadcast_tensors(ones, others)
        ones, others = ones.flatten(), others.flatten()
        told = (ones > ANYTHING) & (others > ANYTHING)
        self.same.append((ones[told], others[told]))
        self.pin(ones[others == ANYTHING])
        self.pin(others[ones == ANYTHING])

    def pin(self, labels: Tensor) -> None:
        """Slots that are heard whatever the weights are."""
        found = labels.unique()
        self.heard.append(found[found > ANYTHING])

    def freeze(self, labels: Tensor, function: str) -> None:
        """Slots of which it is not known what a function does with them."""
        found = labels.unique()
        found = found[found > ANYTHING]
        if len(found):
            self.frozen.append(found)
            self.heard.append(found)
            self.unknown[function] = None

    def link(self, entry: Entry, slots: Tensor, role: Role) -> None:
        """Notes which slots the entries of a parameter are of; those of one entry are tied."""
        key = entry.name, entry.axis
        slots = torch.where(slots > ANYTHING, slots, NOTHING)
        if key not in self.links:
            self.links[key] = torch.zeros(entry.size, dtype=torch.long), role
        known = self.links[key][0]
        before = known[entry.index]
        known[entry.index] = torch.where(slots > ANYTHING, slots, before)
        for others in (before, known[entry.index]):
            self.same.append((slots[(slots > 1) & (others > 1)], others[(slots > 1) & (others > 1)]))

    def units(self, outputs: Any) -> Units:
        """What the pass came to."""
        found = [self.value_of(tensor) for tensor in tree_leaves(outputs)]
        labels = [each.unique() for each in found if isinstance(each, Tensor)]
        ends = concatenated(labels)
        ends = ends[ends > ANYTHING]
        of = self.numbered()
        return Units(
            of=of,
            nodes=self.nodes,
            links=[Link(name, axis, of[slots], role) for (name, axis), (slots, role) in self.links.items()],
            matmuls=self.matmuls,
            heard=concatenated([*self.heard, ends]).unique(),
            outputs=ends,
            inputs=self.pixels,
            frozen=concatenated(self.frozen).unique(),
            unknown=tuple(self.unknown),
        )

    def numbered(self) -> Tensor:
        """The unit of each slot: the parts that ties connect, numbered from 1."""
        root = connected(self.num_slots, self.same)
        found = torch.zeros(self.num_slots, dtype=torch.long)
        found[2:] = root[2:].unique(return_inverse=True)[1] + 1
        return found

    def give_up(self, name: str, args: Any, kwargs: Any) -> None:
        """Freezes the slots that a function is given."""
        for leaf in tree_leaves((args, kwargs)):
            value = self.value_of(leaf)
            if isinstance(value, Tensor):
                self.freeze(value, name)


def anything(tensor: Tensor) -> Tensor:
    """Labels of a tensor of which no unit is known, and which may be any numbers."""
    return torch.full((1,) * tensor.ndim, ANYTHING)


def key_of(tensor: Tensor) -> Any:
    """What tells tensors apart, and is the same for all views of the same entries."""
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))
    storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), strides, tensor.dtype


def laid(axis: int, size: int, ndim: int) -> Tensor:
    """0, 1, 2, … along one of some axes."""
    return torch.arange(size).view([size if each == axis else 1 for each in range(ndim)])


def alike_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of rows that differ, and for each row which of them it is like."""
    _, inverse = rows[:, 0].unique(return_inverse=True)
    first = torch.zeros(int(inverse.max()) + 1, dtype=torch.long)
    first[inverse] = torch.arange(len(rows))
    if torch.equal(rows[first][inverse], rows):
        return first, inverse
    return torch.arange(len(rows)), torch.arange(len(rows))


def wide(labels: Tensor, ndim: int) -> Tensor:
    """Labels with as many axes as what they are broadcast with."""
    return labels.view((1,) * (ndim - labels.ndim) + tuple(labels.shape))


def varying(labels: Tensor) -> tuple[int, ...]:
    """The axes that labels depend on."""
    return tuple(axis for axis, size in enumerate(labels.shape) if size > 1)


def compressed(labels: Any) -> Any:
    """Labels of length 1 along the axes that they do not depend on."""
    if not isinstance(labels, Tensor):
        return labels
    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    for axis, size in enumerate(labels.shape):
        if size > 1 and torch.equal(labels, (first := labels.narrow(axis, 0, 1)).expand_as(labels)):
            labels = first
    return labels


def reshaped(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels as a view of a tensor of the shape `before` in the shape `after`."""
    axes = varying(labels)
    if not axes:
        return labels.reshape((1,) * len(after))
    if len(axes) == 1:  # along one axis that stays: nothing need be laid out
        (axis,) = axes
        outer = math.prod(before[:axis])
        for place, size in enumerate(after):
            if size == before[axis] and math.prod(after[:place]) == outer:
                return labels.reshape([size if each == place else 1 for each in range(len(after))])
    return compressed(labels.expand(tuple(before)).reshape(tuple(after)))


def squeezed(value: Value) -> Value:
    """A value without its first axis, of length 1."""
    if isinstance(value, Held):
        return Held(value.name, value.sizes, tuple(place.squeeze(0) for place in value.places), value.exact)
    return value if value is None else value.squeeze(0)


def matrix_axes(held: Held, num_ins: int, num_outs: int) -> tuple[int, int] | None:
    """The axes of a parameter that lie along the rows and along the columns of a matrix; None if it has no such."""
    found: list[int | None] = [None, None]
    spare = []
    for axis, place in enumerate(held.places):
        along = varying(place)
        if len(along) > 1:
            return None
        if along:
            if found[along[0]] is not None:
                return None
            found[along[0]] = axis
        else:
            spare.append(axis)
    for side, size in enumerate((num_ins, num_outs)):
        if found[side] is None:
            if size != 1 or not spare:
                return None
            found[side] = spare.pop()
    return found[0], found[1]


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Numbers one after another; of none as well."""
    return torch.cat([torch.zeros(0, dtype=torch.long), *tensors])


def connected(count: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of `count` numbers the smallest that the pairs connect it with."""
    ones, others = concatenated([pair[0] for pair in pairs]), concatenated([pair[1] for pair in pairs])
    root = torch.arange(count)
    while True:
        low = torch.minimum(root[ones], root[others])
        found = root.scatter_reduce(0, root[ones], low, "amin").scatter_reduce(0, root[others], low, "amin")
        while not torch.equal(found, jumped := found[found]):
            found = jumped
        if torch.equal(found, root):
            return root
        root = found
