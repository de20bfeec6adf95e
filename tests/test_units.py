"""Units: what a report calls removable is what cutting out really leaves, and nothing is changed by it."""

from functools import partial

import pytest
import torch
from conftest import context_of, rule_node, slow
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import swin_transformer, vision_transformer

from sparsity import models, stages
from sparsity.accounting import account
from sparsity.artifact import Network, cut
from sparsity.graph import Facts, trace
from sparsity.population import stack

FAMILIES = ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet"]
FAMILIES += ["efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t", "shufflenet_v2_x0_5"]
RULES = {"group_threshold": 1e-4, "group_std": 0.02}


def counted(module, images):
    """What torch's own counter counts in one forward pass, in multiply-accumulates."""
    torch.backends.mha.set_fastpath_enabled(False)  # it hides attention from the counter
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            outputs = module.eval()(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2, outputs


def disturbed(module, units, seed=1, share=0.3):
    """The module with everything but some units speaking, and the rows that write those so small that a rule goes."""
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(units.num_units, generator=generator) < share
    dead[0] = False
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                low = 0.5 if name.endswith(("var", "weight")) else 0.1
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator) * 0.1)
            elif "layer_scale" in name:
                tensor.fill_(0.5)
        for link in units.links:
            tensor = tensors[link.name]
            if link.role != "reads" and tensor.ndim > 1:
                tensor.movedim(link.axis, 0)[dead[link.units]] *= 1e-6
    return module


def pruned(module, images, rule, excluded=()):
    population = stack([module], "cpu", images)
    graph, node = trace(module, images), rule_node(rule, exclude=list(excluded))
    return stages.prune(population, context_of(graph), rule=[node], sensitivity=[RULES[rule]]).population, graph


def load(module, population):
    module.load_state_dict({**module.state_dict(), **population.state(0)})
    return module


def assert_cut_is_as_reported(module, images, rule):
    module = disturbed(module.eval(), trace(module, images).units)
    population, graph = pruned(module, images, rule)
    parameters, buffers = ({n: t[0] for n, t in part.items()} for part in (population.parameters, population.buffers))
    report = account(parameters, population.layouts, graph, buffers=buffers)
    module = load(module, population).eval()
    kept = graph.units.kept(Facts({**parameters, **buffers}))
    dense, outputs = counted(module, images[:1])
    left, few = counted(Network(cut(module, images[:1]).program).requires_grad_(False), images[:1])
    assert report.macs["dense"] == dense and report.macs["removable"] == left < dense
    torch.testing.assert_close(few, outputs, rtol=1e-3, atol=1e-4 * outputs.abs().max().item())
    return report, kept


class Branches(nn.Module):
    """A residual sum, a gate, a concatenation, slopes, and grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.one_norm = nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.two = nn.Conv2d(10, 12, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.before, self.grouped = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 8, 3, groups=4)
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12)
        self.slopes = nn.PReLU(8)
        self.point, self.out = nn.Conv2d(16, 8, 1), nn.Linear(24 + 8, 5)

    def forward(self, images):
        maps = self.norm(self.stem(images)).relu()
        maps = maps + self.two(self.one_norm(self.one(maps)).relu())
        gate = self.excite(self.squeeze(maps.mean((2, 3), keepdim=True)).relu()).sigmoid()
        maps = maps * gate
        left, right = self.slopes(self.grouped(self.before(maps).relu())), self.depthwise(maps).relu()
        joined = torch.cat([left, left.flip(2)], 1)
        return self.out(torch.cat([right, self.point(joined).tanh()], 1).amax((2, 3)))


class Table(nn.Module):
    """Layers and a product that read a table of positions, which is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(1, 5, 7, 2))
        self.places = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 6, bias=False))
        self.factor, self.more = nn.Parameter(torch.randn(2, 8)), nn.Linear(8, 6)
        self.one, self.out = nn.Linear(3 * 64, 6), nn.Linear(6, 5)

    def forward(self, images):
        gates = self.places(self.table).flatten(0, 2).mean(0).sigmoid()
        added = self.more(self.table.view(-1, 2) @ self.factor).mean(0)
        return self.out((self.one(images.flatten(1)) * gates + added).relu())


class Shuffled(nn.Module):
    """Channels that are split into halves, brought together again and shuffled."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 1)
        self.out = nn.Linear(16, 5)

    def forward(self, images):
        maps = self.stem(images).relu()
        first, second = maps.split([self.one.out_channels, self.one.in_channels], 1)
        pairs = torch.stack([first, self.one(second).relu()], 2)
        return self.out(pairs.flatten(1, 2).mean((2, 3)))


class Halved(nn.Module):
    """Channels that are split into equal halves, one of which is worked on, as often as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.out = nn.Linear(16, 5)

    def forward(self, images):
        maps = self.stem(images).relu()
        for layer in (self.one, self.two):
            kept, worked_on = maps.chunk(2, 1)
            maps = nn.functional.channel_shuffle(torch.cat([kept, layer(worked_on).relu()], 1), 2)
        return self.out(maps.mean((2, 3)))


class Attending(nn.Module):
    """Patches with a class token and positions, an encoder's layer of torch's, and attention of one's own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.rand(1, 1, 12)), nn.Parameter(torch.rand(1, 5, 12))
        self.encoder = nn.TransformerEncoderLayer(12, 4, 20, 0.0, batch_first=True, norm_first=True)
        self.queries, self.both = nn.Linear(12, 8, bias=False), nn.Linear(12, 16)
        self.merge, self.out = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1) + self.places
        tokens = self.encoder(tokens)
        queries = self.queries(tokens).unflatten(2, (-1, 4))
        keys, values = self.both(tokens).unflatten(2, (2, -1, 4)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", queries, keys).softmax(3)
        tokens = tokens + self.merge(torch.einsum("bhij,bjhd->bihd", scores, values).flatten(2))
        return self.out(tokens[:, 0])


class Mixer(nn.Module):
    """Products along positions, whose cost goes with the channels."""

    def __init__(self):
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, 10, 2, stride=2), nn.Linear(16, 16)
        self.hidden, self.out = nn.Linear(10, 14), nn.Linear(14, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2)
        return self.out(self.hidden(self.tokens(tokens).relu().transpose(1, 2)).relu().mean(1))


class Decoder(nn.Module):
    """Transposed convolutions, pixels that are shuffled, and normalisations over groups and instances."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.instance, self.group = nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(2, 8)
        self.wide, self.last = nn.Conv2d(6, 16, 1), nn.Conv2d(4, 5, 1)

    def forward(self, images):
        maps = self.up(self.group(self.conv(images)).relu())
        maps = nn.functional.pixel_shuffle(self.wide(self.instance(maps).relu()).relu(), 2)
        return self.last(nn.functional.interpolate(maps, scale_factor=0.5)).mean((2, 3))


class Tied(nn.Module):
    """One weight in two places, a matrix of the module's own, and two heads that are summed."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(3 * 64, 12), nn.Linear(12, 12)
        self.matrix, self.bias = nn.Parameter(torch.rand(12, 9)), nn.Parameter(torch.rand(9))
        self.one, self.two = nn.Linear(9, 5), nn.Linear(12, 5)

    def forward(self, images):
        units = self.twice(self.twice(self.first(images.flatten(1)).relu()).relu()).relu()
        return (self.one((units @ self.matrix + self.bias).relu()) + self.two(units)).log_softmax(1)


SMALL = {
    **{"branches": Branches, "shuffled": Shuffled, "attending": Attending, "mixer": Mixer, "decoder": Decoder},
    **{"halved": Halved, "tied": Tied, "table": Table},
    "vision": partial(vision_transformer.VisionTransformer, 8, 4, 1, 3, 12, 20, num_classes=5),
    "windows": partial(swin_transformer.SwinTransformer, [2, 2], 12, [2], [3], [3, 3], num_classes=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["group_threshold", *slow("group_std")])
@pytest.mark.parametrize("name", SMALL)
def test_what_is_removable_is_what_cutting_leaves(name, rule):
    torch.manual_seed(0)
    assert_cut_is_as_reported(SMALL[name](), torch.rand(2, 3, 8, 8), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", slow(*FAMILIES))
def test_families_of_torchvision(name, rule):
    torch.manual_seed(0)
    module = models.torchvision(name=name, input_shape=(3, 64, 64), num_classes=10)
    if name == "vgg11_bn":  # most of its time would go into 100 million weights of its head
        module.avgpool, module.classifier[0] = nn.AdaptiveAvgPool2d(2), nn.Linear(512 * 4, 256)
        module.classifier[3], module.classifier[6] = nn.Linear(256, 128), nn.Linear(128, 10)
    if name == "vit_b_16":
        module.encoder.layers = module.encoder.layers[:4]
    assert_cut_is_as_reported(module, torch.rand(2, 3, 64, 64), rule)


class Chain(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.between = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), between

    def forward(self, images):
        return self.two(self.between(self.one(images))).mean((2, 3))


def report_of(module, images):
    return account(dict(module.named_parameters()), stack([module]).layouts, trace(module, images))


UNKNOWN = {
    "sort": lambda maps: maps.sort(1).values,
    "constant of its size": lambda maps: maps * torch.arange(6.0).view(6, 1, 1),
    "mean of the channels": lambda maps: maps - maps.mean(1, keepdim=True),
    "softmax of the channels": lambda maps: maps.softmax(1),
}


@pytest.mark.parametrize("between", UNKNOWN)
def test_what_cannot_be_cut_is_never_counted_as_gone(between):
    module, images = Chain(UNKNOWN[between]), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        module.one.weight[:4], module.one.bias[:4] = 0, 0
    report, units = report_of(module, images), trace(module, images).units
    assert report.macs["removable"] == report.macs["dense"] > report.macs["pruned"]
    assert bool(units.unknown) is (between in ("sort", "constant of its size"))
    assert units.fixed_rows("one.weight", 6).all() == bool(units.unknown)
    assert units.fixed_rows("two.weight", 5).all()


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        (nn.ReLU6(), 2),
        (nn.Hardtanh(0.5, 1.0), 2),  # a constant, which the bias of what reads it can hold
        (nn.Sigmoid(), 2),
        (nn.Hardswish(), 2),
        (lambda maps: maps + 1, 2),
        (lambda maps: 2 * maps / 3 - 0, 2),
        (lambda maps: nn.functional.pad(maps, (1, 1, 1, 1)), 2),
        (lambda maps: nn.functional.pad(maps, (1, 1, 1, 1), value=1.0), 6),
        (lambda maps: maps.clamp(min=-1) ** 2, 2),
        (lambda maps: maps.exp(), 2),
        (lambda maps: nn.functional.max_pool2d(maps, 2), 2),
        (lambda maps: torch.where(maps > 0, maps, 0.1 * maps), 2),
        (lambda maps: torch.where(maps > 0, maps, 1.0), 2),
        (lambda maps: maps * (maps > 0), 2),
        (lambda maps: maps.masked_fill(maps < 0.1, 0.0), 2),
        (lambda maps: maps.masked_fill(maps < 0.1, 0.5), 2),
        (lambda maps: (maps > 0.1).float(), 2),
        (lambda maps: (maps * maps) ** (maps + 1), 2),
        (nn.GroupNorm(3, 6), 6),
        (nn.BatchNorm2d(6, affine=False), 2),
        (nn.BatchNorm2d(6, affine=False, track_running_stats=False), 2),
    ],
)
def test_a_filter_that_is_zero_goes_where_what_becomes_of_it_is_one_number(between, kept):
    module, images = Chain(between).eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        module.one.weight[:4], module.one.bias[:4] = 0, 0
    assert report_of(module, images).structure_removable == str(kept)


def test_a_filter_goes_that_nothing_reads_and_one_that_feeds_no_other():
    module, images = (
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
        torch.rand(2, 4),
    )
    with torch.no_grad():
        module[4].weight[:, 1] = 0
        module[2].weight[:] = torch.eye(3)
        module[0].weight[0, :3], module[0].weight[2, :3] = 0, 0
    report = report_of(module, images)
    assert report.structure_removable == "1-2-2" and report.macs["removable"] == 1 * 2 + 2 * 2 + 2 * 2


def test_what_belongs_to_a_unit():
    module, images = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)),
        torch.rand(2, 1, 4, 4),
    )
    units = trace(module.eval(), images).units
    unit = next(int(link.units[1]) for link in units.links if link.name == "0.weight" and link.axis == 0)
    assert sorted(units.entries(unit)) == [
        ("0.bias", 0, [1], "writes"),
        ("0.weight", 0, [1], "writes"),
        ("1.bias", 0, [1], "scales"),
        ("1.running_mean", 0, [1], "scales"),
        ("1.running_var", 0, [1], "scales"),
        ("1.weight", 0, [1], "scales"),
        ("3.weight", 1, [4, 5, 6, 7], "reads"),
    ]


@pytest.mark.parametrize("module", [nn.LSTM(4, 6, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)])
def test_layers_that_give_more_than_their_outputs_are_watched(module):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, tokens):
            return (self.module(tokens) if isinstance(module, nn.LSTM) else self.module(tokens, tokens, tokens))[0]

    graph = trace(Whole(), torch.rand(2, 5, 4))
    assert graph.units is not None
    right = 5 * 4 * 6 * (4 + 6) if isinstance(module, nn.LSTM) else 5 * 4 * 16 + 2 * 5 * 5 * 4
    assert report_of(Whole(), torch.rand(2, 5, 4)).macs["dense"] == right


@pytest.mark.parametrize("where", ["in a part", "whole", "before a view is used"])
def test_what_is_changed_in_place_is_not_forgotten(where):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.two = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, units):
            found, more = self.one(units), self.other(units)
            view = found[:, :]
            if where == "in a part":
                found[:, :3] += more[:, :3]
            else:
                found += more
            return self.two(view if where == "before a view is used" else found)

    module, units = InPlace(), torch.rand(2, 4)
    with torch.no_grad():
        module.one.weight[:], module.one.bias[:] = 0, 0
    assert report_of(module, units).macs["removable"] >= 4 * 6 + 6 * 2  # two reads what other gives


@pytest.mark.parametrize("given", [True, False])
def test_what_a_buffer_multiplies_is_counted(given):
    class Transformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(5, 2)
            self.register_buffer("matrix", torch.rand(6, 5))

        def forward(self, units):
            return self.two(self.one(units) @ self.matrix)

    module, units = Transformed(), torch.rand(2, 4)
    with torch.no_grad():
        module.one.weight[0], module.one.bias[0] = 0, 0
        module.two.weight[:, 0] = 0
    buffers = dict(module.named_buffers()) if given else None
    parameters = dict(module.named_parameters())
    report = account(parameters, stack([module]).layouts, trace(module, units), buffers=buffers)
    assert report.macs["dense"] == counted(module, units[:1])[0] == 24 + 30 + 10
    assert report.macs["removable"] == 20 + 5 * 4 + 8
