"""Small networks at random, of every kind that a compact network comes of, and what is dead in them at random.

A network is a list of steps, (kind, seed) each; what a step is made of follows from its seed and from the shape that
it is given, so that any part of the list is a network too: `shrunk` finds the smallest that still fails.
"""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.graph import trace

SHAPES = [(3, 8, 8), (1, 6, 7), (2, 9, 5), (4, 7, 7), (6,), (9,), (5, 4), (4, 6)]  # of images: maps, vectors, tokens


class Do(nn.Module):
    """A function of modules and parameters, which are its own under their names."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, units: Tensor) -> Tensor:
        return self.function(self, units)


class Steps(nn.Module):
    """Steps one after another; the images are kept for those that read them too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()

    def forward(self, images: Tensor) -> Tensor:
        units = images
        for step in self.steps:
            units = step(images, units) if isinstance(step, FromImages) else step(units)
        return units


class FromImages(nn.Module):
    """The images beside the units: joined to them, added to them, or multiplied with them."""

    def __init__(self, how: str, channels: int, shape: tuple[int, ...], width: int):
        super().__init__()
        self.how, self.shape = how, shape
        if how != "cat":
            self.point = nn.Conv2d(channels, width, 1)

    def forward(self, images: Tensor, units: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, self.shape)
        if self.how == "cat":
            return torch.cat([units, small], 1)
        return units + self.point(small) if self.how == "add" else units * self.point(small).sigmoid()


ENTRIES = {
    "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu, "elu": F.elu,
    "softplus": F.softplus, "hardswish": F.hardswish, "leaky": F.leaky_relu, "relu6": F.relu6, "mish": F.mish,
    "exp": lambda x: x.clamp(-2, 2).exp(), "cos": torch.cos, "plus": lambda x: x + 1, "shift": lambda x: x * 2 - 0.5,
    "hardtanh": lambda x: F.hardtanh(x, 0.5, 1.0), "square": lambda x: x.square(), "cube": lambda x: x**3,
    "logsigmoid": F.logsigmoid, "abs": torch.abs, "most": lambda x: torch.maximum(x, torch.full_like(x, 0.1)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x), "filled": lambda x: x.masked_fill(x < 0.1, 0.5),
    "in place": lambda x: F.relu(x.clone(), inplace=True), "dropout": lambda x: F.dropout(x, 0.3, False),
    "reversed": lambda x: 1 - x, "divided": lambda x: 1 / (2 + x.abs()), "gated": lambda x: x * (x > 0),
    "hardsigmoid": F.hardsigmoid, "selu": F.selu, "softsign": F.softsign, "celu": F.celu,
    "root": lambda x: x.abs().sqrt(),
}  # fmt: skip


def entries(dice: random.Random) -> Callable[[Tensor], Tensor]:
    return ENTRIES[dice.choice(list(ENTRIES))]


def activation(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    function = entries(dice)
    return Do(lambda self, x: function(x))


# --- of maps [batch, channels, height, width] ------------------------------------------------------------------------


def conv(dice: random.Random, shape: tuple[int, ...], outs: int = 0, same: bool = False, groups: int = 1) -> nn.Module:
    channels, height, width = shape
    kernel = dice.choice([1, 3, 3]) if same else dice.choice([1, 2, 3, (1, 3), (2, 1)])
    most = max(kernel) if isinstance(kernel, tuple) else kernel
    dilation = dice.choice([1, 1, 1, 2])
    if same:
        padding: object = "same"
    else:
        padding = dice.choice([0, 0, 1]) if (most - 1) * dilation < min(height, width) else 2
        padding = min(padding, 2)
    stride = 1 if same else dice.choice([1, 1, 2])
    kind = dice.choice(["zeros", "zeros", "zeros", "replicate", "reflect"]) if min(height, width) > 4 else "zeros"
    return nn.Conv2d(
        channels, outs or dice.randint(2, 7), kernel, stride, padding, dilation, groups, dice.random() < 0.6, kind
    )


def grouped(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    groups = dice.choice([g for g in (1, 2, 3, 4, shape[0]) if shape[0] % g == 0])
    return conv(dice, shape, groups * dice.randint(1, 3), groups=groups)


def depthwise(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return conv(dice, shape, shape[0] * dice.choice([1, 1, 2]), dice.random() < 0.5, shape[0])


def transposed(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    groups = 2 if shape[0] % 2 == 0 and dice.random() < 0.3 else shape[0] if dice.random() < 0.15 else 1
    stride = dice.choice([1, 2])
    outs = groups * dice.randint(1, 3)
    more = dice.choice([0, stride - 1])
    return nn.ConvTranspose2d(
        shape[0], outs, dice.choice([2, 3]), stride, dice.choice([0, 1]), more, groups, dice.random() < 0.6
    )


def norm(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    channels, affine = shape[0], dice.random() < 0.7
    alone = shape[1] * shape[2] == 1  # torch refuses to normalise one number
    groups = 1 if alone else dice.choice([g for g in (1, 2, 3, channels) if channels % g == 0])
    last = nn.LayerNorm(channels, elementwise_affine=affine)
    return dice.choice(
        [
            nn.BatchNorm2d(channels, affine=affine),
            nn.BatchNorm2d(channels, affine=affine),
            nn.BatchNorm2d(channels, affine=affine, track_running_stats=alone),
            nn.Identity() if alone else nn.InstanceNorm2d(channels, affine=affine),
            nn.GroupNorm(groups, channels, affine=affine),
            nn.LayerNorm(shape, elementwise_affine=affine),
            nn.LayerNorm(shape[1:], elementwise_affine=affine),
            nn.LayerNorm(shape[1:], elementwise_affine=affine),
            nn.LayerNorm(shape[2], elementwise_affine=affine),
            nn.RMSNorm(shape[1:], elementwise_affine=affine),
            Do(lambda self, x: self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), last=last),
        ]
    )


def slopes(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return nn.PReLU(dice.choice([1, shape[0]]))


def residual(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    one, function = conv(dice, shape, shape[0] if dice.random() < 0.6 else 0, True), entries(dice)
    two = nn.Identity() if one.out_channels == shape[0] else nn.Conv2d(shape[0], one.out_channels, 1)
    normed = nn.BatchNorm2d(one.out_channels) if dice.random() < 0.5 else nn.Identity()
    sign = dice.choice([1, 1, -1, 0.5])
    return Do(lambda self, x: self.two(x) + sign * function(self.normed(self.one(x))), one=one, two=two, normed=normed)


def concatenated(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    one, function = conv(dice, shape, 0, True), entries(dice)
    how = dice.choice(["after", "before", "flip", "twice", "zeros", "three"])
    other = conv(dice, shape, 0, True)

    def forward(self: Do, x: Tensor) -> Tensor:
        made = function(self.one(x))
        if how == "zeros":
            return torch.cat([made, torch.zeros_like(made[:, :1])], 1)
        if how == "three":
            return torch.cat([self.other(x), x, made], 1)
        return torch.cat(
            {"after": [x, made], "before": [made, x], "flip": [x, x.flip(2)], "twice": [made, made]}[how], 1
        )

    return Do(forward, one=one, **({"other": other} if how == "three" else {}))


def split(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    channels, function = shape[0], entries(dice)
    at = dice.randint(1, channels - 1) if channels > 1 else 1
    how = dice.choice(["split", "chunk", "slice", "other way", "step", "index"])
    if channels < 2:
        return Do(lambda self, x: x[:, :1] + 0 * x)
    index = torch.tensor([dice.randrange(channels) for _ in range(channels)])

    def forward(self: Do, x: Tensor) -> Tensor:
        if how == "chunk":
            first, *rest = x.chunk(2, 1)
            return torch.cat([function(first), *rest], 1)
        if how == "slice":
            return torch.cat([x[:, at:], function(x[:, :at])], 1)
        if how == "step":
            return x[:, ::2] + function(x[:, ::2])
        if how == "index":
            return x[:, self.index]
        first, second = x.split([at, channels - at], 1)
        return torch.cat([first, function(second)] if how == "split" else [function(second), first], 1)

    return Do(forward, **({"index": index} if how == "index" else {}))


def worked_on(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """A part of the channels goes through a layer, and they are shuffled, as in ShuffleNet; or parts are summed."""
    half = shape[0] // 2
    if shape[0] % 2:
        return activation(dice, shape)
    one, how, function = nn.Conv2d(half, half, 1), dice.choice(["shuffle", "sum", "product", "stack"]), entries(dice)

    def forward(self: Do, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        second = function(self.one(second))
        if how == "shuffle":
            return F.channel_shuffle(torch.cat([first, second], 1), 2)
        if how == "stack":
            return torch.stack([first, second], 2).flatten(1, 2)
        return first + second if how == "sum" else first * second

    return Do(forward, one=one)


def gate(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    channels, small, how = shape[0], dice.randint(1, 4), dice.choice(["squeeze", "own", "glu", "product", "one map"])
    function = dice.choice([torch.sigmoid, F.hardsigmoid, torch.tanh, lambda x: x])
    if how == "squeeze":
        parts = {"one": nn.Conv2d(channels, small, 1), "two": nn.Conv2d(small, channels, 1)}
        act = entries(dice)
        return Do(lambda self, x: x * function(self.two(act(self.one(x.mean((2, 3), keepdim=True))))), **parts)
    if how == "own":
        return Do(lambda self, x: x * function(self.one(x)), one=conv(dice, shape, channels, True))
    if how == "glu":
        return Do(lambda self, x: F.glu(self.one(x), 1), one=conv(dice, shape, 2 * small, True))
    if how == "one map":
        return Do(lambda self, x: x * function(self.one(x)), one=conv(dice, shape, 1, True))
    parts = {"one": conv(dice, shape, small, True), "two": conv(dice, shape, small, True)}
    return Do(lambda self, x: function(self.one(x)) * self.two(x), **parts)


def pool(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    size, ceil = dice.randint(1, 3), dice.random() < 0.5
    if min(shape[1:]) < 4:
        return nn.AvgPool2d(3, 1, 1, count_include_pad=dice.random() < 0.5)
    return dice.choice(
        [
            nn.MaxPool2d(2, ceil_mode=ceil),
            nn.MaxPool2d(3, 2, 1, ceil_mode=ceil),
            nn.MaxPool2d(2, 1, dilation=2),
            nn.AvgPool2d(2, ceil_mode=ceil),
            nn.AvgPool2d(3, 2, 1, ceil_mode=ceil, count_include_pad=dice.random() < 0.5),
            nn.AvgPool2d(3, 1, 1, divisor_override=dice.choice([None, 5])),
            nn.AdaptiveAvgPool2d(size),
            nn.AdaptiveMaxPool2d(size),
            nn.AdaptiveAvgPool2d((size, 3)),
            Do(lambda self, x: F.lp_pool2d(x, 2, 2)),
        ]
    )


def resized(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    channels, big = shape[0], shape[1] * shape[2] > 36
    pads = [
        Do(lambda self, x: F.pad(x, (1, 0, 0, 1))),
        Do(lambda self, x: F.pad(x, (1, 1), value=1.0)),
        Do(lambda self, x: F.pad(x, (1, 1, 1, 1), mode="replicate")),
        Do(lambda self, x: F.pad(x, (0, 0, 0, 0, 1, 2))),  # channels
        Do(lambda self, x: x[:, :, 1:] if x.shape[2] > 1 else x),
        Do(lambda self, x: x.flip(1)),
        Do(lambda self, x: x.flip(3)),
        Do(lambda self, x: x.roll(1, 1)),
        Do(lambda self, x: x.roll(1, 2)),
        Do(lambda self, x: x.transpose(2, 3)),
        Do(lambda self, x: x.repeat(1, 2, 1, 1)),
        Do(lambda self, x: x.repeat_interleave(2, 1)),
    ]
    if channels % 4 == 0:
        pads += [nn.PixelShuffle(2)] * 4
    if channels % 2 == 0:
        pads += [nn.ChannelShuffle(2)] * 2
    if shape[1] % 2 == 0 and shape[2] % 2 == 0 and channels < 6:
        pads += [nn.PixelUnshuffle(2)] * 3
    if not big:
        pads += [nn.Upsample(scale_factor=2)] * 2
        pads += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=dice.random() < 0.5)] * 2
    return dice.choice(pads)


def tables(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """Parameters and buffers beside units: added to them, or multiplied with them."""
    sizes = dice.choice(
        [(shape[0],) + (1,) * (len(shape) - 1), shape, (1, *shape[1:]), (1,) * (len(shape) - 1) + shape[-1:]]
    )
    table = torch.randn(sizes)
    table = nn.Parameter(table) if dice.random() < 0.6 else table
    how = dice.choice(["add", "mul", "sub", "rsub", "div"])
    functions = {
        "add": lambda self, x: x + self.table,
        "mul": lambda self, x: x * self.table,
        "sub": lambda self, x: x - self.table,
        "rsub": lambda self, x: self.table - x,
        "div": lambda self, x: x / (self.table.abs() + 1),
    }
    return Do(functions[how], table=table)


def tied(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    function, how = entries(dice), dice.choice(["chain", "sum", "cat"])
    if len(shape) == 3:
        one: nn.Module = conv(dice, shape, shape[0], True)
    else:
        one = nn.Linear(shape[-1], shape[-1])
    axis = 1 if len(shape) == 3 else -1

    def forward(self: Do, x: Tensor) -> Tensor:
        if how == "chain":
            return self.one(function(self.one(x)))
        both = [self.one(x), self.one(function(x))]
        return torch.cat(both, axis) if how == "cat" else both[0] + both[1]

    return Do(forward, one=one)


def mixing(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """Functions over channels, which hold them all."""
    axis = 1 if len(shape) == 3 else -1
    return dice.choice(
        [
            Do(lambda self, x: x.softmax(axis)),
            Do(lambda self, x: x - x.mean(axis, keepdim=True)),
            Do(lambda self, x: x.cumsum(axis)),
            Do(lambda self, x: F.normalize(x, dim=axis)),
            Do(lambda self, x: x.amax(axis, keepdim=True) + x),
        ]
    )


def flat(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    kinds = [
        nn.Flatten(),
        Do(lambda self, x: x.mean((2, 3))),
        Do(lambda self, x: x.amax((2, 3))),
        Do(lambda self, x: x.sum(3).sum(2)),
        Do(lambda self, x: x.permute(0, 2, 3, 1).flatten(1)),
        Do(lambda self, x: x.mean(3).flatten(1)),
        Do(lambda self, x: x.std((2, 3), correction=0)),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        Do(lambda self, x: x[:, :, 0, -1]),
    ]
    return dice.choice(kinds)


def as_tokens(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return dice.choice(
        [
            Do(lambda self, x: x.flatten(2).transpose(1, 2)),
            Do(lambda self, x: x.flatten(2).transpose(1, 2)),
            Do(lambda self, x: x.permute(0, 2, 3, 1).flatten(1, 2)),
            Do(lambda self, x: x.mean(3)),
            Do(lambda self, x: x.flatten(1, 2)),
        ]
    )


# --- of vectors and of tokens [batch, …, units] ----------------------------------------------------------------------


def linear(dice: random.Random, shape: tuple[int, ...], outs: int = 0) -> nn.Module:
    return nn.Linear(shape[-1], outs or dice.randint(2, 9), dice.random() < 0.7)


def matrix(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    outs = dice.randint(2, 6)
    weight, bias = nn.Parameter(torch.randn(shape[-1], outs)), nn.Parameter(torch.randn(outs))
    if dice.random() < 0.2:
        weight = weight.detach()
    how = dice.choice(["left", "bias", "turned", "product"])
    functions = {
        "left": lambda self, x: x.contiguous() @ self.weight,
        "bias": lambda self, x: x.contiguous() @ self.weight + self.bias,
        "turned": lambda self, x: F.linear(x.contiguous(), self.weight.T, self.bias),
        "product": lambda self, x: torch.einsum("...i,ij->...j", x, self.weight),
    }
    return Do(functions[how], weight=weight, **({"bias": bias} if how in ("bias", "turned") else {}))


def vector_norm(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    size, affine = shape[-1], dice.random() < 0.7
    found = [nn.LayerNorm(size, elementwise_affine=affine), nn.RMSNorm(size, elementwise_affine=affine)]
    if len(shape) == 1:
        found += [nn.BatchNorm1d(size, affine=affine)] * 3
    else:
        turned = nn.BatchNorm1d(size, affine=affine)
        found.append(Do(lambda self, x: self.turned(x.transpose(1, 2)).transpose(1, 2), turned=turned))
    return dice.choice(found)


def block(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    hidden, function = dice.randint(2, 8), entries(dice)
    normed = nn.LayerNorm(shape[-1]) if dice.random() < 0.5 else nn.Identity()
    parts = {"one": nn.Linear(shape[-1], hidden), "two": nn.Linear(hidden, shape[-1]), "normed": normed}
    how = dice.choice(["add", "add", "mul", "cat"])

    def forward(self: Do, x: Tensor) -> Tensor:
        made = self.two(function(self.one(self.normed(x))))
        return x + made if how == "add" else x * made if how == "mul" else torch.cat([x, made], -1)

    return Do(forward, **parts)


def vector_gate(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    size = dice.randint(1, 4)
    how = dice.choice(["glu", "swiglu", "chunk", "own", "scalar"])
    if how in ("glu", "chunk"):
        one = nn.Linear(shape[-1], 2 * size)
        if how == "glu":
            return Do(lambda self, x: F.glu(self.one(x), -1), one=one)
        return Do(lambda self, x: self.one(x).chunk(2, -1)[0].relu() * self.one(x).chunk(2, -1)[1], one=one)
    if how == "swiglu":
        parts = {name: nn.Linear(shape[-1], size, dice.random() < 0.5) for name in ("one", "two")}
        return Do(lambda self, x: F.silu(self.one(x)) * self.two(x), **parts)
    return Do(lambda self, x: x * self.one(x).sigmoid(), one=nn.Linear(shape[-1], 1 if how == "scalar" else shape[-1]))


def vector_slopes(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return nn.PReLU(dice.choice([1, shape[0]]))


def vector_split(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    function = entries(dice)
    if shape[-1] < 2:
        return Do(lambda self, x: torch.cat([x, function(x)], -1))
    at = dice.randint(1, shape[-1] - 1)
    how = dice.choice(["cat", "flip", "stack", "sum"])

    def forward(self: Do, x: Tensor) -> Tensor:
        first, second = x[..., :at], x[..., at:]
        if how == "stack":
            return torch.stack([x, function(x)], -1).flatten(-2)
        if how == "sum":
            return x + function(x.flip(-1))
        return torch.cat([second, function(first)] if how == "flip" else [function(first), second, first], -1)

    return Do(forward)


def attention(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    heads = dice.choice([h for h in (1, 2, 3, 4) if shape[-1] % h == 0])
    bias = dice.random() < 0.7
    own = nn.MultiheadAttention(shape[-1], heads, bias=bias, batch_first=True)
    residual = dice.random() < 0.5

    def forward(self: Do, x: Tensor) -> Tensor:
        found = self.own(x, x, x, need_weights=False)[0]
        return x + found if residual else found

    return Do(forward, own=own)


def encoder(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    heads = dice.choice([h for h in (1, 2, 3, 4) if shape[-1] % h == 0])
    function = dice.choice(["relu", "gelu"])
    first, bias = dice.random() < 0.5, dice.random() < 0.8
    return nn.TransformerEncoderLayer(
        shape[-1], heads, dice.randint(2, 9), 0.0, function, batch_first=True, norm_first=first, bias=bias
    )


def by_hand(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    heads, depth, how = (
        dice.randint(1, 3),
        dice.randint(1, 4),
        dice.choice(["fused", "causal", "einsum", "matmul", "three"]),
    )
    parts: dict = {"both": nn.Linear(shape[-1], 3 * heads * depth, dice.random() < 0.6)}
    if how == "three":
        parts = {name: nn.Linear(shape[-1], heads * depth, dice.random() < 0.6) for name in ("q", "k", "v")}
    parts["merge"] = nn.Linear(heads * depth, shape[-1])

    def forward(self: Do, x: Tensor) -> Tensor:
        if how == "three":
            q, k, v = (part(x).unflatten(2, (heads, depth)).transpose(1, 2) for part in (self.q, self.k, self.v))
        else:
            q, k, v = self.both(x).unflatten(2, (3, heads, depth)).permute(2, 0, 3, 1, 4)
        if how in ("fused", "causal", "three"):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=how == "causal")
        elif how == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            found = torch.einsum("bhij,bhjd->bhid", scores, v)
        else:
            found = ((q @ k.transpose(-1, -2)) / depth**0.5).softmax(-1) @ v
        return self.merge(found.transpose(1, 2).flatten(2))

    return Do(forward, **parts)


def along(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    """A layer along positions: a mixer's, or a convolution."""
    if dice.random() < 0.5:
        one: nn.Module = nn.Linear(shape[0], dice.choice([shape[0], dice.randint(1, 5)]), dice.random() < 0.6)
    else:
        one = nn.Conv1d(shape[-1], dice.randint(1, 6), 1 + 2 * dice.randint(0, 1), padding=1, bias=dice.random() < 0.6)
    return Do(lambda self, x: self.one(x.transpose(1, 2)).transpose(1, 2), one=one)


def token(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    how = dice.choice(["class", "places", "both"])
    first = nn.Parameter(torch.randn(1, 1, shape[-1]))
    places = nn.Parameter(torch.randn(1, shape[0] + (how == "both"), shape[-1]))
    parts = {"class": {"first": first}, "places": {"places": places}, "both": {"first": first, "places": places}}[how]

    def forward(self: Do, x: Tensor) -> Tensor:
        if how != "places":
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return x if how == "class" else x + self.places

    return Do(forward, **parts)


def of_tokens(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return dice.choice(
        [
            Do(lambda self, x: x.mean(1)),
            Do(lambda self, x: x[:, 0]),
            Do(lambda self, x: x.flatten(1)),
            Do(lambda self, x: x.amax(1)),
            Do(lambda self, x: x.transpose(1, 2).flatten(1)),
            Do(lambda self, x: torch.cat([x.mean(1), x.max(1).values], 1)),
            Do(lambda self, x: x.logsumexp(1)),
        ]
    )


def turned(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return Do(lambda self, x: x.transpose(1, 2))


def as_maps(dice: random.Random, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 1:
        outs = dice.randint(1, 3)
        one = nn.Linear(shape[0], outs * 9)
        return Do(lambda self, x: self.one(x).unflatten(1, (outs, 3, 3)), one=one)
    rows = max(r for r in (1, 2, 3) if shape[0] % r == 0)
    return Do(
        lambda self, x: x.transpose(1, 2).unflatten(2, (rows, -1)),
    )


def from_images(dice: random.Random, shape: tuple[int, ...]) -> nn.Module | None:
    return None


MAPS = {
    "conv": conv, "conv 2": conv, "conv 3": conv, "grouped": grouped, "depthwise": depthwise, "transposed": transposed,
    "norm": norm, "norm 2": norm, "activation": activation, "activation 2": activation, "slopes": slopes,
    "residual": residual, "concatenated": concatenated, "split": split, "worked on": worked_on, "gate": gate,
    "pool": pool, "resized": resized, "tables": tables, "tied": tied, "from images": from_images, "mixing": mixing,
}  # fmt: skip
VECTORS = {
    "linear": linear, "linear 2": linear, "linear 3": linear, "matrix": matrix, "norm": vector_norm, "block": block,
    "gate": vector_gate, "activation": activation, "activation 2": activation, "slopes": vector_slopes,
    "tied": tied, "split": vector_split, "tables": tables, "mixing": mixing,
}  # fmt: skip
TOKENS = {
    **VECTORS, "attention": attention, "encoder": encoder, "by hand": by_hand, "along": along, "token": token,
    "turned": turned,
}  # fmt: skip
CHANGES = {"flat": flat, "as tokens": as_tokens, "of tokens": of_tokens, "as maps": as_maps}
EVERY = {"linear": linear}

Recipe = tuple[tuple[int, ...], list[tuple[str, int]]]


def recipe(seed: int) -> Recipe:
    """The shape of the images and the steps of a network at random."""
    dice = random.Random(seed)
    shape = dice.choice(SHAPES)
    rank, steps = len(shape), []

    def some(kinds: dict, most: int) -> list[tuple[str, int]]:
        return [(dice.choice(list(kinds)), dice.randrange(10**6)) for _ in range(dice.randint(1, most))]

    for _ in range(2):
        steps += some({3: MAPS, 2: TOKENS, 1: VECTORS}[rank], 5)
        change = dice.choice(
            {3: ["flat", "flat", "as tokens", ""], 2: ["of tokens", "as maps", ""], 1: ["", "", "as maps"]}[rank]
        )
        if change:
            steps.append((change, dice.randrange(10**6)))
            rank = {"flat": 1, "as tokens": 2, "of tokens": 1, "as maps": 3}[change]
    if dice.random() < 0.7:
        steps += some({3: MAPS, 2: TOKENS, 1: VECTORS}[rank], 2)
    if rank != 3 and dice.random() < 0.8:
        steps.append(("linear", dice.randrange(10**6)))
    return shape, steps


def made(shape: tuple[int, ...], steps: list[tuple[str, int]]) -> Steps:
    """The network of a recipe, in evaluation and in double precision; steps that do not fit are left out."""
    module = Steps()
    units = images = torch.randn(2, *shape)
    for kind, seed in steps:
        dice = random.Random(seed)
        torch.manual_seed(seed)
        if units.ndim == 4 and len(shape) == 3 and kind == "from images":
            how = dice.choice(["cat", "add", "mul"])
            step: nn.Module = FromImages(how, shape[0], tuple(units.shape[2:]), units.shape[1])
        else:
            kinds = {4: MAPS, 3: TOKENS, 2: VECTORS}[units.ndim]
            fits = {"flat": 4, "as tokens": 4, "of tokens": 3}.get(kind, units.ndim)
            if fits != units.ndim or (kind not in kinds and kind not in CHANGES) or kind == "from images":
                continue
            if kind == "as maps" and units.ndim == 4:
                continue
            step = (CHANGES | kinds)[kind](dice, tuple(units.shape[1:]))
        step = step.eval()
        with torch.no_grad():
            try:
                found = step(images, units) if isinstance(step, FromImages) else step(units)
            except (RuntimeError, ValueError):  # what torch does not do, such as reflecting more than there is
                continue
        if found.numel() > 2500 or 0 in found.shape or not found.isfinite().all():
            continue
        module.steps.append(step)
        units = found
    return module.eval().double()


def deadened(module: nn.Module, images: Tensor, seed: int) -> nn.Module:
    """The module with random statistics, and with some of it at zero: entries, rows, columns, layers, whole units."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def some(size: int | torch.Size, share: float) -> Tensor:
        return torch.rand(size, generator=generator) < share

    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                continue
            if tensor.ndim <= 1 and dice.random() < 0.8:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            kinds = ["none", "rows", "rows", "entries", "whole"] + ["columns", "columns", "both", "both"] * (
                tensor.ndim > 1
            )
            kind, share = dice.choice(kinds), dice.choice([0.2, 0.5, 0.8])
            if tensor.ndim == 0 or (kind == "whole" and dice.random() < 0.6):
                continue
            if kind == "whole":
                tensor.zero_()
            if kind in ("rows", "both"):
                tensor[some(tensor.shape[0], share)] = 0
            if kind in ("columns", "both"):
                tensor[:, some(tensor.shape[1], share)] = 0
            if kind == "entries":
                tensor[some(tensor.shape, share)] = 0
        if dice.random() < 0.6:
            units = trace(module, images).units
            if units is not None:
                dead, alive = some(units.num_units, dice.choice([0.2, 0.5, 0.8])), dice.choice(["", "bias", "shift"])
                tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                for link in units.links:
                    tensor = tensors[link.name]
                    if not tensor.is_floating_point() or link.name.endswith("running_var") or link.role == "reads":
                        continue
                    if alive and tensor.ndim == 1:
                        continue
                    tensor.movedim(link.axis, 0)[dead[link.units] & (link.units > 0)] = 0
    return module


def network(seed: int, found: Recipe | None = None) -> tuple[nn.Module, Tensor]:
    """The network of a seed, or of a part of its recipe, with some of it dead; and one image."""
    shape, steps = found or recipe(seed)
    module = made(shape, steps)
    torch.manual_seed(seed)
    image = torch.randn(1, *shape, dtype=torch.double)
    return deadened(module, image, seed), image


def shrunk(seed: int, fails: Callable[[nn.Module, Tensor], object]) -> Recipe:
    """The smallest part of a seed's recipe that still fails in the same way: `fails` gives what is wrong, or None."""
    shape, steps = recipe(seed)
    wrong = fails(*network(seed))
    place = 0
    while place < len(steps):
        fewer = steps[:place] + steps[place + 1 :]
        if fewer and fails(*network(seed, (shape, fewer))) == wrong:
            steps = fewer
        else:
            place += 1
    return shape, steps
