"""Exact removal of dead structure: the smaller network that computes what a pruned one computes, and the way back."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sparsity.data import Splits
from sparsity.errors import reason
from sparsity.graph import Facts, Units
from sparsity.graph.recorder import recorded
from sparsity.graph.slots import concatenated
from sparsity.population import PARTS, Population, over_members
from sparsity.tensors import Tensors, nonzero

log = logging.getLogger("sparsity")

Axes = dict[int, Tensor]  # axis of a tensor → what is kept along it: [members, kept], ascending
Parts = dict[int, tuple[Tensor, int]]  # axis of a tensor → what is kept along it, and its size
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
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
    point, two kinds of dead units, as the recorded graph couples channels:

    - silent ones: 0 whatever the images are. A live bias makes a unit a trained constant, which stays; so does
      sigmoid(0), unlike in an artifact, where the next bias holds it: here its readers learn from it.
    - unread ones: no live weight of a unit that is itself needed reads them.

    The loss gives the entries of a dead unit, and the weights that read it, a gradient of exactly 0. Some of them are
    not 0, such as the bias of an unread unit. They come back from `restore` as they were, which is what training the
    full network makes of them as long as the optimizer works element by element, and are counted as before. Weight
    decay alone would shrink them there: they then differ from those of the full network, as do the running statistics
    of dead channels; nothing reads either.

    Images lose the pixels that no member reads, where a linear layer alone reads them, flattened. Members have dead
    units at different places and in different number: of units alike each keeps as many as the member with the most,
    so that some of the others' stay. Whatever the module does to defeat the proof, such as a hard-coded size, shows in
    outputs and gradients on a few images: the units that do not pass are kept.
    """
    structure = Structure.of(population, splits)
    whole_responses = [_response(population, splits, training) for training in (False, True)] if structure.dead else []

    def works(kinds: Sequence[int]) -> bool:
        try:
            trouble = _trouble(structure.without(kinds), whole_responses)
        except Exception as error:  # whatever a module may raise on shapes that it was not written for
            trouble = reason(error)
        if trouble is not None:
            log.info(f"compaction: units of {structure.names(kinds)} stay as far as they must: {trouble}")
        return trouble is None

    return structure.without(_most(structure.dead, works))


def whole(population: Population, splits: Splits) -> Compacted:
    """The population as it is."""
    return Compacted(population, splits, population, {})


def _most(kinds: Sequence[int], works: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """Of some kinds those that work together, found by halves."""
    if not kinds or works(kinds):
        return kinds
    middle = len(kinds) // 2
    if not middle:
        return []
    halves = _most(kinds[:middle], works), _most(kinds[middle:], works)
    both = [*halves[0], *halves[1]]
    return both if not all(halves) or works(both) else max(halves, key=len)


@dataclass(frozen=True)
class Structure:
    """Which units of a population's members are needed, as far as the recorded graph proves it."""

    population: Population
    splits: Splits
    units: Units
    dropouts: dict[str, Tensor]  # by module: the units of what it is given, of length 1 along axes that have none
    needed: Tensor  # bool [members, units]
    kinds: Tensor  # of each unit: those of a kind have as many entries along each axis of each tensor, [units]

    @staticmethod
    def of(population: Population, splits: Splits) -> "Structure":
        """The structure of a population."""
        units, dropouts = _recorded(population.module, splits.example()[:1])
        alive = {**{name: value.cpu() for name, value in _alive(population).items()}, **population.buffers}
        members = range(population.num_members)
        facts = [Facts({name: value[member] for name, value in alive.items()}) for member in members]
        needed = torch.stack([units.kept(each, folds=False) for each in facts])
        pixels = units.of[units.inputs]
        reads_pixels = any(torch.equal(layer.ins, units.inputs) for layer in units.layers)
        needed[:, pixels] = needed[:, pixels].any(0) | (not reads_pixels)
        return Structure(population, splits, units, dropouts, needed, _kinds(units))

    @cached_property
    def dead(self) -> list[int]:
        """The kinds of which some can go: of one alone, and of what a member needs all of, none can."""
        found = []
        for kind in self.kinds[concatenated([link.units for link in self.units.links])].unique().tolist():
            needed = self.needed[:, self.kinds == kind]
            if needed.shape[1] > 1 and not needed.all(1).any():
                found.append(kind)
        return found

    def names(self, kinds: Sequence[int]) -> str:
        """The tensors that units of some kinds have entries of."""
        found = [link.name for link in self.units.links if bool(torch.isin(self.kinds[link.units], _ints(kinds)).any())]
        return ", ".join(dict.fromkeys(found))

    def without(self, kinds: Sequence[int]) -> Compacted:
        """The population without the dead units of some kinds."""
        if not kinds:
            return whole(self.population, self.splits)
        units, device = self.kept(kinds), self.population.device
        kept: dict[str, Axes] = {}
        for (name, axis), mask in self.units.along(units).items():
            if not mask.all():
                kept.setdefault(name, {})[axis] = mask.nonzero()[:, 1].view(len(mask), -1).to(device)
        pixels = units[0, self.units.of[self.units.inputs]]
        splits = self.splits if pixels.all() else self.splits.keep(pixels.nonzero().flatten().to(device))
        return Compacted(_taken(self.population, kept, self._dropouts(units)), splits, self.population, kept)

    def kept(self, kinds: Sequence[int]) -> Tensor:
        """Which units each member keeps: bool [members, units].

        Of each of the kinds as many as the member with the most needs, and one at least: first those that it needs.
        """
        kept = self.needed | ~torch.isin(self.kinds, _ints(kinds))
        places = [(self.kinds == kind).nonzero().flatten() for kind in kinds]
        before = None
        while before is None or not torch.equal(kept, before):
            before = kept.clone()
            for place in places:
                own = kept[:, place]
                count = max(1, int(own.sum(1).max()))
                first = own.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
                kept[:, place] = own.scatter(1, first, True)
            kept = torch.stack([self.units.with_mixed(each.clone()) for each in kept])
        return kept

    def _dropouts(self, units: Tensor) -> dict[str, Parts]:
        """What is left of what each dropout module is given; of one member alone, as others draw none."""
        found: dict[str, Parts] = {}
        for name, labels in self.dropouts.items():
            mask = units[0, labels]
            for axis, size in enumerate(mask.shape):
                along = mask.movedim(axis, 0).reshape(size, -1).any(1)
                if not along.all():
                    found.setdefault(name, {})[axis] = along.nonzero().flatten().to(self.population.device), size
        return found


def _alive(population: Population) -> Tensors:
    """Which entries are not 0, or may become other than 0: bool [members, *shape]."""

    def may_change(name: str, parameter: Tensor) -> Tensor:
        if name not in trainable:
            return torch.zeros_like(parameter, dtype=torch.bool)
        return population.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))

    trainable = population.trainable
    return {name: nonzero(value) | may_change(name, value) for name, value in population.parameters.items()}


def _ints(kinds: Sequence[int]) -> Tensor:
    return torch.tensor(kinds, dtype=torch.long)


def _kinds(units: Units) -> Tensor:
    """A number for each unit, the same for those that have as many entries along each axis of each tensor."""
    kinds = torch.zeros(units.num_units, dtype=torch.long)
    kinds[units.of[units.inputs]] = 1
    kinds[0] = 2
    for link in units.links:
        counts = torch.bincount(link.units, minlength=units.num_units)
        kinds = (kinds * (int(counts.max()) + 1) + counts).unique(return_inverse=True)[1]
    return kinds


class _Spy(nn.Module):
    """Keeps what it is given."""

    def forward(self, given: Tensor) -> Tensor:
        self.given = given
        return given


def _recorded(module: nn.Module, images: Tensor) -> tuple[Units, dict[str, Tensor]]:
    """The units of a module, and the units of what each of its dropout modules is given."""
    names = [name for name, part in module.named_modules() if isinstance(part, DROPOUTS)]
    if names:
        module = copy.deepcopy(module)
        for name in names:
            module.set_submodule(name, _Spy())
    try:
        recorder = recorded(module, images)
    except Exception as error:  # whatever a module may raise on one image, or torch on functions that it cannot watch
        log.info(f"the units of the network are not known: {reason(error)}")
        return Units.none(), {}
    given = {name: getattr(module.get_submodule(name), "given", None) for name in names}
    labels = {name: recorder.slots.value_of(tensor) for name, tensor in given.items()}
    return recorder.units, {name: recorder.units.of[each] for name, each in labels.items() if isinstance(each, Tensor)}


def _taken(population: Population, kept: Mapping[str, Axes], dropouts: Mapping[str, Parts]) -> Population:
    """A population of the kept entries alone, whose module has the numbers of groups that are left."""
    parts = {
        part: {
            name: tensor[_mesh(tensor, kept[name])] if name in kept else tensor
            for name, tensor in getattr(population, part).items()
        }
        for part in PARTS
    }
    parts["masks"] = {name: mask for name, mask in parts["masks"].items() if name not in kept or not mask.all()}
    layouts = dict(population.layouts)
    groups = {}  # of weights of which whole groups went
    for name, tensor in parts["parameters"].items():
        before, layout = population.parameters[name], layouts[name]
        if layout.groups > 1 and tensor.shape[1] < before.shape[1]:
            groups[name] = layout.groups * tensor.shape[1] // before.shape[1]
            layouts[name] = layout._replace(groups=groups[name])
    return replace(population, module=_fitted(population.module, kept, groups, dropouts), layouts=layouts, **parts)


def _fitted(
    module: nn.Module, kept: Mapping[str, Axes], groups: Mapping[str, int], dropouts: Mapping[str, Parts]
) -> nn.Module:
    """A module for tensors of which the kept entries are left; the same one where no number of it changes."""
    sizes: dict[tuple[str, str], int] = {}
    for path, part in module.named_modules():
        name = f"{path}.weight".removeprefix(".")
        if isinstance(part, _ConvNd) and name in groups:
            sizes[path, "groups"] = groups[name]
        elif isinstance(part, nn.GroupNorm | _NormBase) and name in kept:
            key = "num_groups" if isinstance(part, nn.GroupNorm) else "num_features"
            sizes[path, key] = kept[name][0].shape[1]
    if not sizes and not dropouts:
        return module
    module = copy.deepcopy(module)
    for (path, key), size in sizes.items():
        setattr(module.get_submodule(path), key, size)
    for path, axes in dropouts.items():
        module.set_submodule(path, _DropoutOfPart(module.get_submodule(path), axes))
    return module


class _DropoutOfPart(nn.Module):
    """A dropout that draws for the whole tensor of which it is given a part, so that this meets the same as there."""

    def __init__(self, dropout: nn.Module, parts: Parts):
        super().__init__()
        self.dropout, self.parts = dropout, parts

    def forward(self, given: Tensor) -> Tensor:
        """The part, with some of it at 0, and the rest scaled."""
        if not self.training:
            return given
        sizes = [self.parts[axis][1] if axis in self.parts else size for axis, size in enumerate(given.shape)]
        drawn = self.dropout(given.new_ones(sizes))
        for axis, (index, _) in self.parts.items():
            drawn = drawn.index_select(axis, index)
        return given * drawn


def _mesh(tensor: Tensor, axes: Axes) -> tuple[Tensor, ...]:
    """An index into a tensor [members, *shape] of what is kept: its first axes, as far as any of them is cut."""
    count = max(axes) + 1
    whole = [torch.arange(size, device=tensor.device).unsqueeze(0) for size in tensor.shape[1 : count + 1]]

    def along(axis: int) -> Tensor:
        places = axes.get(axis, whole[axis])
        return places.view(len(places), *(-1 if each == axis else 1 for each in range(count)))

    members = torch.arange(len(tensor), device=tensor.device).view(-1, *[1] * count)
    return (members, *map(along, range(count)))


def _trouble(compacted: Compacted, expected: Sequence[tuple[Tensor, Tensors]]) -> str | None:
    """What keeps the networks from giving the same outputs and gradients, in evaluation and in training; or None."""
    agree = all(_agree(compacted, each, training) for each, training in zip(expected, (False, True)))
    return None if agree else "the smaller network computes something else"


def _agree(compacted: Compacted, expected: tuple[Tensor, Tensors], training: bool) -> bool:
    """Whether outputs and gradients are the same on a few images, and 0 where entries were removed."""
    outputs, gradients = expected
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
