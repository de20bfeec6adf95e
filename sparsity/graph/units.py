"""The units of a network: what is kept or removed as one; which of them speak, are heard, and could be cut out.

A slot is one channel of one tensor of the forward pass. Slots that can only be removed together, such as both summands
of a residual sum, are one unit. Links say which entries of which parameters belong to a unit; nodes say, in the order
of the pass, how the slots depend on each other. Unit 0 stands for what is never removed.
"""

import contextlib
import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparsity.tensors import Tensors, nonzero

NOTHING, ANYTHING = 0, 1  # the slots of what is 0 whatever the weights are, and of what no unit is known for

Role = Literal["writes", "scales", "reads"]
Went = dict[tuple[str, int], Tensor]  # by tensor and axis: which entries along it go


@dataclass(frozen=True)
class Entry:
    """The entries of a parameter or buffer along one of its axes, one for each of a node's slots."""

    name: str
    axis: int
    index: Tensor
    size: int  # of the axis

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether these are all entries, in order."""
        return torch.equal(self.index, torch.arange(self.size))


class Link(NamedTuple):
    """Which unit each index along an axis of a parameter or buffer belongs to; 0 is none, and is never removed."""

    name: str
    axis: int
    units: Tensor
    role: Role


class Facts:
    """Remembers which entries of a network's tensors are not 0."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.entries: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """Which entries of a tensor are not 0, on the CPU."""
        if name not in self.entries:
            self.entries[name] = nonzero(self.tensors[name]).cpu()
        return self.entries[name]

    def along(self, entry: Entry) -> Tensor:
        """Whether anything is not 0 at each of the entries."""
        if entry.name not in self.tensors:  # such as statistics that are not given: other than 0 as far as is known
            return torch.ones(len(entry.index), dtype=torch.bool)
        found = self.of(entry.name)
        return found.movedim(entry.axis, 0).reshape(found.shape[entry.axis], -1).any(1)[entry.index]


@dataclass(frozen=True)
class LayerUse:
    """outs = weight · ins + bias, of a linear layer, a convolution, or a product with a parameter."""

    weight: str
    rows: Entry
    columns: Entry  # along the axis of a group's inputs
    ins: Tensor  # slots, [groups · inputs]
    outs: Tensor  # slots, [groups · outputs]
    bias: Entry | None = None
    groups: int = 1
    size: int = 1  # MACs for each pair of an input and an output: kernel size · positions
    repeats: Tensor | None = None  # slots that the positions are of, where positions can be removed: size is of each
    uneven: bool = False  # whether positions hear different numbers of taps, as by padding

    @property
    def is_whole(self) -> bool:
        """Whether it takes the whole weight."""
        return self.rows.is_whole and self.columns.is_whole and self.repeats is None

    @property
    def is_depthwise(self) -> bool:
        """Whether each row belongs to one input alone."""
        return 1 < self.groups == len(self.ins) and len(self.rows.index) == len(self.outs)

    @property
    def channels(self) -> Tensor:
        """The number of each output among those of the whole weight."""
        own = self.rows.index
        return own if len(own) == len(self.outs) else torch.arange(len(self.outs))  # the latter: transposed, in groups

    def connections(self, facts: Facts) -> Tensor:
        """Which output hears which input: bool [groups, outputs, inputs]."""
        if self.weight not in facts.tensors:
            shape = self.groups, len(self.outs) // self.groups, len(self.ins) // self.groups
            return torch.ones(shape, dtype=torch.bool)
        entries, rows, columns = facts.of(self.weight), self.rows.axis, self.columns.axis
        others = [axis for axis in range(entries.ndim) if axis not in (rows, columns)]
        found = entries.permute(rows, columns, *others).reshape(entries.shape[rows], entries.shape[columns], -1)
        found = found.any(2) if others else found.squeeze(2)
        found = found if self.rows.is_whole else found[self.rows.index]
        found = found if self.columns.is_whole else found[:, self.columns.index]
        if len(self.columns.index) == len(self.ins):  # a group is some of the columns, or there is one group
            return found.reshape(len(found), self.groups, -1).transpose(0, 1)
        return found.reshape(self.groups, -1, found.shape[1])

    def speak(self, speaks: Tensor, facts: Facts) -> None:
        """An output speaks if it hears an input that does, or has a bias."""
        given = speaks[self.ins].view(self.groups, 1, -1)
        found = (self.connections(facts) & given).any(2).flatten()
        speaks[self.outs] = found if self.bias is None else found | facts.along(self.bias)

    def vary(self, varies: Tensor, speaks: Tensor, facts: Facts) -> None:
        """An output varies if it hears an input that does, or a constant at some positions more than at others."""
        given = (varies | speaks if self.uneven else varies)[self.ins].view(self.groups, 1, -1)
        varies[self.outs] = (self.connections(facts) & given).any(2).flatten()

    def hear(self, heard: Tensor, asks: Tensor, varies: Tensor, facts: Facts) -> None:
        """An input is heard where it speaks to an output that is; a constant can be a part of the bias instead."""
        asked = heard[self.outs].view(self.groups, -1, 1)
        told = (varies if self.folds else asks)[self.ins]
        found = (self.connections(facts) & asked).any(1).flatten() & told
        heard[self.ins[found]] = True

    @property
    def folds(self) -> bool:
        """Whether what a constant input gives is the same at every position, so that a bias can hold it."""
        return not self.uneven and self.repeats is None and self.groups == 1

    def go(self, gone: Tensor, rows: Tensors, free: Container[str], with_it: Went) -> None:
        """An output goes with its row and bias; where a row belongs to one input, both go with it."""
        went = (
            rows[self.weight][self.channels] if self.weight in rows else torch.zeros(len(self.outs), dtype=torch.bool)
        )
        if self.is_depthwise and self.weight in free:
            lost = gone[self.ins].repeat_interleave(len(self.outs) // self.groups)
            _mark(with_it, self.rows, lost)
            went = went | lost
        if self.bias is not None and self.bias.name in free:
            _mark(with_it, self.bias, went)
        gone[self.outs] = went & (self.bias is None or self.bias.name in free)

    def macs(self, alive: Tensor) -> int:
        """Σ over groups of kept inputs · kept outputs, · kernel size · positions."""
        inputs = alive[self.ins].view(self.groups, -1).sum(1)
        outputs = alive[self.outs].view(self.groups, -1).sum(1)
        repeats = 1 if self.repeats is None else int(alive[self.repeats].sum())
        return int((inputs * outputs).sum()) * self.size * repeats

    @property
    def num_repeats(self) -> int:
        """How many positions of slots there are; 1 where positions are of no slots."""
        return 1 if self.repeats is None else len(self.repeats)


@dataclass(frozen=True)
class Scale:
    """outs = (ins - offset) · factor + shift, channel by channel: normalisations, layer_scale, embeddings, slopes."""

    ins: Tensor
    outs: Tensor
    factor: Entry | None = None
    shift: Entry | None = None
    offset: Entry | None = None  # the running mean
    belongs: Entry | None = None  # what goes with a channel and decides nothing, such as slopes
    always: bool = False  # whether its input counts as speaking: a normalisation over channels
    uneven: bool = False  # whether a channel's numbers differ from position to position

    def speak(self, speaks: Tensor, facts: Facts) -> None:
        """A channel speaks if its input or the running mean does, scaled by other than 0, or if its shift does."""
        found = torch.ones_like(speaks[self.ins]) if self.always else speaks[self.ins]
        if self.offset is not None:
            found = found | facts.along(self.offset)
        if self.factor is not None:
            found = found & facts.along(self.factor)
        speaks[self.outs] = found if self.shift is None else found | facts.along(self.shift)

    def vary(self, varies: Tensor, speaks: Tensor, facts: Facts) -> None:
        """A channel varies if its input does, scaled by other than 0; all do by statistics of all."""
        found = varies[self.ins]
        found = found if self.factor is None else found & facts.along(self.factor)
        varies[self.outs] = found | self.always | (speaks[self.outs] & self.uneven)

    def hear(self, heard: Tensor, asks: Tensor, varies: Tensor, facts: Facts) -> None:
        """A channel's input is heard where the channel is."""
        heard[self.ins[heard[self.outs]]] = True

    def go(self, gone: Tensor, rows: Tensors, free: Container[str], with_it: Went) -> None:
        """Factor and shift go with the input, unless they stand for more than it."""
        went = gone[self.ins] & (not self.always)
        for entry in (self.factor, self.shift, self.belongs):
            if entry is not None and entry.name in free:
                _mark(with_it, entry, went)
        silent = self.offset is None or (self.factor is not None and self.factor.name in free)
        gone[self.outs] = went & silent & (self.shift is None or self.shift.name in free)


@dataclass(frozen=True)
class Join:
    """Each out is made of the sources that point to it: a sum, a maximum, a constant function, a head of attention."""

    outs: Tensor
    sources: Tensor  # slots
    targets: Tensor  # for each source the position of its out
    telling: Tensor | None = None  # which of the sources decide whether an out speaks; None: all
    always: bool = False  # whether outs speak whatever their sources do
    uneven: bool = False  # whether positions get different shares of a constant, as by padding

    def speak(self, speaks: Tensor, facts: Facts) -> None:
        """An out speaks if one of its sources does."""
        found = torch.full((len(self.outs),), self.always)
        loud = speaks[self.sources] if self.telling is None else speaks[self.sources] & self.telling
        found[self.targets[loud]] = True
        speaks[self.outs] = found

    def vary(self, varies: Tensor, speaks: Tensor, facts: Facts) -> None:
        """An out varies if one of its sources does, whichever; images do, which have none."""
        found = torch.full((len(self.outs),), self.always and (self.uneven or not len(self.sources)))
        found[self.targets[(varies | speaks if self.uneven else varies)[self.sources]]] = True
        varies[self.outs] = found

    def hear(self, heard: Tensor, asks: Tensor, varies: Tensor, facts: Facts) -> None:
        """All sources of an out that is heard are."""
        heard[self.sources[heard[self.outs][self.targets]]] = True

    def go(self, gone: Tensor, rows: Tensors, free: Container[str], with_it: Went) -> None:
        """An out is gone when all of its sources are."""
        found = torch.full((len(self.outs),), not self.always)
        kept = ~gone[self.sources] if self.telling is None else ~gone[self.sources] & self.telling
        found[self.targets[kept]] = False
        gone[self.outs] = found


@dataclass(frozen=True)
class Product:
    """Each out is the product of two slots, as where one branch gates another: 0 where either is."""

    outs: Tensor
    left: Tensor
    right: Tensor

    def speak(self, speaks: Tensor, facts: Facts) -> None:
        """An out speaks if both factors do."""
        speaks[self.outs] = speaks[self.left] & speaks[self.right]

    def vary(self, varies: Tensor, speaks: Tensor, facts: Facts) -> None:
        """An out varies if a factor does and neither is 0."""
        varies[self.outs] = (varies[self.left] | varies[self.right]) & speaks[self.outs]

    def hear(self, heard: Tensor, asks: Tensor, varies: Tensor, facts: Facts) -> None:
        """Both factors of an out that is heard are."""
        asked = heard[self.outs]
        heard[self.left[asked]] = True
        heard[self.right[asked]] = True

    def go(self, gone: Tensor, rows: Tensors, free: Container[str], with_it: Went) -> None:
        """An out is gone when either factor is."""
        gone[self.outs] = gone[self.left] | gone[self.right]


@dataclass(frozen=True)
class Mix:
    """Outs that each depend on all ins, beside what other nodes say of them, such as those of a softmax."""

    ins: Tensor
    outs: Tensor

    def speak(self, speaks: Tensor, facts: Facts) -> None:
        """Whether an out speaks is said elsewhere."""

    def vary(self, varies: Tensor, speaks: Tensor, facts: Facts) -> None:
        """All outs vary if any input does."""
        varies[self.outs] |= varies[self.ins].any()

    def hear(self, heard: Tensor, asks: Tensor, varies: Tensor, facts: Facts) -> None:
        """All ins are heard where any out is, whatever they are."""
        heard[self.ins] |= heard[self.outs].any()

    def go(self, gone: Tensor, rows: Tensors, free: Container[str], with_it: Went) -> None:
        """What goes is said elsewhere."""


class Matmul(NamedTuple):
    """A product of activations, such as of queries and keys."""

    slots: Tensor  # one for each of its blocks, such as a head's
    size: int  # MACs of each

    def macs(self, alive: Tensor) -> int:
        """The MACs of the blocks that are kept."""
        return int(alive[self.slots].sum()) * self.size


Node = LayerUse | Scale | Join | Product | Mix


@dataclass(frozen=True)
class Units:
    """The units of a network, and what is known of them."""

    of: Tensor  # the unit of each slot
    nodes: Sequence[Node]  # in the order of the pass
    links: Sequence[Link]
    matmuls: Sequence[Matmul]
    heard: Tensor  # slots that are heard whatever the weights are: outputs, and what is mixed with others
    outputs: Tensor  # the slots of the outputs
    inputs: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # of an image's pixels, in order
    frozen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # slots of unknown use
    unknown: tuple[str, ...] = ()  # the functions that froze them

    @property
    def num_units(self) -> int:
        """How many there are, with number 0, which is none."""
        return int(self.of.max()) + 1

    @property
    def layers(self) -> Iterator[LayerUse]:
        """The layers of the pass; one that is used twice comes twice."""
        return (node for node in self.nodes if isinstance(node, LayerUse))

    def entries(self, unit: int) -> list[tuple[str, int, list[int], Role]]:
        """What belongs to a unit: tensor, axis, indices and role."""
        found = [(link, (link.units == unit).nonzero().flatten().tolist()) for link in self.links]
        return [(link.name, link.axis, index, link.role) for link, index in found if index]

    @property
    def heads(self) -> Tensor:
        """Which units are blocks of a product of activations, such as heads of attention: bool [units]."""
        found = torch.zeros(self.num_units, dtype=torch.bool)
        for product in self.matmuls:
            found[self.of[product.slots]] = True
        found[0] = False
        return found

    @staticmethod
    def none() -> "Units":
        """Those of a network of which nothing is known."""
        nothing = torch.zeros(0, dtype=torch.long)
        return Units(torch.zeros(2, dtype=torch.long), [], [], [], nothing, nothing)

    def kept(self, facts: Facts, *, folds: bool = True) -> Tensor:
        """Which units cannot be cut out, given the parameters and buffers: bool [units], and True for number 0.

        A unit is kept if one of its slots is heard: it may be other than 0, and an output or a slot that is heard
        itself is made of it by a weight that is not 0. A constant, such as ReLU(bias), is not heard by a layer whose
        bias can hold what it gives. folds: whether biases are to hold constants; those that train are not.
        """
        with one_thread():
            return self._kept(facts, folds)

    def along(self, kept: Tensor) -> dict[tuple[str, int], Tensor]:
        """What is kept along each axis of each tensor, where its entries are of units that may go.

        kept: bool [..., units] → by name and axis, bool [..., entries along it].
        """
        return {(link.name, link.axis): kept[..., link.units] for link in self.links}

    def speaking(self, facts: Facts) -> Tensor:
        """Which slots may be other than 0."""
        speaks = torch.zeros(len(self.of), dtype=torch.bool)
        speaks[ANYTHING] = True
        for node in self.nodes:
            node.speak(speaks, facts)
        return speaks

    def varying(self, speaks: Tensor, facts: Facts) -> Tensor:
        """Which slots depend on the images, given which may be other than 0."""
        varies = torch.zeros_like(speaks)
        varies[ANYTHING] = True
        for node in self.nodes:
            node.vary(varies, speaks, facts)
        return varies & speaks

    def _kept(self, facts: Facts, folds: bool) -> Tensor:
        speaks = self.speaking(facts)
        varies = self.varying(speaks, facts) if folds else speaks
        heard = torch.zeros_like(speaks)
        heard[self.heard] = True
        for node in reversed(self.nodes):
            node.hear(heard, speaks, varies, facts)
        kept = torch.zeros(self.num_units, dtype=torch.bool)
        kept[self.of[heard]] = True
        kept[0] = True
        return kept

    def with_mixed(self, kept: Tensor) -> Tensor:
        """Units that are kept, and those that a softmax or a normalisation mixes with these."""
        for node in reversed(self.nodes):
            if isinstance(node, Mix):
                units = self.of[node.outs]
                kept[self.of[node.ins]] |= kept[units[units > 0]].any()
        return kept

    def going(self, rows: Tensors, free: Container[str]) -> Went:
        """What goes with the rows of weights that a rule removes: by tensor and axis, which entries along it.

        rows: by weight, True for each output whose row goes. free: names of what may go with them. The scale and shift
        of the normalisation behind it go with a row, as do slopes, layer_scale and the rows of a depthwise
        convolution; behind a sum they go once all that it sums is gone.
        """
        gone = torch.zeros(len(self.of), dtype=torch.bool)
        gone[NOTHING] = True
        with_it: Went = {}
        for node in self.nodes:
            node.go(gone, rows, free, with_it)
        return with_it

    def silent_norms(self, facts: Facts) -> Tensors:
        """Which entries of scales and shifts are 0 together behind what is 0 too: bool by name."""
        speaks = self.speaking(facts)
        found: Tensors = {}
        for node in self.nodes:
            if isinstance(node, Scale) and node.factor is not None and node.shift is not None and not node.always:
                is_silent = ~(speaks[node.ins] | facts.along(node.factor) | facts.along(node.shift))
                for entry in (node.factor, node.shift):
                    mask = found.setdefault(entry.name, torch.zeros(entry.size, dtype=torch.bool))
                    mask[entry.index[is_silent]] = True
        return found

    def scales_behind(self) -> dict[str, tuple[str, Tensor]]:
        """By weight, the scale of the normalisation that its outputs go into at once, and each output's entry there."""
        scales = [node for node in self.nodes if isinstance(node, Scale) and node.factor is not None]
        places = [{slot: place for place, slot in enumerate(scale.ins.tolist())} for scale in scales]
        found = {}
        for layer in self.layers:
            outs = layer.outs.tolist()
            for scale, place_of in zip(scales, places):
                if layer.is_whole and place_of.keys() >= {*outs}:
                    order = torch.tensor([place_of[slot] for slot in outs])
                    found[layer.weight] = scale.factor.name, scale.factor.index[order]
        return found

    def fixed_rows(self, weight: str, size: int) -> Tensor:
        """Which rows of a weight no group rule may take: those of outputs, and of units of unknown use; bool [size]."""
        fixed = torch.zeros(self.num_units, dtype=torch.bool)
        fixed[self.of[torch.cat([self.outputs, self.frozen])]] = True
        fixed[0] = False
        found = torch.zeros(size, dtype=torch.bool)
        for layer in self.layers:
            if layer.weight == weight:
                found[layer.channels[fixed[self.of[layer.outs]]]] = True
        return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small computations, of which threads make none faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mark(with_it: Went, entry: Entry, went: Tensor) -> None:
    """Notes entries that go; one that several slots share goes with all of them."""
    found = torch.zeros(entry.size, dtype=torch.bool)
    found[entry.index[went]] = True
    found[entry.index[~went]] = False
    key = entry.name, entry.axis
    with_it[key] = with_it[key] & found if key in with_it else found
