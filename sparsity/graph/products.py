"""What layers and products of activations do: convolutions, products of matrices, and attention."""

from typing import Any

import torch
from torch import Tensor

from sparsity.graph.channels import Channels
from sparsity.graph.slots import Held, Value, alike_rows, compressed, matrix_axes, squeezed, wide
from sparsity.graph.units import ANYTHING, NOTHING, Entry, Join, LayerUse, Matmul


class Products(Channels):
    """Functions that make channels of others."""

    def convolution(self, args: Any, result: Tensor) -> Value:
        """A convolution as a layer."""
        tensor, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        held, labels = self.value_of(weight), self.value_of(tensor)
        positions = (tensor if transposed else result).shape[2:].numel() * len(tensor)
        size = weight.shape[2:].numel() * positions
        if isinstance(labels, Held):
            labels = self.activated(labels)
        if not isinstance(held, Held) or not held.exact or len(held.sizes) != weight.ndim:
            if isinstance(labels, Tensor):
                self.freeze(labels, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), weight.numel() * positions))
            return None
        labels = torch.full((1,) * tensor.ndim, ANYTHING) if labels is None else labels
        labels = self.merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        ins = labels.expand(1, tensor.shape[1], *[1] * (tensor.ndim - 2)).flatten()
        outs = self.new(result.shape[1])
        rows, columns = (int(transposed), int(not transposed))
        entries = [Entry(held.name, axis, torch.arange(held.sizes[axis]), held.sizes[axis]) for axis in (rows, columns)]
        shift = self.shift(bias, outs)
        uneven = transposed or any(args[4])
        self.nodes.append(LayerUse(held.name, *entries, ins, outs, shift, groups, size, uneven=uneven))
        self.link_layer(self.nodes[-1])
        return outs.view(1, -1, *[1] * (result.ndim - 2))

    def shift(self, bias: Any, outs: Tensor) -> Entry | None:
        """The bias of a layer's outputs."""
        held = self.value_of(bias) if isinstance(bias, Tensor) else None
        if not isinstance(held, Held):
            return None
        axis = next((a for a, place in enumerate(held.places) if place.numel() == len(outs)), None)
        if axis is None or not held.exact:
            return None
        return Entry(held.name, axis, held.places[axis].flatten(), held.sizes[axis])

    def link_layer(self, layer: LayerUse) -> None:
        """What belongs to the slots of a layer; of a grouped convolution whole groups are tied."""
        if layer.groups == 1:
            self.link(layer.rows, layer.outs, "writes")
            self.link(layer.columns, layer.ins, "reads")
        else:
            whole, slots = (layer.rows, layer.outs) if layer.rows.axis == 0 else (layer.columns, layer.ins)
            self.link(whole, slots, "scales" if layer.is_depthwise else "writes")
            ins, outs = layer.ins.view(layer.groups, -1), layer.outs.view(layer.groups, -1)
            self.tie(ins, ins[:, :1])
            self.tie(outs, ins[:, :1])
        if layer.bias is not None:
            self.link(layer.bias, layer.outs, "scales" if layer.is_depthwise else "writes")

    def multiplied(self, name: str, args: Any, result: Tensor) -> Value:
        """A product of matrices: a layer where one of them is a parameter."""
        added, (left, right) = (None, args[:2]) if name in ("mm", "bmm") else (args[0], args[1:3])
        if name == "bmm" or name == "baddbmm":
            found = self.batch_multiplied(left, right, result)
        else:
            found = self.layer(left, right, added, result)
            if found is not NotImplemented:
                return found
            found = self.batch_multiplied(
                left.unsqueeze(0), right.unsqueeze(0), result.unsqueeze(0), self.value_of(left), self.value_of(right)
            )
            found = found.squeeze(0) if isinstance(found, Tensor) else found
        if added is not None and isinstance(found, Tensor):
            value = self.value_of(added)
            if isinstance(value, Held):
                places = tuple(wide(place, result.ndim) for place in value.places)
                return self.scaled(found, result.shape, shift=Held(value.name, value.sizes, places, value.exact))
            if isinstance(value, Tensor):
                return self.both(found, wide(value, result.ndim), False)
            return self.constant(self.beside_constant(found, added, name))
        return found

    def layer(self, left: Tensor, right: Tensor, added: Any, result: Tensor) -> Any:
        """left · right + added, of matrices, as a layer; NotImplemented where neither or both are parameters."""
        one, other = self.value_of(left), self.value_of(right)
        if isinstance(one, Held) and isinstance(other, Held):  # of the two a buffer, such as a table of positions,
            if one.name in self.buffers and other.name not in self.buffers:  # stands in the place of an activation
                one = self.activated(one)
            elif other.name in self.buffers and one.name not in self.buffers:
                other = self.activated(other)
        if isinstance(one, Held) == isinstance(other, Held):
            return NotImplemented
        if isinstance(one, Held):  # the same, transposed
            one, other = other, Held(one.name, one.sizes, tuple(p.T for p in one.places), one.exact)
            labels = one if one is None else one.T
            (count, num_ins), num_outs, swapped = right.T.shape, left.shape[0], True
        else:
            labels, (count, num_ins), num_outs, swapped = one, left.shape, right.shape[1], False
        axes = matrix_axes(other, num_ins, num_outs)
        if axes is None or not other.exact:
            if isinstance(labels, Tensor):
                self.freeze(labels, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), count * num_ins * num_outs))
            return None
        labels = torch.full((1, 1), ANYTHING) if labels is None else labels
        repeats = None
        if labels.shape[0] > 1 and labels.shape[1] == 1:  # the product is along another axis than that of the channels
            return self.along_positions(labels, other, axes, (count, num_ins, num_outs), added, swapped)
        ins = self.merged(labels, (0,)).expand(1, num_ins).flatten()
        outs = self.new(num_outs)
        column, row = axes
        entries = [
            Entry(other.name, axis, other.places[axis].flatten().expand(length), other.sizes[axis])
            for axis, length in ((row, num_outs), (column, num_ins))
        ]
        bias = self.shift(added, outs)
        self.nodes.append(LayerUse(other.name, *entries, ins, outs, bias, 1, count, repeats))
        self.link_layer(self.nodes[-1])
        found = outs.view(1, -1)
        if added is not None and bias is None:
            value = self.value_of(added)
            found = self.both(found, wide(value, 2), False) if isinstance(value, Tensor) else self.constant(found)
        return found.T if swapped else found

    def along_positions(
        self, labels: Tensor, held: Held, axes: tuple[int, int], sizes: tuple[int, int, int], added: Any, swapped: bool
    ) -> Tensor:
        """A product over positions, channel by channel, such as of a mixer's tokens: its cost goes with channels."""
        _, num_ins, num_outs = sizes
        column, row = axes
        anything = torch.tensor([ANYTHING])
        entries = [
            Entry(held.name, axis, held.places[axis].flatten().expand(length), held.sizes[axis])
            for axis, length in ((row, num_outs), (column, num_ins))
        ]
        slots = labels.flatten()
        # positions are no units: the layer's own ins and outs are never removed, its repeats are
        self.nodes.append(
            LayerUse(held.name, *entries, anything.expand(num_ins), self.unheard(num_outs), None, 1, 1, slots)
        )
        found = self.each(labels, always=added is not None, uneven=True)
        return found.T if swapped else found

    def unheard(self, count: int) -> Tensor:
        """Slots of positions, which are heard and of no unit that could go."""
        slots = self.new(count)
        self.pin(slots)
        return slots

    def batch_multiplied(self, left: Tensor, right: Tensor, result: Tensor, *values: Value) -> Value:
        """left [n, m, k] · right [n, k, p]: the slots of one n are tied, such as a head's queries, keys and values."""
        one, other = values or (self.value_of(left), self.value_of(right))
        count, _, inner = left.shape
        if isinstance(one, Held) or isinstance(other, Held):
            if count == 1:
                flat = [squeezed(value) for value in (one, other)]
                found = self.flat_layer(left[0], right[0], flat, result[0])
                if found is not NotImplemented:
                    return found.unsqueeze(0) if isinstance(found, Tensor) else found
            one, other = (None if isinstance(value, Held) else value for value in (one, other))
            if isinstance(one, Tensor) or isinstance(other, Tensor):
                self.freeze(one if isinstance(one, Tensor) else other, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        if one is None or other is None:
            for value in (one, other):
                if isinstance(value, Tensor):
                    self.freeze(value, "a product with a constant")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        blocks = max(one.shape[0], other.shape[0])
        one = one.expand(blocks, *one.shape[1:])
        other = other.expand(blocks, *other.shape[1:])
        own, alike = alike_rows(torch.cat([one.flatten(1), other.flatten(1)], 1))
        one, other = one[own], other[own]
        is_wide, is_tall = other.shape[2] > 1, one.shape[1] > 1
        if is_wide and is_tall:
            self.freeze(one, "a product of channels with channels")
            self.freeze(other, "a product of channels with channels")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        together = torch.cat([one.flatten(1), other.flatten(1)], 1)
        self.tie(together, together[:, :1])
        telling = (one if is_tall else other).movedim(1 if is_tall else 2, 1)  # [n, outs, sources]
        outs = self.new(telling.shape[0] * telling.shape[1]).view(telling.shape[:2])
        self.heads(outs, telling, (other if is_tall else one).flatten(1))
        size = result.numel() * inner // blocks
        self.matmuls.append(Matmul(together[alike, 0], size))
        outs = outs[alike]
        return compressed(outs.unsqueeze(2) if is_tall else outs.unsqueeze(1))

    def flat_layer(self, left: Tensor, right: Tensor, values: list[Value], result: Tensor) -> Any:
        """A layer of matrices whose values are given, as they are of slices."""
        for tensor, value in zip((left, right), values):
            self.put(tensor, value)
        return self.layer(left, right, None, result)

    def heads(self, outs: Tensor, telling: Tensor, listening: Tensor) -> None:
        """outs [n, outs] made of telling [n, outs, sources], and of listening [n, sources], which never silences."""
        number = torch.arange(outs.numel()).view_as(outs)
        targets = [number.unsqueeze(2).expand_as(telling).flatten()]
        targets.append(number.unsqueeze(2).expand(*outs.shape, listening.shape[1]).flatten())
        sources = [telling.flatten(), listening.unsqueeze(1).expand(*outs.shape, listening.shape[1]).flatten()]
        pairs = torch.cat([torch.stack([torch.cat(sources), torch.cat(targets)])])
        told = torch.arange(pairs.shape[1]) < telling.numel()
        self.tie(outs, listening[:, :1])
        self.nodes.append(Join(outs.flatten(), pairs[0], pairs[1], told))

    def attention(self, args: Any, result: Tensor) -> Value:
        """softmax(queries · keys) · values of [batch, heads, positions, depth]: a head is tied whole."""
        queries, keys, values = args[:3]
        batch, heads, rows, depth = queries.shape
        length, breadth = values.shape[2:]
        size = rows * length * (depth + breadth)
        labels = [self.value_of(tensor) for tensor in (queries, keys, values)]
        if not all(isinstance(each, Tensor) for each in labels):
            for each in labels:
                if isinstance(each, Tensor):
                    self.freeze(each, "attention")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), batch * heads * size))
            return None
        flat = []
        for each, tensor in zip(labels, (queries, keys, values)):
            each = each.expand(batch if each.shape[0] > 1 else 1, tensor.shape[1], *each.shape[2:])
            flat.append(each.repeat_interleave(heads // tensor.shape[1], 1))  # grouped queries share keys and values
        blocks = max(each.shape[0] for each in flat)
        flat = [each.expand(blocks, *each.shape[1:]).flatten(0, 1) for each in flat]
        together = torch.cat([each.flatten(1) for each in flat], 1)
        own, alike = alike_rows(together)
        together, flat = together[own], [each[own] for each in flat]
        self.tie(together, together[:, :1])
        telling = flat[2].transpose(1, 2)
        outs = self.new(telling.shape[0] * telling.shape[1]).view(telling.shape[:2])
        self.heads(outs, telling, torch.cat([each.flatten(1) for each in flat[:2]], 1))
        self.matmuls.append(Matmul(together[alike, 0], size * batch // blocks))
        return compressed(outs[alike].view(blocks, heads, 1, -1))
