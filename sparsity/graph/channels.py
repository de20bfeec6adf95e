"""What functions do to channels that they leave apart: functions that move entries, of each entry, and along axes."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsity.graph.functions import FACTORS, FORGET_ZERO, KEEP_ZERO, SUMS, keeps_zero
from sparsity.graph.slots import Held, Slots, Value, alike_rows, compressed, connected, laid, reshaped, varying, wide
from sparsity.graph.units import ANYTHING, NOTHING, Entry, Join, Mix, Product, Scale


class Channels(Slots):
    """Functions that leave channels apart."""

    # --- moving entries ----------------------------------------------------------------------------------------------

    def moved(self, name: str, function: Any, args: Any, kwargs: Any, first: Value) -> Any:
        """The same done to the labels."""

        def move(labels: Tensor) -> Any:
            found = function(labels.expand(args[0].shape), *args[1:], **kwargs)
            return tree_map(compressed, found)

        if isinstance(first, Tensor):
            if name == "pixel_shuffle":  # a pixel's parts go together
                parts = first.expand(1, args[0].shape[1], *first.shape[2:]).unflatten(1, (-1, args[1] ** 2))
                self.tie(parts, parts[:, :, :1])
            if name in ("channel_shuffle", "native_channel_shuffle"):  # of as many channels from each group
                groups = first.expand(1, args[0].shape[1], *first.shape[2:]).unflatten(1, (args[1], -1))
                self.tie(groups, groups[:, :1])
            pieces = move(first)
            if name == "split":  # into equal parts, also by `chunk`: they stay equal where the same goes of each
                for piece in pieces[1:]:
                    if piece.shape == pieces[0].shape and piece.numel() > 1:
                        self.tie(piece, pieces[0])
            return pieces
        if not isinstance(first, Held):
            return None
        places = [move(place) for place in first.places]
        if places and isinstance(places[0], (list, tuple)):
            return [Held(first.name, first.sizes, each, first.exact) for each in zip(*places)]
        return Held(first.name, first.sizes, tuple(places), first.exact)

    def viewed(self, value: Value, tensor: Tensor, result: Tensor) -> Value:
        """A tensor in another shape."""
        if isinstance(value, Held):
            places = tuple(reshaped(place, tensor.shape, result.shape) for place in value.places)
            return Held(value.name, value.sizes, places, value.exact)
        if value is None:
            return None
        found = reshaped(value, tensor.shape, result.shape)
        if 1 < len(varying(value)) > len(varying(found)) and int(value.max()) > int(self.pixels[-1]):
            self.square(value)
        return found

    def square(self, labels: Tensor) -> None:
        """Where axes of slots become one, only whole rows or whole columns can go: ties what is not tied so yet."""
        axes = varying(labels)
        rows = labels.movedim(axes, tuple(range(len(axes)))).reshape(labels.shape[axes[0]], -1)
        for axis in range(len(axes)):
            lines = labels.squeeze().movedim(axis, 0).flatten(1)
            root = connected(self.num_slots, self.same)[lines]
            if bool((root == root[:, :1]).all()):
                return
        shorter = min((0, 1), key=lambda axis: rows.shape[axis])
        rows = rows if shorter == 0 else rows.T
        self.tie(rows, rows[:1])

    def joined(self, tensors: Sequence[Tensor], dim: int, name: str, result: Tensor) -> Value:
        """Concatenated slots; where they lie along another axis, the pieces are of the same channels."""
        dim %= result.ndim
        pieces = []
        for tensor in tensors:
            if name == "stack":
                tensor = tensor.unsqueeze(dim)
            if tensor.numel() == 0:
                continue
            value = self.value_of(tensors[len(pieces)]) if name == "stack" else self.value_of(tensor)
            if isinstance(value, Held):
                value = self.activated(value)
            if value is None:
                value = torch.full((1,) * tensor.ndim, ANYTHING)
            elif name == "stack":
                value = value.unsqueeze(dim)
            pieces.append(value.expand(tensor.shape))
        found = compressed(torch.cat(pieces, dim))
        if found.shape[dim] > 1 and len(varying(found)) > 1:
            return self.merged(found, (dim,))
        return found

    def padded(self, value: Value, args: Any, result: Tensor) -> Value:
        """A tensor between constants; labels stay where slots lie along other axes."""
        if not isinstance(value, Tensor):
            return None
        filling = args[2] if len(args) > 2 else 0
        pairs = [args[1][index : index + 2] for index in range(0, len(args[1]), 2)]
        padded = [value.ndim - 1 - index for index, pair in enumerate(pairs) if any(pair)]
        if all(value.shape[axis] == 1 for axis in padded):
            return self.each(value, always=filling != 0, uneven=True)
        whole = value.expand(args[0].shape)
        return compressed(torch.constant_pad_nd(whole, args[1], NOTHING if filling == 0 else ANYTHING))

    def embedded(self, args: Any, result: Tensor) -> Value:
        """Rows of a table."""
        table = self.value_of(args[0])
        if not isinstance(table, Held) or len(table.sizes) != 2:
            return None
        rows = args[1].cpu().unsqueeze(-1)
        return Held(table.name, table.sizes, (rows, laid(result.ndim - 1, table.sizes[1], result.ndim)), table.exact)

    # --- entry by entry ----------------------------------------------------------------------------------------------

    def of_parameters(self, name: str, args: Any, result: Tensor) -> Value:
        """What is computed of parameters alone keeps its places where it is computed entry by entry of one."""
        held = [value for value in map(self.value_of, args) if isinstance(value, Held)]
        if len(held) != 1 or held[0] is not self.value_of(args[0]) or result.shape != args[0].shape:
            return None
        if name in KEEP_ZERO | FORGET_ZERO | SUMS | FACTORS | {"clamp", "clamp_min", "clamp_max", "pow"}:
            same = name in ("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh")
            return Held(held[0].name, held[0].sizes, held[0].places, held[0].exact and same)
        return None

    def elementwise(self, name: str, args: Any, kwargs: Any, result: Tensor) -> Value:
        """A function of one or two tensors, entry by entry."""
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        values = [self.value_of(tensor) for tensor in operands]
        labelled = [(v, t) for v, t in zip(values, operands) if isinstance(v, Tensor)]
        labels = wide(labelled[0][0], result.ndim)
        for other in (t for t in args if isinstance(t, Tensor) and not isinstance(self.value_of(t), (Tensor, Held))):
            labels = self.beside_constant(labels, other, name)
        if len(labelled) == 2:
            found = self.both(labels, wide(labelled[1][0], result.ndim), name == "mul")
            return found if name in SUMS | FACTORS else self.constant(found)
        held = [value for value in values if isinstance(value, Held)]
        if held:
            place = Held(
                held[0].name, held[0].sizes, tuple(wide(p, result.ndim) for p in held[0].places), held[0].exact
            )
            if name == "div" and values[0] is held[0]:
                return self.constant(self.scaled(labels, result.shape, belongs=place))
            kind = {"mul": "factor", "div": "belongs"}.get(name, "shift")
            found = self.scaled(labels, result.shape, **{kind: place})
            return found if name in SUMS | FACTORS else self.constant(found)
        first = isinstance(self.value_of(args[0]), Tensor)
        numbers = [
            arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, (int, float)) and not isinstance(arg, bool)
        ]
        if keeps_zero(name, first, args, kwargs, numbers):
            return labels
        return self.constant(labels)

    def chosen(self, name: str, args: Any, kwargs: Any, result: Tensor) -> Value:
        """Entries of one tensor or another, by a condition, which may depend on channels as well."""
        condition, *choices = args if name == "where" else (args[1], args[0], args[2])
        values = [self.value_of(choice) for choice in choices]
        if any(isinstance(value, Held) for value in values) or not isinstance(
            self.value_of(condition), (Tensor, type(None))
        ):
            return self.give_up(name, args, kwargs)
        labels = [wide(value, result.ndim) for value in values if isinstance(value, Tensor)]
        given = self.value_of(condition)
        if not labels:
            return self.constant(wide(given, result.ndim))
        found = self.both(*labels, False) if len(labels) == 2 else labels[0]
        for choice, value in zip(choices, values):
            if value is None and isinstance(choice, Tensor):
                self.beside_constant(found, choice, name)
            if value is None and _may_speak(choice):
                found = self.constant(found)
        if isinstance(given, Tensor):
            return self.listening(found, wide(given, result.ndim))
        return found if given is not None else self.beside_constant(found, condition, name)

    def listening(self, labels: Tensor, others: Tensor) -> Tensor:
        """Slots that depend on others, too, which do not decide whether they speak."""
        labels, others = torch.broadcast_tensors(labels, others)
        codes, inverse = (labels * self.num_slots + others).unique(return_inverse=True)
        ones, heard = codes // self.num_slots, codes % self.num_slots
        outs = self.new(len(codes))
        self.tie(outs, ones)
        self.tie(outs, heard)
        targets = torch.arange(len(outs))
        told = torch.arange(2 * len(outs)) < len(outs)
        self.nodes.append(Join(outs, torch.cat([ones, heard]), torch.cat([targets, targets]), told))
        return outs[inverse]

    def beside_constant(self, labels: Tensor, other: Tensor, name: str) -> Tensor:
        """Labels beside a constant tensor, which cannot be cut along the axes of slots."""
        shape = (1,) * (labels.ndim - other.ndim) + tuple(other.shape)
        if any(shape[axis] > 1 for axis in varying(labels)):
            self.freeze(labels, name)
        return self.each(labels, uneven=True) if max(shape, default=1) > 1 else labels

    def both(self, left: Tensor, right: Tensor, is_product: bool) -> Tensor:
        """The slots of a sum or a product of two; those that meet are tied."""
        left, right = torch.broadcast_tensors(left, right)
        if torch.equal(left, right):
            return left.clone()
        codes, inverse = (left * self.num_slots + right).unique(return_inverse=True)
        ones, others = codes // self.num_slots, codes % self.num_slots
        outs = self.new(len(codes))
        self.tie(ones, others)
        self.tie(outs, torch.where(ones > ANYTHING, ones, others))
        if is_product:
            self.nodes.append(Product(outs, ones, others))
        else:
            targets = torch.arange(len(outs))
            self.nodes.append(Join(outs, torch.cat([ones, others]), torch.cat([targets, targets])))
        return outs[inverse]

    def constant(self, labels: Tensor) -> Tensor:
        """Slots that speak whatever they are made of."""
        return self.each(labels, always=True)

    def each(self, labels: Tensor, always: bool = False, uneven: bool = False) -> Tensor:
        """A slot behind each slot."""
        slots, inverse = labels.unique(return_inverse=True)
        outs = self.new(len(slots))
        self.tie(outs, slots)
        self.nodes.append(Join(outs, slots, torch.arange(len(slots)), always=always, uneven=uneven))
        return outs[inverse]

    def scaled(
        self,
        labels: Tensor,
        shape: Sequence[int],
        factor: Held | None = None,
        shift: Held | None = None,
        offset: Held | None = None,
        belongs: Held | None = None,
        always: bool = False,
    ) -> Tensor:
        """Slots that a parameter scales or shifts, and the parameter's entries with them."""
        given = {"factor": factor, "shift": shift, "offset": offset, "belongs": belongs}
        axes = {key: self.beside(labels, held) for key, held in given.items() if held is not None}
        columns = [labels] + [held.places[axes[key]] for key, held in given.items() if axes.get(key) is not None]
        columns = torch.broadcast_tensors(*columns)
        codes = columns[0]
        for column in columns[1:]:
            codes = codes * (int(column.max()) + 1) + column
        codes, inverse = codes.unique(return_inverse=True)
        first = torch.zeros(len(codes), dtype=torch.long)
        first[inverse.flatten()] = torch.arange(inverse.numel())
        ins = columns[0].flatten()[first]
        outs = self.new(len(codes))
        self.tie(outs, ins)
        entries: dict[str, Entry] = {}
        uneven = any(held is not None and sum(map(is_long, held.places)) > 1 for held in given.values())
        loud = always
        place = 1
        for key, held in given.items():
            if held is None:
                continue
            if axes[key] is None:
                loud = loud or key in ("shift", "offset")
                continue
            entry = Entry(held.name, axes[key], columns[place].flatten()[first], held.sizes[axes[key]])
            place += 1
            self.link(entry, outs, "writes" if key == "shift" and factor is None and not always else "scales")
            if held.exact:
                entries[key] = entry
            else:
                loud = loud or key in ("shift", "offset")
        self.nodes.append(Scale(ins, outs, always=loud, uneven=uneven, **entries))
        return outs[inverse]

    def beside(self, labels: Tensor, held: Held) -> int | None:
        """The axis of a parameter whose entries each lie beside the slots of one unit; None: it has none."""
        along = [axis for axis, size in enumerate(held.sizes) if size > 1 and held.places[axis].numel() > 1]
        crossing = []
        for axis in along:
            place = held.places[axis]
            if not set(varying(place)) & set(varying(labels)):
                continue
            pairs = torch.broadcast_tensors(labels, place)
            codes = (pairs[1] * self.num_slots + pairs[0]).unique()
            if len(codes) == len((codes // self.num_slots).unique()):
                return axis
            crossing.append(axis)
        if len(crossing) == 1 and len(varying(labels)) > 1:
            place, labels = torch.broadcast_tensors(held.places[crossing[0]], labels)
            first = torch.zeros(held.sizes[crossing[0]], dtype=torch.long)
            first[place.flatten()] = labels.flatten()
            self.tie(first[place], labels)
            return crossing[0]
        if crossing:
            self.freeze(labels, held.name)
        return None

    def activated(self, held: Held) -> Tensor:
        """A parameter that stands in the place of an activation, such as a class token: its entries are slots."""
        along = [axis for axis, size in enumerate(held.sizes) if size > 1 and held.places[axis].numel() > 1]
        if not along:
            return torch.full((1,) * (held.places[0].ndim if held.places else 0), ANYTHING)
        place = held.places[along[-1]]
        labels = torch.full((1,) * place.ndim, NOTHING)
        index, inverse = place.unique(return_inverse=True)
        outs = self.new(len(index))
        entry = Entry(held.name, along[-1], index, held.sizes[along[-1]])
        self.link(entry, outs, "writes")
        self.nodes.append(
            Scale(torch.full_like(outs, NOTHING), outs, shift=entry if held.exact else None, always=not held.exact)
        )
        return outs[inverse].expand(torch.broadcast_shapes(labels.shape, place.shape))

    # --- along axes --------------------------------------------------------------------------------------------------

    def merged(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """Labels of length 1 along axes: the slots there are of one channel, and are tied."""
        axes = [axis for axis in axes if labels.shape[axis] > 1]
        if not axes:
            return labels
        moved = labels.movedim(axes, list(range(-len(axes), 0)))
        rows = moved.flatten(-len(axes))
        shape, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
        own, alike = alike_rows(rows)
        rows = rows[own]
        outs = self.new(len(rows))
        targets = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
        pairs = torch.stack([targets.flatten(), rows.flatten()], 1).unique(dim=0)
        self.tie(outs[pairs[:, 0]], pairs[:, 1])
        self.nodes.append(Join(outs, pairs[:, 1], pairs[:, 0], uneven=True))  # each is of its own places
        found = outs[alike].view(shape)
        for axis in sorted(axes):
            found = found.unsqueeze(axis)
        return found

    def mixed(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """Labels along whose axes every entry depends on all: tied where others are apart."""
        axes = tuple(axis for axis in axes if labels.shape[axis] > 1)
        if axes and len(varying(labels)) > len(axes):
            return self.merged(labels, axes)
        return labels

    def mix(self, labels: Tensor, outs: Tensor) -> Tensor:
        """Slots that depend on all of some, which stay together as long as any of these is heard."""
        self.nodes.append(Mix(labels.unique(), outs.unique()))
        return outs

    def accumulated(self, labels: Tensor, axis: int) -> Tensor:
        """A softmax, or a running sum, along an axis."""
        labels = self.mixed(labels, (axis,))
        return self.mix(labels, self.constant(labels)) if labels.shape[axis] > 1 else self.constant(labels)

    def reduced(self, name: str, labels: Tensor, args: Any, kwargs: Any, results: list[Tensor]) -> Any:
        """A mean, a sum or the like along some axes, or along all."""
        tensor, result = args[0], results[0]
        dims = kwargs.get("dim", None)
        if name in ("linalg_vector_norm", "norm"):
            dims = args[2] if len(args) > 2 else dims
        elif len(args) > 1 and not isinstance(args[1], (bool, torch.dtype)):
            dims = args[1]
        if dims is None or dims == []:
            dims = range(tensor.ndim)
        dims = [dims] if isinstance(dims, int) else list(dims)
        axes = sorted({dim % tensor.ndim for dim in dims})
        labels = self.mixed(labels, axes)
        if any(labels.shape[axis] > 1 for axis in axes):  # what is left is of no channel
            return self.pin(labels)
        if result.ndim < tensor.ndim:
            for axis in reversed(axes):
                labels = labels.squeeze(axis)
        labels = self.constant(labels) if name == "logsumexp" else labels
        return [labels] + [None] * (len(results) - 1)

    def pooled(self, name: str, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        """A function of the positions around each, of as many axes as its name says."""
        digits = [int(before) for before, after in pairwise(name) if before.isdigit() and after == "d"]
        count = digits[-1] if digits else 2
        axes = range(labels.ndim - count, labels.ndim)
        if "avg_pool" in name and len(args) > 3 and any(args[3]):  # zeros beside the edges are averaged in
            labels = self.each(labels, uneven=True)
        return [self.merged(labels, axes)] + [None] * (len(results) - 1)

    def batch_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        """Each channel by its own mean and variance."""
        labels = self.merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        held = [self.value_of(arg) if isinstance(arg, Tensor) else None for arg in args[1:4]]
        names = ("factor", "shift", "offset")
        parts = {
            name: self.on_axis(value, 1, labels.ndim) for name, value in zip(names, held) if isinstance(value, Held)
        }
        variance = self.value_of(args[4]) if len(args) > 4 and isinstance(args[4], Tensor) else None
        if isinstance(variance, Held):
            parts["belongs"] = self.on_axis(variance, 1, labels.ndim)
        found = self.scaled(labels, results[0].shape, **parts)
        return [found] + [None] * (len(results) - 1)

    def on_axis(self, held: Held, axis: int, ndim: int) -> Held:
        """A vector laid along an axis."""
        shape = [-1 if each == axis else 1 for each in range(ndim)]
        return Held(held.name, held.sizes, tuple(place.view(shape) for place in held.places), held.exact)

    def layer_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        """Entries by the mean and variance of all along the last axes."""
        tensor, count = args[0], len(args[1])
        axes = range(tensor.ndim - count, tensor.ndim)
        spread = any(labels.shape[axis] > 1 for axis in axes)
        labels = self.mixed(labels, axes)
        if not spread or all(labels.shape[axis] == 1 for axis in axes):
            return [self.constant(labels)] + [None] * (len(results) - 1)
        parts = {}
        for key, arg in zip(("factor", "shift"), args[2:4]):
            value = self.value_of(arg) if isinstance(arg, Tensor) else None
            if isinstance(value, Held):
                places = tuple(wide(place, tensor.ndim) for place in value.places)
                parts[key] = Held(value.name, value.sizes, places, value.exact)
        found = self.mix(labels, self.scaled(labels, tensor.shape, always=True, **parts))
        return [found] + [None] * (len(results) - 1)

    def group_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        """Each group of channels by its own mean and variance."""
        tensor, groups = args[0], args[6]
        labels = self.merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        parts = {}
        for key, arg in zip(("factor", "shift"), args[1:3]):
            value = self.value_of(arg) if isinstance(arg, Tensor) else None
            if isinstance(value, Held):
                parts[key] = self.on_axis(value, 1, tensor.ndim)
        alone = groups == tensor.shape[1]
        found = self.scaled(labels, tensor.shape, always=not alone, **parts)
        return [found if alone else self.mix(labels, found)] + [None] * (len(results) - 1)


def is_long(place: Tensor) -> bool:
    """Whether places differ."""
    return place.numel() > 1


def _may_speak(choice: Any) -> bool:
    """Whether a number or a constant tensor is other than 0."""
    return bool((choice != 0).any()) if isinstance(choice, Tensor) else choice != 0
