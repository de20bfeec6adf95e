"""Modules for tensors of which parts are left: what they say of sizes themselves, and draw at random."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sparsity.compaction.slices import Axes
from sparsity.tensors import Layout

Parts = dict[int, tuple[Tensor, int]]  # axis of a tensor → what is kept along it, and its size
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def fitted(
    module: nn.Module, kept: Mapping[str, Axes], layouts: Mapping[str, Layout], dropouts: Mapping[str, Parts]
) -> nn.Module:
    """A module for tensors of which the kept entries are left; the same one where nothing that it says changes.

    layouts: of what is left. dropouts: by module, what is left of what it is given.
    """
    changes: dict[str, Callable[[Any], nn.Module]] = {
        path: partial(_DropoutOfPart, parts=parts) for path, parts in dropouts.items()
    }
    for path, part in module.named_modules():
        start = f"{path}." if path else ""
        own = {name: kept[start + name] for name, _ in part.named_parameters() if start + name in kept}
        if isinstance(part, nn.MultiheadAttention) and 1 in own.get("out_proj.weight", {}):
            changes[path] = partial(_with_heads, places=own["out_proj.weight"][1])
        elif isinstance(part, _ConvNd) and part.groups > 1 and 0 in own.get("weight", {}):
            changes[path] = partial(_with, groups=layouts[f"{start}weight"].groups)
        elif isinstance(part, nn.GroupNorm) and "weight" in own:
            changes[path] = partial(_with, num_groups=own["weight"][0].shape[1])
        elif isinstance(part, _NormBase) and "weight" in own:
            changes[path] = partial(_with, num_features=own["weight"][0].shape[1])
    if not changes:
        return module
    module = copy.deepcopy(module)
    for path, change in changes.items():
        if path:
            module.set_submodule(path, change(module.get_submodule(path)))
        else:
            module = change(module)
    return module


def _with(module: nn.Module, **numbers: int) -> nn.Module:
    """A module with other numbers of its own."""
    for name, number in numbers.items():
        setattr(module, name, number)
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


def _with_heads(attention: nn.MultiheadAttention, places: Tensor) -> nn.Module:
    """The attention of the heads that are left, unless it has more than heads; places: as of `_FewerHeads`."""
    is_plain = attention.bias_k is None and not attention.add_zero_attn
    return _FewerHeads(attention, places) if is_plain else attention


class _FewerHeads(nn.Module):
    """nn.MultiheadAttention of some of the heads, whose dropout draws for all, so that these meet the same as there."""

    _qkv_same_embed_dim = False  # torch's layers then call it, and compute nothing in its place

    def __init__(self, attention: nn.MultiheadAttention, places: Tensor):
        """places: of what the output projection reads, [members, kept]."""
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.q_proj_weight, self.k_proj_weight = attention.q_proj_weight, attention.k_proj_weight
        self.v_proj_weight, self.out_proj = attention.v_proj_weight, attention.out_proj
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.depth, self.num_heads = attention.head_dim, attention.num_heads  # of the whole
        self.heads = places[:, :: self.depth] // self.depth

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """What the heads give; not the weights of them all, which there are not any more."""
        given = [each if each.ndim == 3 else each.unsqueeze(0) for each in (query, key, value)]
        swapped = query.ndim == 3 and not self.batch_first
        given = [each.transpose(0, 1) for each in given] if swapped else given
        weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        weights = weights if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(*each).unflatten(-1, (-1, self.depth)).transpose(1, 2) for each in zip(given, weights, biases)
        )
        added = self._added(attn_mask, key_padding_mask, queries)
        if self.training and self.dropout:
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(self.depth)
            shares = (scores if added is None else scores + added).softmax(-1)
            drawn = F.dropout(shares.new_ones(len(shares), self.num_heads, *shares.shape[2:]), self.dropout)
            found = shares * self._of_heads(drawn) @ values
        else:
            found = F.scaled_dot_product_attention(queries, keys, values, added)
        found = self.out_proj(found.transpose(1, 2).flatten(2))
        found = found.transpose(0, 1) if swapped else found
        return found if query.ndim == 3 else found.squeeze(0), None

    def _added(self, mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one that is added to scores [batch, heads, queries, keys]; None: there is none."""
        if mask is not None and mask.ndim == 3:
            mask = self._of_heads(mask.unflatten(0, (-1, self.num_heads)))
        masks = [each for each in (mask, None if padding is None else padding[..., None, None, :]) if each is not None]
        numbers = [
            torch.zeros_like(each, dtype=like.dtype).masked_fill(each, -math.inf) if each.dtype is torch.bool else each
            for each in masks
        ]
        return sum(numbers[1:], numbers[0]) if numbers else None

    def _of_heads(self, given: Tensor) -> Tensor:
        """Of [batch, all heads, …] those that are left, which are the same ones of each member alone."""
        if len(self.heads) > 1:
            raise ValueError("members have other heads each")
        return given.index_select(1, self.heads[0])
