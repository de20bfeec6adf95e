"""Weights that are stored as several tensors, put together as their modules do it: masks, weight norm."""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from sparsity.tensors import Tensors

PARAMETRIZED = re.compile(r"(?P<owner>|.*\.)parametrizations\.(?P<leaf>[^.]+)\.original(?P<which>|0|1)")


def plain(tensors: Tensors, own: Collection[str]) -> tuple[Tensors, dict[str, str]]:
    """The tensors with each `x_orig` × `x_mask`, and g·v/‖v‖, under the one name `x`; what cannot be, and why not.

    torch.nn.utils.prune stores x_orig and x_mask; weight norm x_g and x_v, or as a parametrization original0 and 1.
    own: the module's names: a form that the module itself is in stays.
    """
    leaves = {name.rpartition(".")[2] for name in own}
    found, obstacles = dict(tensors), {}

    def put(name: str, tensor: Tensor | None, *parts: str) -> None:
        if tensor is not None and name not in tensors:
            for part in parts:
                del found[part]
            found[name] = tensor

    for name in tensors:
        stem, _, form = name.rpartition("_")
        if name.rpartition(".")[2] in leaves:
            continue
        if form == "orig" and f"{stem}_mask" in tensors:
            put(stem, _masked(tensors[name], tensors[f"{stem}_mask"]), name, f"{stem}_mask")
        elif form == "orig" and f"{stem}_u" in tensors:
            obstacles[stem] = "is under spectral_norm: torch.nn.utils.remove_spectral_norm before saving"
        elif form == "g" and f"{stem}_v" in tensors:
            put(stem, _normed(tensors[f"{stem}_v"], tensors[name]), name, f"{stem}_v")
        elif match := PARAMETRIZED.fullmatch(name):
            stem, inside = match["owner"] + match["leaf"], f"{match['owner']}parametrizations.{match['leaf']}."
            parts = [part for part in tensors if part.startswith(inside)]
            if match["which"] == "0" and sorted(parts) == [f"{inside}original0", f"{inside}original1"]:
                put(stem, _normed(tensors[f"{inside}original1"], tensors[name]), *parts)
            if stem not in found and match["which"] != "1":
                obstacles[stem] = (
                    "is parametrized: torch.nn.utils.parametrize.remove_parametrizations(module, "
                    f"{match['leaf']!r}) before saving"
                )
    return found, obstacles


def _masked(original: Tensor, mask: Tensor) -> Tensor | None:
    """The product that torch.nn.utils.prune computes before each forward pass."""
    return original * mask.to(original.dtype) if original.shape == mask.shape else None


def _normed(direction: Tensor, length: Tensor) -> Tensor | None:
    """g·v/‖v‖ over all axes but the one that the lengths lie on, by the function that weight norm itself calls."""
    if length.ndim == 0:
        axes = [-1]
    else:
        wanted = list(length.shape)
        axes = [
            axis
            for axis in range(direction.ndim)
            if wanted == [size if here == axis else 1 for here, size in enumerate(direction.shape)]
        ]
    if not axes or not direction.is_floating_point() or direction.layout is not torch.strided:
        return None
    if direction.dtype is not torch.float64:  # as it is computed here
        direction, length = direction.float(), length.float()
    return torch._weight_norm(direction, length, axes[0])
