"""Slices of a population's tensors: the smaller population, and the way back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity.data import Splits
from sparsity.population import PARTS, Population

Axes = dict[int, Tensor]  # axis of a tensor → what is kept along it: [members, kept], ascending


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


def whole(population: Population, splits: Splits) -> Compacted:
    """The population as it is."""
    return Compacted(population, splits, population, {})


def taken(population: Population, kept: Mapping[str, Axes]) -> Population:
    """A population of the kept entries alone."""
    parts = {
        part: {
            name: tensor[_mesh(tensor, kept[name])] if name in kept else tensor
            for name, tensor in getattr(population, part).items()
        }
        for part in PARTS
    }
    parts["masks"] = {name: mask for name, mask in parts["masks"].items() if name not in kept or not mask.all()}
    layouts = dict(population.layouts)
    for name, tensor in parts["parameters"].items():
        layouts[name] = layouts[name]._replace(
            groups=_groups(layouts[name].groups, population.parameters[name], tensor)
        )
    return replace(population, layouts=layouts, **parts)


def _groups(groups: int, before: Tensor, after: Tensor) -> int:
    """How many groups of a weight [members, *shape] are left, of which whole ones go."""
    return groups if groups == 1 else groups * after.shape[1] // before.shape[1]


def _mesh(tensor: Tensor, axes: Axes) -> tuple[Tensor, ...]:
    """An index into a tensor [members, *shape] of what is kept: its first axes, as far as any of them is cut."""
    count = max(axes) + 1
    whole = [torch.arange(size, device=tensor.device).unsqueeze(0) for size in tensor.shape[1 : count + 1]]

    def along(axis: int) -> Tensor:
        places = axes.get(axis, whole[axis])
        return places.view(len(places), *(-1 if each == axis else 1 for each in range(count)))

    members = torch.arange(len(tensor), device=tensor.device).view(-1, *[1] * count)
    return (members, *map(along, range(count)))
