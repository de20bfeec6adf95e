"""The smaller program that computes what a pruned network computes: units that nothing depends on are cut out."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsity.artifact.program import LEAVES, Network, Program, leaves
from sparsity.graph.functions import FACTORS, FORGET_ZERO, KEEP_ZERO, MATRIX_PRODUCTS, MOVES, OF_ENTRIES, SUMS
from sparsity.graph.slots import Held, varying
from sparsity.graph.tape import BATCH, Batch, Call, Named, Ref, Tape, tape
from sparsity.graph.units import Facts
from sparsity.tensors import Tensors, nonzero

Axes = dict[int, Tensor]  # axis of a tensor → the places kept along it, ascending
BROADCAST = KEEP_ZERO | FORGET_ZERO | SUMS | FACTORS | OF_ENTRIES
UNMOVED = frozenset(("transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "reshape", "clone", "movedim"))


class StuckError(Exception):
    """Units that a function does not let go, and why."""

    def __init__(self, slots: Tensor, reason: str):
        super().__init__(reason)
        self.slots = slots


@dataclass(frozen=True)
class Place:
    """Where a tensor of the smaller network lies in one of the whole network."""

    name: str
    kept: Axes


@dataclass(frozen=True)
class Cut:
    """A network as a program, without what is dead in it."""

    program: Program
    whole: Program  # the network as it was, but for constants that a bias holds now as well
    places: dict[str, Place]  # of the program's tensors in those of the whole network
    stays: dict[str, int]  # why dead units stay, and how many of them

    def dense(self) -> Program:
        """The program in the network's first shape, with zeros for what went."""
        like = {name: (tensor.shape, tensor.dtype) for name, tensor in self.whole.tensors.items()}
        tensors = filled(self.program.tensors, self.places, empty(like, self.whole.calls))
        return Program(self.whole.calls, tensors, self.whole.output)


def empty(like: Mapping[str, tuple[Sequence[int], torch.dtype]], calls: Iterable[Call]) -> Tensors:
    """Tensors of shapes and dtypes, of zeros; of ones where calls divide by them, as 0 / 0 is no number."""
    divisors = {call.args[1].name for call in calls if call.name == "div" and isinstance(call.args[1], Named)}
    return {  # zeros take no memory until they are written
        name: (torch.ones if name in divisors else torch.zeros)(tuple(shape), dtype=dtype)
        for name, (shape, dtype) in like.items()
    }


def filled(tensors: Tensors, places: Mapping[str, Place], empty: Tensors) -> Tensors:
    """Tensors of the whole network, given as they are without the smaller one's, with those where they belong."""
    found = dict(empty)
    for name, place in sorted(places.items(), key=lambda item: not item[1].kept):  # what is whole comes last
        if place.name not in empty:
            continue
        if not place.kept:
            found[place.name] = tensors[name]
            continue
        every = [place.kept.get(axis, torch.arange(size)) for axis, size in enumerate(empty[place.name].shape)]
        found[place.name][torch.meshgrid(*every, indexing="ij")] = tensors[name].detach()
    return found


def cut(module: nn.Module, image: Tensor, facts: Facts | None = None) -> Cut:
    """A module in evaluation as a program without its dead units, of images like one, [1, *shape].

    A unit goes where nothing that is heard depends on it, or where all that it gives is a constant, which is folded
    into the bias of the linear layers and unpadded convolutions that read it. What a function does not let go stays,
    and `stays` says why. Raises UnrecordableError where the module says too little of itself.
    """
    found = tape(module, image)
    program = Program.of(found)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    facts = facts or Facts({name: tensor.detach() for name, tensor in tensors.items()})
    kept = found.units.kept(facts)
    folded = found.units.speaking(facts)
    stays: dict[str, int] = {}
    while True:
        try:
            return _Cutter(found, program, kept, folded, image).cut(stays)
        except StuckError as stuck:
            units = found.units.of[stuck.slots]
            back = torch.zeros_like(kept)
            back[units] = True
            back &= ~kept
            assert back.any(), f"nothing to keep: {stuck}"
            stays[str(stuck)] = stays.get(str(stuck), 0) + int(back.sum())
            kept = found.units.with_mixed(kept | back)


class _Cutter:
    """Goes through the calls and writes those of the smaller network."""

    def __init__(self, found: Tape, program: Program, kept: Tensor, speaks: Tensor, image: Tensor):
        self.tape, self.program, self.units = found, program, found.units
        self.kept, self.speaks, self.image = kept, speaks, image
        self.links = found.units.along(kept)
        self.calls: list[Call] = []
        self.whole: list[Call] = []  # the same of the whole network
        self.tensors: Tensors = {}
        self.places: dict[str, Place] = {}
        self.axes: dict[int, Axes] = {0: {}}  # what is kept of each tensor as it is computed
        self.raw = {0}  # tensors that still hold all pixels
        self.gone: set[int] = set()  # tensors of which nothing is kept
        self.next = max(found.shapes) + 1
        self.given: dict[int, Tensor] | None = None
        self.aligned: dict[Any, Ref] = {}
        named = (leaf.name for call in program.calls for leaf in leaves(call) if isinstance(leaf, Named))
        self.reads = Counter(named)

    def cut(self, stays: dict[str, int]) -> Cut:
        """The smaller program."""
        for call in self.program.calls:
            self.whole.append(call)
            self._cut(call)
        output = self._aligned(self.program.output, {})
        program = Program(self.calls, self.tensors, output).pruned()
        whole = Program(self.whole, self.program.tensors, self.program.output).pruned()
        places = {name: self.places[name] for name in program.tensors if name in self.places}
        return Cut(program, whole, places, stays)

    # --- what is kept ----------------------------------------------------------------------------------------------

    def _axes(self, value: Any, ndim: int) -> Axes:
        """What is kept of a tensor along each axis; StuckError where that is no product of axes."""
        if isinstance(value, Held):
            found: Axes = {}
            for axis, place in enumerate(value.places):
                if (value.name, axis) in self.links:
                    for each, index in self._product(self.links[value.name, axis][place], value).items():
                        found[each] = index if each not in found else found[each][torch.isin(found[each], index)]
            return found
        return self._product(self.kept[self.units.of[value]], value) if isinstance(value, Tensor) else {}

    def _product(self, mask: Tensor, value: Any) -> Axes:
        """The places along each axis that a mask is the product of, of the axes where it is not whole."""
        if bool(mask.all()):
            return {}
        if mask.numel() == 1:
            return {-1: torch.zeros(0, dtype=torch.long)}  # all of it goes
        found, product = {}, torch.ones((), dtype=torch.bool)
        for axis in varying(mask):
            along = mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1)
            product = product & along.view([-1 if each == axis else 1 for each in range(mask.ndim)])
            if not along.all():
                found[axis] = along.nonzero().flatten()
        if not torch.equal(product.expand_as(mask), mask):
            raise StuckError(self._lost(value), "they are no whole rows")
        return found

    def _lost(self, value: Any) -> Tensor:
        """The slots of a tensor that go."""
        if isinstance(value, Held):
            units = torch.cat([link.units for link in self.units.links if link.name == value.name])
            return torch.isin(self.units.of, units[~self.kept[units]]).nonzero().flatten()
        return value[~self.kept[self.units.of[value]]].unique()

    def _stuck(self, leaf: Ref, reason: str) -> StuckError:
        """That what goes of a tensor must stay."""
        return StuckError(self._lost(self._value(leaf.number)), reason)

    def _value(self, number: int) -> Any:
        return self.tape.values.get(number) if number else self.units.inputs

    # --- calls -------------------------------------------------------------------------------------------------------

    def _cut(self, call: Call) -> None:
        """Writes a call of the smaller network, unless nothing is left of what it gives."""
        out = call.outs[0]
        wants = {number: self._wanted(number) for number in call.outs if number is not None}
        if all(self._is_none(want) for want in wants.values()):
            self.gone.update(wants)
            return
        want = wants.get(out, {})
        inputs = [leaf for leaf in leaves(call) if isinstance(leaf, Ref)]
        if any(leaf.number in self.raw for leaf in inputs) and self._passes_raw(call, inputs):
            return
        name = call.name
        if name == "linear":
            self._layer(call, want)
        elif name == "convolution":
            self._convolution(call, want)
        elif name == "cat":
            self._cat(call, want)
        elif name in BROADCAST or name in ("where", "masked_fill"):
            self._write(call, lambda leaf: self._broadcast(leaf, want, out), wants)
        elif name == "batch_norm":
            self._write(call, lambda leaf: self._beside(leaf, want, 1), wants)
        elif name == "group_norm":
            self._group_norm(call, want, wants)
        elif name in ("slice", "select", "split", "split_with_sizes", "unbind", "index_select", "flip", "roll"):
            self._moved(call, wants)
        else:
            if name in MATRIX_PRODUCTS:
                self._check_product(call)
            self._write(call, self._own, wants, sized=name in ("reshape", "expand") and out is not None)

    def _ndim(self, number: int) -> int:
        return len(self.tape.shapes[number])

    def _wanted(self, number: int) -> Axes:
        return self._axes(self.tape.values.get(number), self._ndim(number))

    def _is_none(self, axes: Axes) -> bool:
        return any(len(index) == 0 for index in axes.values())

    def _write(self, call: Call, given: Callable[[Any], Any], wants: Mapping[int, Axes], sized: bool = False) -> None:
        """Writes a call with what it is given as it is needed, and with the sizes of what is left."""
        for leaf in leaves(call):
            if isinstance(leaf, Ref) and leaf.number in self.gone:
                raise self._stuck(leaf, f"{call.name} reads them")

        def resolved(leaf: Any) -> Any:
            return given(leaf) if isinstance(leaf, (Ref, Named)) else leaf

        args, kwargs = tree_map(resolved, (call.args, call.kwargs), is_leaf=lambda leaf: isinstance(leaf, LEAVES))
        if sized:
            args = (args[0], self._sizes(call.outs[0], wants[call.outs[0]]))
        self.calls.append(replace(call, args=args, kwargs=kwargs))
        self.axes.update(wants)

    def _sizes(self, number: int, want: Axes) -> list[int | Batch]:
        """The sizes of a tensor with what is kept of it."""
        sizes = list(self.tape.shapes[number])
        for axis, index in want.items():
            if isinstance(sizes[axis], Batch):
                if len(index) % BATCH:
                    raise self._stuck(Ref(number), "images share an axis with them")
                sizes[axis] = Batch(len(index) // BATCH)
            else:
                sizes[axis] = len(index)
        return sizes

    def _own(self, leaf: Ref | Named) -> Any:
        """A tensor without what goes of it by itself."""
        if isinstance(leaf, Ref):
            return self._aligned(leaf, self._wanted(leaf.number) if leaf.number else {})
        value, tensor = self.tape.values.get(leaf.name), self.program.tensors[leaf.name]
        return self._constant(leaf, self._axes(value, tensor.ndim) if isinstance(value, Held) else {})

    def _broadcast(self, leaf: Ref | Named, want: Axes, out: int) -> Any:
        """A tensor as it lies beside a result of which some is kept."""
        ndim = self._ndim(leaf.number) if isinstance(leaf, Ref) else self.program.tensors[leaf.name].ndim
        sizes = self.tape.shapes[leaf.number] if isinstance(leaf, Ref) else self.program.tensors[leaf.name].shape
        shift = self._ndim(out) - ndim
        axes = {axis - shift: index for axis, index in want.items() if axis >= shift and sizes[axis - shift] != 1}
        return self._aligned(leaf, axes) if isinstance(leaf, Ref) else self._constant(leaf, axes)

    def _beside(self, leaf: Ref | Named, want: Axes, axis: int) -> Any:
        """The input of a normalisation, or one of its vectors."""
        if isinstance(leaf, Ref):
            return self._aligned(leaf, want)
        return self._constant(leaf, {0: want[axis]} if axis in want else {})

    def _aligned(self, leaf: Ref, want: Axes) -> Ref:
        """A tensor of which just what is wanted is kept: gathered where more is."""
        if leaf.number in self.gone:
            raise self._stuck(leaf, "something reads them")
        found = leaf
        for axis in sorted({*want, *self.axes[leaf.number]}):
            there, wanted = self.axes[leaf.number].get(axis), want.get(axis)
            if wanted is None:
                raise self._stuck(leaf, "something reads all of them")
            if there is not None and torch.equal(there, wanted):
                continue
            size = self.tape.shapes[leaf.number][axis]
            if isinstance(size, Batch):
                raise self._stuck(leaf, "images share an axis with them")
            place = torch.full((size,), -1)
            place[there if there is not None else slice(None)] = torch.arange(len(there) if there is not None else size)
            index = place[wanted]
            if bool((index < 0).any()):
                raise self._stuck(leaf, "something reads more of them")
            found = self._gathered(found, axis, index)
        return found

    def _gathered(self, leaf: Ref, axis: int, index: Tensor) -> Ref:
        """Some entries of a tensor along an axis: a slice where they lie together."""
        key = leaf, axis, tuple(index.tolist())
        if key not in self.aligned:
            number, self.next = self.next, self.next + 1
            if len(index) and torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index))):
                args: tuple[Any, ...] = (leaf, axis, int(index[0]), int(index[-1]) + 1)
                self.calls.append(Call("slice.Tensor", args, {}, (number,)))
            else:
                name = f"index{len(self.tensors)}"
                self.tensors[name] = index
                self.calls.append(Call("gather", (leaf, axis, Named(name)), {}, (number,)))
            self.aligned[key] = Ref(number)
        return self.aligned[key]

    def _constant(self, leaf: Named, axes: Axes) -> Named:
        """A constant without what goes."""
        name, tensor = leaf.name, self.program.tensors[leaf.name].detach()
        while name in self.places and not _same(self.places[name].kept, axes):  # it is read in several ways
            name += "'"
        for axis, index in axes.items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        own = tensor.contiguous() if axes else tensor.clone(memory_format=torch.contiguous_format)
        self.tensors[name], self.places[name] = own, Place(leaf.name, axes)
        return Named(name)

    # --- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, call: Call, want: Axes) -> None:
        """A linear layer: the inputs that are kept, and what the others give in the bias."""
        images, weight, bias = call.args[:3]
        if not isinstance(images, Ref) or not isinstance(weight, Named):
            return self._write(call, self._own, {call.outs[0]: want})
        value, matrix = self.tape.values.get(weight.name), self.program.tensors[weight.name]
        axes = self._axes(value, 2) if isinstance(value, Held) else {}
        last, width = self._ndim(images.number) - 1, self._ndim(call.outs[0]) - 1
        others = {axis: index for axis, index in want.items() if axis != width}  # along positions
        columns = axes.get(1, axes.get(-1))  # of one input alone it is all that goes
        shift = self._shift(call, images, last, columns, axes.get(0), bias, matrix)
        if columns is not None and not len(columns):
            return self._constant_layer(call, want, shift)
        given = self._aligned(images, {**others, **({last: columns} if columns is not None else {})})
        self.calls.append(replace(call, args=(given, self._constant(weight, axes), shift)))
        self.axes[call.outs[0]] = want
        return None

    def _convolution(self, call: Call, want: Axes) -> None:
        images, weight, bias, *how = call.args
        kernel = self.program.tensors[weight.name]
        value = self.tape.values.get(weight.name)
        axes = self._axes(value, kernel.ndim) if isinstance(value, Held) else {}
        groups, transposed = how[5], how[3]
        outs = want.get(1)
        if groups == 1:
            columns = axes.get(0 if transposed else 1, axes.get(-1))
            shift = self._shift(call, images, 1, columns, outs, bias, kernel)
            if columns is not None and not len(columns):
                return self._constant_layer(call, want, shift)
        else:
            columns = None
            if 0 in axes:  # whole groups go
                left = (axes[0] * groups // len(kernel)).unique()
                columns = torch.arange(self.tape.shapes[images.number][1]).view(groups, -1)[left].flatten()
                groups = len(left)
            shift = None if bias is None else self._constant(bias, {0: outs} if outs is not None else {})
        given = self._aligned(images, {1: columns} if columns is not None else {})
        how = [*how[:5], groups]
        self.calls.append(replace(call, args=(given, self._constant(weight, axes), shift, *how)))
        self.axes[call.outs[0]] = want
        return None

    def _shift(
        self, call: Call, images: Ref, axis: int, columns: Tensor | None, rows: Tensor | None, bias: Any, weight: Tensor
    ) -> Named | None:
        """The bias of a layer, with the constants that inputs gave which are gone; None: there is none."""
        shift = self.program.tensors[bias.name].detach() if bias is not None else None
        lost = self._given_by_lost(call, images, axis, columns, rows, weight)
        if lost is not None:
            whole = lost.double() + (0 if shift is None else shift.double())
            self.program = replace(self.program, tensors=dict(self.program.tensors))
            name = f"{call.args[1].name}.folded" if bias is None else bias.name
            if bias is not None and self.reads[name] > 1:
                name = f"{name}.{call.outs[0]}.folded"
            self.program.tensors[name], bias = whole.to(weight.dtype), Named(name)
            self.whole[-1] = replace(call, args=(*call.args[:2], bias, *call.args[3:]))
        if bias is None:
            return None
        return self._constant(bias, {0: rows} if rows is not None else {})

    def _given_by_lost(
        self, call: Call, images: Ref, axis: int, columns: Tensor | None, rows: Tensor | None, weight: Tensor
    ) -> Tensor | None:
        """What a layer's outputs get from inputs that are constant and go, [outputs]; None: nothing."""
        if columns is None or images.number == 0:
            return None
        transposed = call.name == "convolution" and call.args[6]
        size = weight.shape[0 if transposed else 1]
        missing = torch.ones(size, dtype=torch.bool)
        missing[columns] = False
        value = self.tape.values.get(images.number)
        if not isinstance(value, Tensor):
            return None
        slots = value.movedim(axis, -1).reshape(-1, value.shape[axis])[0].expand(size)
        loud = missing & self.speaks[slots]
        kernel = weight.detach().movedim(1 if transposed else 0, -1)  # [inputs, …, outputs]
        loud &= nonzero(kernel if rows is None else kernel[..., rows]).flatten(1).any(1)
        if not loud.any():
            return None
        places = loud.nonzero().flatten()
        seen = self._values(images.number).movedim(axis, 0)[places].flatten(1).double()
        constants = seen[:, :1]
        if not bool((seen - constants).abs().max() <= 1e-6 * constants.abs().max()):
            raise StuckError(slots[loud], "their constant differs from place to place")
        if call.name == "convolution" and (transposed or any(call.args[4])):
            raise StuckError(slots[loud], "padding meets their constant")
        taps = kernel[places].double().reshape(len(places), -1, kernel.shape[-1]).sum(1)
        return (taps * constants).sum(0)

    def _check_product(self, call: Call) -> None:
        """Keeps constants that a product with a parameter reads which has no place for a bias."""
        left, right = call.args[:2] if call.name in ("mm", "bmm") else call.args[1:3]
        if isinstance(left, Named) == isinstance(right, Named):
            return
        units, constant, axis = (left, right, -1) if isinstance(left, Ref) else (right, left, -2)
        value = self._value(units.number)
        if isinstance(value, Tensor):
            kernel = self.program.tensors[constant.name].movedim(-3 - axis, 0)
            slots = value.movedim(axis, 0).flatten(1).expand(len(kernel), -1)
            lost = ~self.kept[self.units.of[slots]] & self.speaks[slots]
            lost &= nonzero(kernel).flatten(1).any(1, keepdim=True)
            if lost.any():
                raise StuckError(slots[lost], f"{call.name} reads their constant")

    def _values(self, number: int) -> Tensor:
        """A tensor of the whole network, on two images that differ."""
        if self.given is None:
            self.given = {}
            wanted = {c.args[0].number for c in self.program.calls if c.name in ("linear", "convolution")}
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(self.image.shape, generator=generator).to(self.image)
            images = torch.cat([self.image, self.image.roll(1, -1) * 0.5 + noise])
            network = Network(self.program).eval()
            network.watched = dict.fromkeys(wanted - {0})
            with torch.no_grad():
                network(images)
            self.given = network.watched
        return self.given[number]

    def _constant_layer(self, call: Call, want: Axes, shift: Named | None) -> None:
        """A layer of which no input is left: its bias, for every image and at every position."""
        out = call.outs[0]
        sizes = self._sizes(out, want)
        channel = len(sizes) - 1 if call.name == "linear" else 1
        if shift is None:
            name = f"zeros{len(self.tensors)}"
            self.tensors[name] = torch.zeros(sizes[channel], dtype=self.image.dtype)
            shift = Named(name)
        number, self.next = self.next, self.next + 1
        shape = [sizes[channel] if axis == channel else 1 for axis in range(len(sizes))]
        self.calls.append(Call("reshape", (shift, shape), {}, (number,)))
        self.calls.append(Call("expand", (Ref(number), sizes), {}, (out,)))
        self.axes[out] = want

    # --- functions that need care ------------------------------------------------------------------------------------

    def _cat(self, call: Call, want: Axes) -> None:
        pieces, dim = call.args[0], call.args[1] if len(call.args) > 1 else 0
        out = call.outs[0]
        dim %= self._ndim(out)
        others, given, start = {axis: index for axis, index in want.items() if axis != dim}, [], 0
        for piece in pieces:
            sizes = self.tape.shapes[piece.number] if isinstance(piece, Ref) else self.program.tensors[piece.name].shape
            size = sizes[dim]
            axes = dict(others)
            if dim in want:
                if isinstance(size, Batch):
                    raise self._stuck(Ref(out), "images share an axis with them")
                own = want[dim][(want[dim] >= start) & (want[dim] < start + size)] - start
                if len(own) < size:
                    axes[dim] = own
            start += size if not isinstance(size, Batch) else size.factor * BATCH
            if dim in axes and not len(axes[dim]):
                continue
            given.append(self._aligned(piece, axes) if isinstance(piece, Ref) else self._constant(piece, axes))
        self.calls.append(replace(call, args=(given, dim), kwargs={}))
        self.axes[out] = want

    def _group_norm(self, call: Call, want: Axes, wants: Mapping[int, Axes]) -> None:
        images, groups, *rest = call.args
        size = self.tape.shapes[images.number][1]
        if 1 in want:
            if groups != size:
                raise self._stuck(images, "a normalisation over channels reads them")
            groups = len(want[1])
        self._write(replace(call, args=(images, groups, *rest)), lambda leaf: self._beside(leaf, want, 1), wants)

    def _moved(self, call: Call, wants: Mapping[int, Axes]) -> None:
        """Functions that take a part of a tensor, along an axis that may have been cut."""
        images, *rest = call.args
        if not isinstance(images, Ref) or images.number in self.gone:
            return self._write(call, self._own, wants)
        own = self._wanted(images.number) if images.number else {}
        dim = _dim(call, self._ndim(images.number))
        if dim is None or dim not in own:
            if call.name in ("flip", "roll") and own.keys() & {d % self._ndim(images.number) for d in _dims(call)}:
                raise self._stuck(images, f"{call.name} reads them")
            return self._write(call, self._own, wants)
        given, index = self._aligned(images, own), own[dim]
        size = self.tape.shapes[images.number][dim]
        for out, places in _taken(call, dim, size, rest):
            number = call.outs[out]
            if number is None:
                continue
            place = torch.full((size,), -1)
            place[index] = torch.arange(len(index))
            found = place[places]
            if call.name in ("select", "unbind"):
                if int(found) < 0:
                    self.gone.add(number)
                    continue
                self.calls.append(Call("select.int", (given, dim, int(found)), {}, (number,)))
                self.axes[number] = wants[number]
                continue
            if not bool((found >= 0).any()):
                self.gone.add(number)
                continue
            ref = self._gathered(given, dim, found[found >= 0])
            self.calls.append(Call("clone.default", (ref,), {}, (number,)))
            self.axes[number] = wants[number]
        return None

    def _passes_raw(self, call: Call, inputs: list[Ref]) -> bool:
        """Whether a function of images moves all pixels, so that some can be left out behind it."""
        if call.name not in UNMOVED | MOVES or len(inputs) != 1:
            return self._all_pixels(call, inputs)
        outs = {out: {} for out in call.outs if out is not None}
        self._write(call, lambda leaf: leaf if isinstance(leaf, Ref) else self._constant(leaf, {}), outs)
        self.raw |= outs.keys()
        return True

    def _all_pixels(self, call: Call, inputs: list[Ref]) -> bool:
        """Keeps whatever cannot be gathered in front of a function."""
        for leaf in inputs:
            if leaf.number in self.raw and call.name not in ("linear", "convolution"):
                value = self.tape.values.get(leaf.number) if leaf.number else None
                pixels = self.units.inputs if value is None else value.unique()
                lost = pixels[~self.kept[self.units.of[pixels]]]
                if len(lost):
                    raise StuckError(lost, f"{call.name} reads all pixels")
        return False


def _same(one: Axes, other: Axes) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[axis], other[axis]) for axis in one)


def _dims(call: Call) -> list[int]:
    """The axes along which a flip or a roll goes."""
    given = call.args[2] if call.name == "roll" and len(call.args) > 2 else call.args[1]
    return [given] if isinstance(given, int) else list(given)


def _dim(call: Call, ndim: int) -> int | None:
    """The axis that a function takes a part along."""
    if call.name in ("flip", "roll"):
        return None
    place = 2 if call.name in ("split", "split_with_sizes") else 1
    given = call.args[place] if len(call.args) > place else call.kwargs.get("dim", 0)
    return given % ndim


def _taken(call: Call, dim: int, size: int, rest: list[Any]) -> list[tuple[int, Tensor]]:
    """For each result its number among the results, and the places that it takes."""
    every = torch.arange(size)
    if call.name == "slice":
        start, stop = (rest[1] if len(rest) > 1 else None), (rest[2] if len(rest) > 2 else None)
        return [(0, every[slice(start, stop, rest[3] if len(rest) > 3 else 1)])]
    if call.name == "select":
        return [(0, every[rest[1]])]
    if call.name == "unbind":
        return list(enumerate(every))
    if call.name == "index_select":
        raise AssertionError("index_select")
    sizes = rest[0]
    return list(enumerate(every.split(sizes)))
