"""Parameters as the methods see them: which kind each is, and the view [groups, outputs, inputs, positions]."""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Tensors = dict[str, Tensor]
Kind = Literal["weight", "bias", "normalization"]

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Layout(NamedTuple):
    """How a parameter's axes are to be read."""

    kind: Kind
    groups: int = 1
    transposed: bool = False  # inputs before outputs, as transposed convolutions store them


def layouts(module: nn.Module) -> dict[str, Layout]:
    """The layout of every parameter of a module, by the parameter's name.

    A tensor of two or more axes is a weight, a vector a bias, unless a normalisation layer owns it.
    """
    owners = dict(module.named_modules())
    return {name: _layout(owners[name.rpartition(".")[0]], parameter) for name, parameter in module.named_parameters()}


def _layout(owner: nn.Module, parameter: Tensor) -> Layout:
    if isinstance(owner, NORMALIZATIONS):
        return Layout("normalization")
    if parameter.ndim < 2:
        return Layout("bias")
    if isinstance(owner, _ConvNd):
        return Layout("weight", owner.groups, isinstance(owner, _ConvTransposeNd))
    return Layout("weight")


def to_view(parameter: Tensor, layout: Layout) -> Tensor:
    """A parameter as [groups, outputs, inputs, positions]; a vector of n entries as [1, n, 1, 1]."""
    if parameter.ndim < 2:
        return parameter.reshape(1, -1, 1, 1)
    view = parameter.reshape(layout.groups, parameter.shape[0] // layout.groups, parameter.shape[1], -1)
    return view.transpose(1, 2) if layout.transposed else view


def from_view(view: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_view`: a tensor of the parameter's own shape."""
    if layout.transposed:
        view = view.transpose(1, 2)
    return view.reshape(shape)


def bias_of(weight: str) -> str:
    """The name of the bias that stands beside a weight: fc1.weight → fc1.bias."""
    return weight.removesuffix("weight") + "bias"
