"""Parameters as the methods see them: which kind each is, and the view [groups, outputs, inputs, positions]."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sparsity.uses import Use, uses

Tensors = dict[str, Tensor]
Kind = Literal["weight", "bias", "normalization", "scale", "other"]

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
LAYERS = (_ConvNd, nn.Linear, nn.Bilinear)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Layout(NamedTuple):
    """How a parameter's axes are to be read."""

    kind: Kind
    groups: int = 1
    transposed: bool = False  # inputs before outputs, as transposed convolutions store them


def layouts(module: nn.Module, images: Tensor | None = None) -> dict[str, Layout]:
    """The layout of every parameter of a module, by the parameter's name.

    A weight is what a linear layer, a convolution, an attention projection or a recurrent layer multiplies; a bias is
    the vector that it adds. What a normalisation layer owns is of it; what multiplies channels or tokens one by one is
    a scale (layer_scale, slopes of PReLU, the lengths of weight normalisation); tokens, embeddings and tables are
    other. A parameter of torch's own layers is known by its layer. Of others, such as those of a custom module,
    a recorded pass over images [batch, *shape] says how they are used (`uses`): what is multiplied as a matrix or a
    kernel is a weight, and so is a factor element by element with two or more axes longer than 1, one number for each
    of its inputs. Without images shapes alone decide: two such axes make a weight, one axis a bias.
    """
    owners = dict(module.named_modules())
    known = {name: _known(owners, name, parameter) for name, parameter in module.named_parameters()}
    found: dict[str, Use] = {}
    if images is not None and None in known.values():
        found = uses(module, images)
    return {
        name: known[name] or (_by_shape(parameter) if images is None else _by_use(parameter, found.get(name)))
        for name, parameter in module.named_parameters()
    }


def _known(owners: dict[str, nn.Module], name: str, parameter: Tensor) -> Layout | None:
    """The layout of a parameter of torch's own layers, also where it is parametrized; None of any other."""
    path, _, leaf = name.rpartition(".")
    if ".parametrizations." in f".{path}":  # fc.parametrizations.weight.original0 is of fc.weight
        path, _, leaf = path.rpartition("parametrizations.")
        path = path.removesuffix(".")
    owner = owners[path]
    if isinstance(owner, NORMALIZATIONS):
        return Layout("normalization")
    if isinstance(owner, nn.PReLU):
        return Layout("scale")
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Layout("other")
    if (leaf.startswith("bias") and isinstance(owner, (*LAYERS, *RECURRENT))) or leaf == "in_proj_bias":
        return Layout("bias")
    if isinstance(owner, LAYERS) and leaf in ("weight", "weight_orig", "weight_g", "weight_v"):
        if not _is_matrix(parameter) and (leaf == "weight_g" or name.endswith(".original0")):
            return Layout("scale")  # the lengths of weight normalisation
        if isinstance(owner, _ConvNd) and parameter.ndim == len(owner.kernel_size) + 2:
            return Layout("weight", owner.groups, isinstance(owner, _ConvTransposeNd))
        return Layout("weight")
    if isinstance(owner, RECURRENT) or (isinstance(owner, nn.MultiheadAttention) and leaf.endswith("proj_weight")):
        return Layout("weight")
    return Layout("other") if isinstance(owner, nn.MultiheadAttention) else None


def _by_use(parameter: Tensor, use: Use | None) -> Layout:
    """The layout that follows from how a pass uses a parameter."""
    if use is None:
        return Layout("other")
    if use.kind == "product" and parameter.ndim > 1 and (use.direct or _is_matrix(parameter)):
        return Layout("weight", 1 if parameter.shape[0] % use.groups else use.groups, use.transposed)
    if use.kind in ("product", "factor"):
        return Layout("weight" if _is_matrix(parameter) else "scale")
    if use.kind == "normalization":
        return Layout("normalization")
    return Layout("bias" if use.kind == "summand" and parameter.ndim < 2 else "other")


def _by_shape(parameter: Tensor) -> Layout:
    """The layout that a parameter's shape suggests."""
    if _is_matrix(parameter):
        return Layout("weight")
    return Layout("bias" if parameter.ndim < 2 else "other")


def _is_matrix(parameter: Tensor) -> bool:
    """Whether two axes or more are longer than 1."""
    return sum(size > 1 for size in parameter.shape) > 1


def normalised(module: nn.Module) -> dict[str, str]:
    """The parameters that torch makes a weight of anew in every pass, by name, and what makes it.

    A zero in such a parameter is none in the weight, or a row of zeros is 0 / 0. Lengths of weight normalisation are
    left out: they may be 0.
    """
    found = {}
    for path, owner in module.named_modules():
        makers = getattr(owner, "parametrizations", {}) if parametrize.is_parametrized(owner) else {}
        made = {f"parametrizations.{name}.": type(maker[0]).__name__ for name, maker in makers.items()}
        hooks = [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
        made |= {f"{hook.name}_": type(hook).__name__ for hook in hooks}
        for name, _ in owner.named_parameters():
            for start, maker in made.items():
                if name.startswith(start) and not name.endswith(("_g", "original0")):
                    found[f"{path}.{name}".removeprefix(".")] = MAKERS.get(maker, maker)
    return found


MAKERS = {
    "_WeightNorm": "torch.nn.utils.parametrizations.weight_norm",
    "_SpectralNorm": "torch.nn.utils.parametrizations.spectral_norm",
    "_Orthogonal": "torch.nn.utils.parametrizations.orthogonal",
    "WeightNorm": "torch.nn.utils.weight_norm",
    "SpectralNorm": "torch.nn.utils.spectral_norm",
}


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


BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def nonzero(tensor: Tensor) -> Tensor:
    """Which entries are not ±0, by their bits: a comparison takes denormals for 0 wherever those are flushed."""
    bits = BITS.get(tensor.dtype)
    return tensor != 0 if bits is None else tensor.detach().view(bits) << 1 != 0


def reread(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """The bits of a tensor as numbers of another kind of the same size, without a gradient; members may be mapped."""
    return _Reread.apply(tensor.detach(), kind)


class _Reread(torch.autograd.Function):
    """`view(dtype)`, which older torch does not map."""

    @staticmethod
    def forward(tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.view(kind)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        context.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, None], tensor: Tensor, kind: torch.dtype) -> tuple[Tensor, int | None]:
        return reread(tensor, kind), axes[0]


@contextlib.contextmanager
def denormals_kept() -> Iterator[None]:
    """Comparisons that tell denormals from zeros: not flushed, which is each thread's own setting, in one thread."""
    threads = torch.get_num_threads()
    smallest = torch.ones((), dtype=torch.int32).view(torch.float32)
    flushed = not bool(smallest != 0)
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


def bias_of(weight: str) -> str:
    """The name of the bias that stands beside a weight: fc1.weight → fc1.bias."""
    return weight.removesuffix("weight") + "bias"
