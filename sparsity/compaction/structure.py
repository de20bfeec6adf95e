"""Which units of a population's members are dead, and what of each tensor is kept without them."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from sparsity.compaction.fitting import DROPOUTS, Parts, fitted
from sparsity.compaction.slices import Axes, Compacted, taken, whole
from sparsity.data import Splits
from sparsity.errors import reason
from sparsity.graph import Facts, Units
from sparsity.graph.recorder import recorded
from sparsity.graph.slots import concatenated
from sparsity.population import Population
from sparsity.tensors import Tensors, nonzero

log = logging.getLogger("sparsity")
MOST_NAMES = 3  # of tensors, in a message


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
        names = list(dict.fromkeys(found))
        return ", ".join([*names[:MOST_NAMES], *(["…"] if len(names) > MOST_NAMES else [])])

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
        small = taken(self.population, kept)
        module = fitted(self.population.module, kept, small.layouts, self._dropouts(units))
        return Compacted(replace(small, module=module), splits, self.population, kept)

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
