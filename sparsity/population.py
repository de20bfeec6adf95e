"""Populations: members of one architecture, stacked; a single run is a population of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsity.tensors import Layout, Tensors, layouts


@dataclass(frozen=True)
class Population:
    """Members that are trained together: every tensor carries them on its first axis."""

    module: nn.Module  # the structure alone: its own tensors are never read
    layouts: dict[str, Layout]
    parameters: Tensors  # [members, *shape]
    buffers: Tensors  # [members, *shape]
    masks: Tensors = field(default_factory=dict)  # bool [members, *shape]; a parameter without one is kept whole

    @property
    def num_members(self) -> int:
        """The number of members."""
        return len(next(iter(self.parameters.values())))

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return next(iter(self.parameters.values())).device

    def clone(self) -> "Population":
        """A population whose tensors can be changed without changing this one's."""
        return self.map(lambda tensor: tensor.detach().clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Population":
        """A population with the function applied to every tensor."""
        parts = {name: {key: function(value) for key, value in getattr(self, name).items()} for name in PARTS}
        return replace(self, **parts)

    def member(self, index: int) -> "Population":
        """One member, as a population of one."""
        return self.map(lambda tensor: tensor[index : index + 1])

    def take(self, members: list[int]) -> "Population":
        """Some of the members."""
        return self.map(lambda tensor: tensor[members])

    def to(self, device: torch.device | str) -> "Population":
        """The population on a device."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def trainable(self) -> Tensors:
        """The parameters that their module does not freeze."""
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        return {name: parameter for name, parameter in self.parameters.items() if name not in frozen}

    def state(self, index: int) -> Tensors:
        """One member's `state_dict`, on the CPU: a tied tensor under each of its names."""
        tensors = {**self.parameters, **self.buffers}
        own = {id(t): name for name, t in (*self.module.named_parameters(), *self.module.named_buffers())}
        named = {key: tensors[own[id(t)]] for key, t in self.module.state_dict(keep_vars=True).items() if id(t) in own}
        return {key: tensor[index].detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}


PARTS = ("parameters", "buffers", "masks")


def stack(modules: Sequence[nn.Module], device: torch.device | str = "cpu", images: Tensor | None = None) -> Population:
    """The population whose members have the modules' parameters and buffers; the modules must be alike.

    images: a batch that shows which parameters of a custom module are weights.
    """
    first = modules[0]

    def stacked(named: Callable[[nn.Module], Any]) -> Tensors:
        each = [dict(named(module)) for module in modules]
        return {name: torch.stack([tensors[name].detach() for tensors in each]).to(device) for name in each[0]}

    parameters = stacked(lambda module: module.named_parameters())
    return Population(first, layouts(first, images), parameters, stacked(lambda module: module.named_buffers()))


def join(populations: Sequence[Population]) -> Population:
    """One population of all members; those of one architecture. Where one has no mask, and another has, it is whole."""
    first = populations[0]
    if len(populations) == 1:
        return first
    masked = dict.fromkeys(name for each in populations for name in each.masks)
    whole = [
        {name: torch.ones_like(each.parameters[name], dtype=torch.bool) for name in masked} for each in populations
    ]
    populations = [replace(each, masks={**ones, **each.masks}) for each, ones in zip(populations, whole)]
    parts = {
        name: {key: torch.cat([getattr(each, name)[key] for each in populations]) for key in getattr(first, name)}
        for name in ("parameters", "buffers")
    }
    masks = {name: torch.cat([each.masks[name] for each in populations]) for name in masked}
    return replace(first, **parts, masks=masks)


def choose(which: Tensor, new: Population, old: Population) -> Population:
    """The new state of the members where `which` [members] is true, the old state of the others."""

    def pick(left: Tensor, right: Tensor) -> Tensor:
        return torch.where(which.view(-1, *[1] * (left.ndim - 1)), left, right)

    parts = {
        name: {key: pick(value, getattr(old, name)[key]) for key, value in getattr(new, name).items()} for name in PARTS
    }
    return replace(new, **parts)


def over_members(function: Callable[..., Any], num_members: int, in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """A function of one member's tensors, mapped over the first axis of the arguments whose entry in in_axes is 0.

    For one member nothing is mapped, so that it costs what it costs alone.
    """
    if num_members > 1:
        return torch.func.vmap(function, in_dims=tuple(in_axes))

    def alone(*arguments: Any) -> Any:
        members = [tree_map(_first, argument) if axis == 0 else argument for argument, axis in zip(arguments, in_axes)]
        return tree_map(_unsqueeze, function(*members))

    return alone


def _first(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0)


def _unsqueeze(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)
