"""Exact removal of dead structure: the smaller network that computes what a pruned one computes, and the way back."""

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from sparsity.data import Splits
from sparsity.errors import reason
from sparsity.graph import FLATTENS, Layer, trace_layers
from sparsity.population import PARTS, Population, over_members
from sparsity.tensors import Tensors, nonzero

log = logging.getLogger("sparsity")

# Functions of each entry alone that make 0 of 0.
# fmt: off
ELEMENTWISE = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softsign", "tanh",
    "hardswish", "contiguous", "clone", "to", "float", "detach", "identity",
))
# Functions that make 0 of a channel of zeros.
KEEPS_ZERO = ELEMENTWISE | FLATTENS | {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "boolean_dispatch", "interpolate",
}
# Functions whose channels do not depend on each other, nor on how many there are; random ones would draw other numbers.
CHANNELWISE = KEEPS_ZERO | {
    "softplus", "logsigmoid", "sigmoid", "hardtanh", "hardtanh_", "hardsigmoid", "batch_norm", "instance_norm",
}
# fmt: on
RESHAPES = ELEMENTWISE | FLATTENS - {"mean"}

Axes = dict[int, Tensor]  # axis of a tensor → what is kept along it: [members, kept], ascending
NUM_CHECKED = 8  # images that both networks are compared on


@dataclass(frozen=True)
class Compacted:
    """A population without its dead structure, and the splits as it takes them."""

    population: Population
    splits: Splits
    full: Population
    kept: Mapping[str, Axes]  # by parameter or buffer; those that are whole are not named

    def restore(self, population: Population) -> Population:
        """A population of the compact shapes brought back to the full ones; what was removed is as it was."""
        return self.fill(self.full, population)

    def fill(self, full: Population, small: Population) -> Population:
        """The full population with the small one's entries where they belong, and its masks of whole tensors."""

        def filled(name: str, full: Tensor, small: Tensor) -> Tensor:
            if name not in self.kept:
                return small
            full = full.detach().clone()
            full[_mesh(full, self.kept[name])] = small.detach()
            return full

        parts = {
            part: {name: filled(name, tensor, getattr(small, part)[name]) for name, tensor in tensors.items()}
            for part, tensors in (("parameters", full.parameters), ("buffers", full.buffers))
        }
        masks = full.masks | {name: mask for name, mask in small.masks.items() if name not in self.kept}
        return replace(full, **parts, masks=masks)


def compact(population: Population, splits: Splits) -> Compacted:
    """The population without what affects neither an output nor a gradient of the loss, masks as given.

    An entry is dead for good where it is 0 and its mask or its module holds it there. From this follow, to the fixed
    point, two kinds of dead units (neurons, filters), as far as the recorded graph proves that one layer alone reads
    them, through functions that keep channels apart:

    - silent ones: no live weight from a unit that is not silent, no live bias, and only functions that make 0 of 0
      until the reader. A live bias makes a unit a trained constant, which stays; so does sigmoid(0).
    - unread ones: no live weight of a unit that is itself needed reads them.

    The loss gives the entries of a dead unit, and the weights that read it, a gradient of exactly 0. Some of them are
    not 0, such as the bias of an unread unit. They come back from `restore` as they were, which is what training the
    full network makes of them as long as the optimizer works element by element, and are counted as before. Weight
    decay alone would shrink them there: they then differ from those of the full network, as do the running statistics
    of dead channels; nothing reads either.

    Images lose the pixels that no member reads, where a linear layer alone reads them, flattened. Members have dead
    units at different places and in different number: each keeps as many of a layer as the member with the most, so
    that some of the others' stay. Whatever the module does to defeat the proof, such as a hard-coded size, shows in
    outputs and gradients on a few images: the population is then given back as it is.
    """
    structure = Structure.of(population, splits)
    units, pixels = structure.kept_units(), structure.kept_pixels(splits.input_shape)
    for images in [pixels, {}] if pixels else [{}] if units else []:
        compacted = _with(population, splits, units, images)
        trouble = _trouble(compacted, splits)
        if trouble is None:
            return compacted
        log.info(f"compaction{' of images' if images else ''} is left out: {trouble}")
    return whole(population, splits)


def whole(population: Population, splits: Splits) -> Compacted:
    """The population as it is."""
    return _with(population, splits, {}, {})


def _with(population: Population, splits: Splits, units: Mapping[str, Axes], pixels: Mapping[str, Axes]) -> Compacted:
    """What is left when of each tensor the kept entries alone are taken, and of the images the kept pixels."""
    kept = {name: {**units.get(name, {}), **pixels.get(name, {})} for name in {**units, **pixels}}
    parts = {
        part: {
            name: tensor[_mesh(tensor, kept[name])] if name in kept else tensor
            for name, tensor in getattr(population, part).items()
        }
        for part in PARTS
    }
    parts["masks"] = {name: mask for name, mask in parts["masks"].items() if name not in kept or not mask.all()}
    few = [splits.keep(axes[1][0]) for axes in pixels.values()] or [splits]
    return Compacted(replace(population, **parts), few[0], population, kept)


@dataclass(frozen=True)
class Structure:
    """Which units of a population's members are needed, as far as the recorded graph proves it."""

    layers: dict[str, Layer]  # in order; those whose weight's entries each belong to one input and one output
    transposed: dict[str, bool]  # whether the weight has its inputs before its outputs
    connections: Tensors  # which unit hears which: bool [members, outputs, inputs]
    biases: Tensors  # which outputs have a live bias: bool [members, outputs]
    lengths: dict[str, int]  # of the vectors beside channels

    @staticmethod
    def of(population: Population, splits: Splits) -> "Structure":
        """The structure of a population."""
        alive, layouts = _alive(population), population.layouts
        layers = {
            name: layer
            for name, layer in trace_layers(population.module, splits.example()).items()
            if layer.exclusive and layouts[name].groups == 1
        }
        vectors = {**population.parameters, **population.buffers}
        return Structure(
            layers=layers,
            transposed={name: layouts[name].transposed for name in layers},
            connections={name: _connections(alive[name], layouts[name].transposed) for name in layers},
            biases={name: alive[layer.bias] for name, layer in layers.items() if layer.bias is not None},
            lengths={name: vectors[name][0].numel() for layer in layers.values() for name in layer.vectors},
        )

    @functools.cached_property
    def readers(self) -> dict[str, Layer]:
        """The layer that reads a layer's channels, and is alone in it; in order."""
        sources = {layer.name: self.layers.get(layer.source) for layer in self.layers.values()}
        return {
            source.name: self.layers[name]
            for name, source in sources.items()
            if source is not None and source.target == name and self._keeps_apart(source, self.layers[name])
        }

    def _keeps_apart(self, source: Layer, reader: Layer) -> bool:
        """Whether each of the source's channels reaches its own inputs of the reader alone."""
        channels, inputs = self.connections[source.name].shape[1], self.connections[reader.name].shape[2]
        fits = inputs == channels * reader.spread and all(self.lengths[v] % channels == 0 for v in reader.vectors)
        return fits and CHANNELWISE.issuperset(reader.passed)

    @functools.cached_property
    def silent(self) -> Tensors:
        """Which units give the reader of their layer nothing but 0: bool [members, outputs]."""
        found: Tensors = {}
        for name, layer in self.layers.items():
            heard = self.connections[name]
            if layer.source in found:
                heard = heard & ~found[layer.source].repeat_interleave(layer.spread, 1).unsqueeze(1)
            if name in self.readers and KEEPS_ZERO.issuperset(self.readers[name].passed):
                found[name] = ~(heard.any(2) | self.biases.get(name, heard.new_zeros(())))
        return found

    @functools.cached_property
    def needed(self) -> Tensors:
        """Which units are neither silent nor unread: bool [members, outputs] of the layers with one reader."""
        found: Tensors = {}
        for name, reader in reversed(self.readers.items()):
            read = self._read(reader.name, found).unflatten(1, (-1, reader.spread)).any(2)
            found[name] = read & ~self.silent[name] if name in self.silent else read
        return found

    def _read(self, name: str, needed: Tensors) -> Tensor:
        """Which inputs of a layer a needed unit of it reads: bool [members, inputs]."""
        connections = self.connections[name]
        return (connections & needed[name].unsqueeze(2) if name in needed else connections).any(1)

    def kept_units(self) -> dict[str, Axes]:
        """What is kept of each tensor when the dead units go."""
        kept: dict[str, Axes] = {}
        for name, needed in self.needed.items():
            index = _index(needed)
            if index.shape[1] == needed.shape[1]:
                continue
            layer, reader = self.layers[name], self.readers[name]
            kept.setdefault(name, {})[int(self.transposed[name])] = index
            kept.setdefault(reader.name, {})[int(not self.transposed[reader.name])] = _spread(index, reader.spread)
            for vector in reader.vectors:
                kept[vector] = {0: _spread(index, self.lengths[vector] // needed.shape[1])}
            if layer.bias is not None:
                kept[layer.bias] = {0: index}
        return kept

    def kept_pixels(self, shape: tuple[int, ...]) -> dict[str, Axes]:
        """What is kept of the weight that alone reads the flattened images: the pixels that a member reads."""
        num_pixels = torch.Size(shape).numel()
        for name, layer in self.layers.items():
            if layer.reads_images and layer.num_positions == 1 and RESHAPES.issuperset(layer.passed):
                read = self._read(name, self.needed)
                index = _index(read.any(0, keepdim=True))
                if read.shape[1] == num_pixels > index.shape[1]:
                    return {name: {1: index.expand(len(read), -1)}}
        return {}


def _alive(population: Population) -> Tensors:
    """Which entries are not 0, or may become other than 0: bool [members, *shape]."""

    def may_change(name: str, parameter: Tensor) -> Tensor:
        if name not in trainable:
            return torch.zeros_like(parameter, dtype=torch.bool)
        return population.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))

    trainable = population.trainable
    return {name: nonzero(value) | may_change(name, value) for name, value in population.parameters.items()}


def _connections(alive: Tensor, transposed: bool) -> Tensor:
    """Which output hears which input: bool [members, outputs, inputs], of a weight [members, *shape]."""
    heard = alive.reshape(*alive.shape[:3], -1).any(3)
    return heard.transpose(1, 2) if transposed else heard


def _index(needed: Tensor) -> Tensor:
    """The places of the units to keep, [members, kept], of those that are needed, [members, units].

    Of each member as many as of the one that needs the most, and one at least: first those that it needs.
    """
    num_kept = max(1, int(needed.sum(1).max()))
    first = needed.byte().sort(dim=1, descending=True, stable=True).indices
    return first[:, :num_kept].sort(dim=1).values


def _spread(index: Tensor, count: int) -> Tensor:
    """The places [members, kept · count] of entries that lie `count` together for each unit of an index."""
    return (index.unsqueeze(2) * count + torch.arange(count, device=index.device)).flatten(1)


def _mesh(tensor: Tensor, axes: Axes) -> tuple[Tensor, ...]:
    """An index into a tensor [members, *shape] of what is kept: its first axes, as far as any of them is cut."""
    count = max(axes) + 1
    whole = [torch.arange(size, device=tensor.device).unsqueeze(0) for size in tensor.shape[1 : count + 1]]

    def along(axis: int) -> Tensor:
        places = axes.get(axis, whole[axis])
        return places.view(len(places), *(-1 if each == axis else 1 for each in range(count)))

    members = torch.arange(len(tensor), device=tensor.device).view(-1, *[1] * count)
    return (members, *map(along, range(count)))


def _trouble(compacted: Compacted, splits: Splits) -> str | None:
    """What keeps the networks from giving the same outputs and gradients, in evaluation and in training; or None."""
    try:
        agree = all(_agree(compacted, splits, training) for training in (False, True))
    except Exception as error:  # whatever a module may raise on shapes that it was not written for
        return reason(error)
    return None if agree else "the smaller network computes something else"


def _agree(compacted: Compacted, splits: Splits, training: bool) -> bool:
    """Whether outputs and gradients are the same on a few images, and 0 where entries were removed."""
    outputs, gradients = _response(compacted.full, splits, training)
    small_outputs, small_gradients = _response(compacted.population, compacted.splits, training)
    zeros = replace(compacted.full, parameters={name: torch.zeros_like(g) for name, g in gradients.items()}, buffers={})
    filled = compacted.fill(zeros, replace(compacted.population, parameters=small_gradients)).parameters
    return _are_close([outputs], [small_outputs]) and _are_close(gradients.values(), filled.values())


def _response(population: Population, splits: Splits, training: bool) -> tuple[Tensor, Tensors]:
    """Outputs [members, images, classes] on a few images, and the gradients, where masks let them through."""
    count = min(len(splits.train), NUM_CHECKED)
    batch = next(splits.train.take(torch.arange(count)).batches(torch.arange(count).unsqueeze(0), count))
    images, population = splits.scale(batch.images).squeeze(0), population.clone()
    trained = {name: parameter.requires_grad_() for name, parameter in population.trainable.items()}
    module = population.module.train(training)

    def outputs_of(parameters: Tensors, buffers: Tensors) -> Tensor:
        return functional_call(module, (parameters, buffers), (images,))

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        outputs = over_members(outputs_of, population.num_members, (0, 0))(population.parameters, population.buffers)
    # a mixture of all outputs, as a loss is near 0 where the network is good, and its gradients are mostly rounding
    mixture = outputs * torch.linspace(-1, 1, outputs[0].numel(), device=images.device).view_as(outputs[0])
    found = torch.autograd.grad(mixture.sum(), list(trained.values()), materialize_grads=True)
    return outputs.detach(), {name: g * population.masks.get(name, 1) for name, g in zip(trained, found)}


def _are_close(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether tensors are the same up to rounding, beside the largest of them."""
    pairs = list(zip(ones, others))
    largest = torch.stack([one.abs().max() for one, _ in pairs]).max()
    distance = torch.stack([(one - other).abs().max() for one, other in pairs]).max()
    return bool(distance <= largest * torch.finfo(largest.dtype).eps ** 0.5)
