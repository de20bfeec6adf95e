"""Cuts the dead units out of a network by the lists of what belongs to them, for the tests: a network of its own."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import swin_transformer


def cut(module, units, kept):
    """A copy of a module whose parameters and buffers lack the entries of units that are not kept."""
    small = copy.deepcopy(module)
    tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for link in units.links:
        tensor = tensors[link.name]
        tensors[link.name] = tensor.index_select(link.axis, kept[link.units].nonzero().flatten())
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = small.get_submodule(path)
        is_parameter = leaf in owner._parameters
        setattr(owner, leaf, nn.Parameter(tensor.detach()) if is_parameter else tensor)
    for part in small.modules():
        _adjust(part)
    for part in list(small.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(part, name, Attention(child))
            elif isinstance(child, swin_transformer.ShiftedWindowAttention):
                setattr(part, name, WindowAttention(child))
    return small


def _adjust(part):
    """The sizes that a layer remembers, as its weight has them now."""
    if isinstance(part, nn.Conv2d):
        per_group = part.out_channels // part.groups
        part.groups = 1 if part.groups == 1 else part.weight.shape[0] // per_group
        part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
    elif isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, nn.ConvTranspose2d):
        part.in_channels, part.out_channels = part.weight.shape[:2]
    elif isinstance(part, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        part.num_features = len(part.weight)
    elif isinstance(part, nn.PReLU):
        part.num_parameters = len(part.weight)


def kept_images(images, units, kept):
    """Images [batch, channels, …] without the channels that nothing reads."""
    pixels = kept[units.of[units.inputs]].view(images.shape[1:])
    channels = pixels.flatten(1).any(1)
    assert torch.equal(pixels, channels.view(-1, *[1] * (images.ndim - 2)).expand_as(pixels))
    return images[:, channels]


def attend(queries, keys, values, bias=0.0):
    """softmax(queries · keys / √depth + bias) · values, of [n, heads, positions, depth]."""
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
    return (scores + bias).softmax(3) @ values


class Attention(nn.Module):
    """nn.MultiheadAttention of fewer heads than its inputs' width would have."""

    def __init__(self, given):
        super().__init__()
        self.weight, self.bias, self.out = given.in_proj_weight, given.in_proj_bias, given.out_proj
        self.depth = given.head_dim
        _adjust(self.out)

    def forward(self, tokens, *others, **how):
        """Self-attention of tokens [n, positions, width]."""
        batch, length, _ = tokens.shape
        projected = F.linear(tokens, self.weight, self.bias).view(batch, length, 3, -1, self.depth)
        heads = attend(*projected.permute(2, 0, 3, 1, 4))
        return self.out(heads.transpose(1, 2).reshape(batch, length, -1)), None


class WindowAttention(nn.Module):
    """Swin's attention within shifted windows, of fewer heads than its inputs' width would have."""

    def __init__(self, given):
        super().__init__()
        self.given, self.depth = given, given.qkv.in_features // given.num_heads
        given.num_heads = len(given.qkv.weight) // 3 // self.depth

    def forward(self, maps):
        """maps: [n, height, width, channels]."""
        size, heads = self.given.window_size, self.given.num_heads
        batch, height, width, _ = maps.shape
        tall, wide = (-(-length // side) * side for length, side in zip((height, width), size))
        shift = [0 if side >= length else step for side, length, step in zip(size, (tall, wide), self.given.shift_size)]
        maps = F.pad(maps, (0, 0, 0, wide - width, 0, tall - height)).roll([-step for step in shift], (1, 2))
        windows = _windows(maps, size)
        projected = F.linear(windows, self.given.qkv.weight, self.given.qkv.bias)
        projected = projected.view(*windows.shape[:2], 3, heads, self.depth).permute(2, 0, 3, 1, 4)
        found = attend(*projected, self.given.get_relative_position_bias() + _apart(tall, wide, size, shift, batch))
        found = self.given.proj(found.transpose(1, 2).flatten(2))
        found = found.view(batch, tall // size[0], wide // size[1], *size, -1).transpose(2, 3)
        return found.reshape(batch, tall, wide, -1).roll(shift, (1, 2))[:, :height, :width]


def _windows(maps, size):
    """Maps [n, height, width, channels] as windows [n · windows, positions, channels]."""
    batch, height, width, channels = maps.shape
    split = maps.view(batch, height // size[0], size[0], width // size[1], size[1], channels)
    return split.transpose(2, 3).reshape(-1, size[0] * size[1], channels)


def _apart(tall, wide, size, shift, batch):
    """-100 between positions of a window that the shift brought together from opposite sides."""
    sides = [
        (torch.arange(length) >= length - side).int() + (torch.arange(length) >= length - step).int() * (step > 0)
        for length, side, step in zip((tall, wide), size, shift)
    ]
    region = (3 * sides[0][:, None] + sides[1][None, :]) * int(any(shift))
    own = _windows(region[None, :, :, None].float(), size).squeeze(2)
    return -100.0 * (own[:, None, :, None] != own[:, None, None, :]).float().repeat(batch, 1, 1, 1)
