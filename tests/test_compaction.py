"""Dead structure goes without a trace: outputs, gradients and what finetuning makes of the rest stay the same."""

from dataclasses import replace
from functools import partial

import pytest
import sample_networks
import torch
from conftest import context_of, slow
from random_networks import network
from torch import nn
from torch.func import functional_call

from sparsity import models
from sparsity.compaction import Compacted, compact
from sparsity.compaction.checking import responses, trouble
from sparsity.data import Files, Images, Splits
from sparsity.evaluation import evaluate
from sparsity.graph import trace
from sparsity.nodes import Call, StageSchedule
from sparsity.population import PARTS, stack
from sparsity.stages import training
from sparsity.stages.holding import holding_zeros

SIZE = 20  # of an image


class BatchNormed(nn.Module):
    """Two convolutions with batch normalisation, a flatten, and batch normalisation of vectors."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 5, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 5, 5), nn.BatchNorm2d(5)
        self.fc1, self.norm3 = nn.Linear(20, 12), nn.BatchNorm1d(12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, images):
        maps = nn.functional.max_pool2d(self.norm1(self.conv1(images)).relu(), 2)
        maps = nn.functional.avg_pool2d(self.norm2(self.conv2(maps)).relu(), 2)
        return self.fc2(self.norm3(self.fc1(maps.flatten(1))).relu())


class Residual(nn.Module):
    """A block whose inner channels have one reader, beside a branch that joins them again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, stride=2)
        self.one, self.two = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Linear(4, 10)

    def forward(self, images):
        maps = self.first(images).relu()
        maps = (maps + self.two(self.one(maps).relu())).relu()
        return self.out(nn.functional.gelu(self.up(maps)).mean((2, 3)))


class Sigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(SIZE * SIZE, 8), nn.Linear(8, 10)

    def forward(self, images):
        return self.fc2(self.fc1(images.flatten(1)).sigmoid())


class HardCoded(nn.Module):
    """Sizes of its own in its forward pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 5), nn.Linear(256, 10)

    def forward(self, images):
        return self.fc(nn.functional.max_pool2d(self.conv(images).relu(), 2).reshape(-1, 256))


class HardCodedImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(SIZE * SIZE, 8), nn.Linear(8, 10)

    def forward(self, images):
        return self.fc2(self.fc1(images.view(-1, SIZE * SIZE)).relu())


class Tokens(nn.Module):
    """Linear layers on rows of pixels, and a softmax that mixes what one of them gives."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(SIZE, 8), nn.Linear(8, 6), nn.Linear(6, 10)

    def forward(self, images):
        return self.three(self.two(self.one(images.squeeze(1)).relu()).softmax(2)).mean(1)


NETWORKS = {
    "mlp": partial(models.mlp, hidden=[30, 20], input_shape=(1, SIZE, SIZE), num_classes=10),
    "lenet5": partial(models.lenet5, input_shape=(1, SIZE, SIZE), num_classes=10),
    "batch_norm": BatchNormed,
    "residual": Residual,
    "grouped": partial(sample_networks.Normalised, num_classes=10),
    "sigmoid": Sigmoid,
    "tokens": Tokens,
    "hard_coded": HardCoded,
    "hard_coded_images": HardCodedImages,
    "dropout": partial(sample_networks.WithDropout, input_shape=(1, SIZE, SIZE), num_classes=10),
}


def splits(dtype=torch.float64, channels=1, **more):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((96, channels, SIZE, SIZE), generator=generator, dtype=dtype)
    labels = (images[:, :, :, :10].mean((1, 2, 3)) > images[:, :, :, 10:].mean((1, 2, 3))).long()
    part = Images(images, labels)
    return Splits(
        part.take(torch.arange(64)), part.take(torch.arange(64, 80)), part.take(torch.arange(80, 96)), 10, **more
    )


def modules(name, number, dtype=torch.float64):
    found = []
    for seed in range(number):
        torch.manual_seed(seed)
        found.append(NETWORKS[name]().to(dtype))
    return found


def pruned(name, number=1, dtype=torch.float64, share=0.3, seed=0):
    """Members with random zeros, among them whole rows and columns, and biases that live on units without inputs."""
    population = stack(modules(name, number, dtype))
    generator = torch.Generator().manual_seed(seed)

    def mask(tensor):
        kept = torch.rand(tensor.shape, generator=generator) < share
        if tensor.ndim < 3:
            return kept
        rows = torch.rand(tensor.shape[:2], generator=generator) < 0.6
        columns = torch.rand((len(tensor), tensor.shape[2]), generator=generator) < 0.6
        shape = [1] * (tensor.ndim - 3)
        return kept & rows.view(*rows.shape, 1, *shape) & columns.view(len(tensor), 1, -1, *shape)

    kinds = {name: layout.kind for name, layout in population.layouts.items()}
    masks = {name: mask(p) for name, p in population.parameters.items() if kinds[name] != "normalization"}
    parameters = {name: p * masks[name] if name in masks else p for name, p in population.parameters.items()}
    for name, kind in kinds.items():  # trained ones, so that no unit looks like another
        if kind == "normalization":
            parameters[name] = torch.rand(parameters[name].shape, generator=generator, dtype=dtype)
    return replace(population, parameters=parameters, masks=masks)


def response(population, splits, member, training):
    """Outputs, and gradients as far as the masks let them through, of one member."""
    module = population.module.train(training)
    parameters = {name: p[member].clone().requires_grad_() for name, p in population.parameters.items()}
    buffers = {name: b[member].clone() for name, b in population.buffers.items()}
    batch = next(splits.train.batches(torch.arange(64).unsqueeze(0), 64))
    torch.manual_seed(0)
    outputs = functional_call(module, (parameters, buffers), (splits.scale(batch.images)[0],))
    nn.functional.cross_entropy(outputs, batch.labels[0]).backward()
    masks = {name: population.masks[name][member] if name in population.masks else 1 for name in parameters}
    return outputs, {name: p.grad * masks[name] for name, p in parameters.items()}, buffers


def assert_same(compacted, splits):
    full, small = compacted.full, compacted.population
    for member in range(full.num_members):
        for trains in (False, True):
            outputs, gradients, buffers = response(full, splits, member, trains)
            few, spread, statistics = response(small, compacted.splits, member, trains)
            torch.testing.assert_close(few, outputs, rtol=1e-10, atol=1e-12)
            one = replace(full.member(member), parameters={n: torch.zeros_like(g)[None] for n, g in gradients.items()})
            kept = {name: {a: i[member : member + 1] for a, i in axes.items()} for name, axes in compacted.kept.items()}
            back = replace(compacted, kept=kept).fill(
                replace(one, buffers={n: b[member : member + 1] for n, b in full.buffers.items()}),
                replace(
                    small.member(member),
                    parameters={n: g[None] for n, g in spread.items()},
                    buffers={n: b[None] for n, b in statistics.items()},
                ),
            )
            for name, gradient in gradients.items():
                torch.testing.assert_close(back.parameters[name][0], gradient, rtol=1e-8, atol=1e-12)
            assert back.buffers.keys() == buffers.keys()
            for name, after in buffers.items():
                before, found = full.buffers[name][member], back.buffers[name][0]
                is_after = torch.isclose(found, after, rtol=1e-8, atol=1e-12)
                assert (is_after | (found == before)).all() and is_after.sum() >= statistics[name].numel()


def shapes(population):
    return {name: tuple(parameter.shape[1:]) for name, parameter in population.parameters.items()}


@pytest.mark.parametrize(("share", "number"), [(0.03, 3), (0.3, 1), *slow((0.03, 1), (0.3, 3))])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_the_same(name, number, share):
    population, data = pruned(name, number, share=share), splits()
    if name == "dropout" and number > 1:
        pytest.skip("is not stacked")
    compacted = compact(population, data)
    assert_same(compacted, data)
    restored = compacted.restore(compacted.population)
    for part in PARTS:
        before, after = getattr(population, part), getattr(restored, part)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def only(name, live, biases=()):
    """A member of ones where `live` names them by [outputs, inputs], all else held at 0 but some biases."""
    population = stack(modules(name, 1))
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in population.parameters.items()}
    for weight, entries in live.items():
        for output, source in entries:
            masks[weight][0, output, source] = True
    for bias, entry in biases:
        masks[bias][0, entry] = True
    return replace(population, parameters={name: mask.double() for name, mask in masks.items()}, masks=masks)


class Joined(nn.Module):
    """A sum or a concatenation of two layers' channels."""

    def __init__(self, width, how):
        super().__init__()
        self.how, self.one = how, nn.Conv2d(1, width, 3, padding=1)
        self.two = nn.Conv2d(width if how == "sum" else 1, width, 3, padding=1)

    def forward(self, images):
        maps = self.one(images).relu()
        if self.how == "sum":
            return (maps + self.two(maps)).relu()
        return torch.cat([maps, self.two(images)], 1).relu()


class Attending(nn.Module):
    """Heads of attention over rows of pixels, with dropout and a mask of their own, of one width each."""

    def __init__(self, num_heads, dropout=0.0):
        super().__init__()
        self.into, self.attention = nn.Linear(SIZE, 8), nn.MultiheadAttention(8, 4, dropout, batch_first=True)
        self.out = nn.Linear(8, 10)
        if num_heads < 4:
            self.attention.in_proj_weight = nn.Parameter(torch.zeros(6 * num_heads, 8))
            self.attention.in_proj_bias = nn.Parameter(torch.zeros(6 * num_heads))
            self.attention.out_proj.weight = nn.Parameter(torch.zeros(8, 2 * num_heads))

    def forward(self, images):
        rows = self.into(images.squeeze(1))
        later = torch.ones(SIZE, SIZE, dtype=torch.bool, device=rows.device).triu(1)
        return self.out(rows + self.attention(rows, rows, rows, need_weights=False, attn_mask=later)[0]).mean(1)


class Padded(nn.Module):
    def forward(self, maps):
        return nn.functional.pad(maps, (1, 1, 1, 1))


def tail(width, size=1):
    return [nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(width * size * size, 10)]


def first(width, **more):
    return nn.Conv2d(1, width, 3, **more)


REACH = {  # networks of so many units, of which every other one is dead
    "normalised": lambda c: nn.Sequential(first(c, bias=False), nn.BatchNorm2d(c), nn.ReLU(), *tail(c, 2)),
    "by instances": lambda c: nn.Sequential(first(c), nn.InstanceNorm2d(c, affine=True), nn.ReLU(), *tail(c)),
    "by groups": lambda c: nn.Sequential(first(c), nn.GroupNorm(c, c), nn.GELU(), *tail(c)),
    "depthwise": lambda c: nn.Sequential(first(c), nn.ReLU(), nn.Conv2d(c, c, 3, groups=c), nn.ReLU(), *tail(c)),
    "grouped": lambda c: nn.Sequential(
        first(c), nn.Conv2d(c, 2 * c, 3, groups=c), nn.ReLU(), nn.ConvTranspose2d(2 * c, c, 2, groups=c), *tail(c)
    ),
    "sum": lambda c: nn.Sequential(Joined(c, "sum"), *tail(c)),
    "concatenation": lambda c: nn.Sequential(Joined(c, "cat"), *tail(2 * c)),
    "slopes": lambda c: nn.Sequential(first(c), nn.PReLU(c), *tail(c)),
    "dropout": lambda c: nn.Sequential(first(c), nn.Dropout(0.3), nn.Dropout2d(0.2), nn.ReLU(), *tail(c, 2)),
    "padding": lambda c: nn.Sequential(first(c), nn.ReLU(), Padded(), nn.Conv2d(c, 4, 3), *tail(4)),
    "heads": lambda c: Attending(c // 2),
    "heads that drop out": lambda c: Attending(c // 2, 0.3),
}  # fmt: skip


def halved(module, odd=0):
    """The module with every other unit at zero, in all that a unit has: two rows each of what lies in groups of 2."""
    for name, parameter in module.named_parameters():
        rows = parameter.data
        if name.startswith("attention.in_proj"):  # heads of two rows
            rows.view(3, 4, 2, -1)[:, odd::2] = 0
        elif len(rows) == 16:
            rows.view(8, 2, -1)[odd::2] = 0
        elif len(rows) == 8 and not name.startswith(("into", "attention")):
            rows[odd::2] = 0
        else:
            continue
    return module


@pytest.mark.parametrize("name", REACH)
def test_what_is_dead_goes_as_far_as_units_reach(name):
    torch.manual_seed(0)
    data, number = splits(), 1 if "drop" in name or "heads" in name else 2  # torch maps no such
    members = [halved(REACH[name](8).double(), odd) for odd in range(number)]  # other units of each member
    population = stack(members)
    units = trace(population.module, data.example()).units
    compacted = compact(holding_zeros(population, units), data)
    found = {name: len(each[0].flatten()) for name, each in compacted.population.parameters.items()}
    assert found == {name: each.numel() for name, each in REACH[name](4).named_parameters()}
    assert_same(compacted, data)
    assert compacted.restore(compacted.population).module is population.module


def test_units_that_the_module_holds_together_stay_and_others_go():
    class HeldInPart(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = first(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

        def forward(self, images):
            maps = self.one(images).relu().reshape(-1, 8, 18 * 18).unflatten(2, (18, 18))
            return self.out(self.two(maps).relu().mean((2, 3)))

    torch.manual_seed(0)
    compacted = compact(holding_zeros(stack([halved(HeldInPart().double())])), splits())
    found = shapes(compacted.population)
    assert found["one.weight"][0] == 8 and found["two.weight"] == (4, 8, 1, 1) and found["out.weight"] == (10, 4)
    assert_same(compacted, splits())


@pytest.mark.parametrize("first_seed", [0, *slow(*range(20, 320, 20))])
def test_random_networks_train_as_they_would_whole(first_seed):
    """On images that compaction did not compare them on."""
    num_compacted = 0
    for seed in range(first_seed, first_seed + 20):
        module, image = network(seed)
        torch.manual_seed(seed)
        images = torch.randn(24, *image.shape[1:], dtype=torch.double)
        part = Images(images, torch.zeros(len(images), dtype=torch.long))
        data = Splits(part, None, part, 10)
        compacted = compact(holding_zeros(stack([module]), trace(module, image).units), data)
        if compacted.kept:
            data, few = (replace(each, train=each.train.take(torch.arange(8, 24))) for each in (data, compacted.splits))
            assert trouble(replace(compacted, splits=few), responses(compacted.full, data)) is None, seed
            num_compacted += 1
    assert num_compacted >= 5


def test_what_is_dead_by_hand():
    paths = {
        "fc1.weight": [(3, 7), (4, 9), (6, 11)],
        "fc2.weight": [(1, 3), (2, 5), (8, 6)],
        "fc3.weight": [(0, 1), (0, 2)],
    }
    # 3 → 1 → 0 is a path. 4 is read by nothing; 6 is read by 8, which nothing reads; 5 has no input, and feeds 2
    compacted = compact(only("mlp", paths), splits())
    assert compacted.splits.input_shape == (1,)  # pixel 7
    assert list(shapes(compacted.population).values()) == [(1, 1), (1,), (1, 1), (1,), (10, 1), (10,)]
    # with a bias, 5 is a constant that trains, and 2 is as well; the biases of 4 and 8 change nothing
    biases = [("fc1.bias", 5), ("fc1.bias", 4), ("fc2.bias", 8)]
    compacted = compact(only("mlp", paths, biases), splits())
    assert list(shapes(compacted.population).values()) == [(2, 1), (2,), (2, 2), (2,), (10, 2), (10,)]
    assert_same(compacted, splits())


@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm", "residual"])
@pytest.mark.parametrize("biases", ["none", "all"])
def test_layers_that_are_dead_whole(name, biases):
    population = stack(modules(name, 2))
    dead = [
        n for n, layout in population.layouts.items() if layout.kind in ("weight", "bias"[: 4 * (biases == "none")])
    ]
    masks = {n: torch.zeros_like(population.parameters[n], dtype=torch.bool) for n in dead}
    parameters = {n: torch.zeros_like(p) if n in dead else p for n, p in population.parameters.items()}
    compacted = compact(replace(population, parameters=parameters, masks=masks), splits())
    assert compacted.kept and all(p.numel() for p in compacted.population.parameters.values())
    assert_same(compacted, splits())


@pytest.mark.parametrize("name", NETWORKS)
def test_where_nothing_is_dead_nothing_changes(name):
    population, data = stack(modules(name, 1)), splits()
    compacted = compact(population, data)
    assert not compacted.kept and compacted.splits is data
    assert all(compacted.population.parameters[key] is value for key, value in population.parameters.items())


def test_a_zero_that_may_train_is_not_dead():
    population = stack(modules("mlp", 1))
    parameters = {name: torch.zeros_like(p) for name, p in population.parameters.items()}
    assert not compact(replace(population, parameters=parameters), splits()).kept
    for name in ("fc1", "fc2"):
        population.module.get_submodule(name).requires_grad_(False)
    assert compact(replace(population, parameters=parameters), splits()).kept  # frozen ones stay 0


def test_a_constant_that_is_not_0_stays():
    live = {"fc1.weight": [(2, 3)], "fc2.weight": [(0, 2), (0, 5)]}
    compacted = compact(only("sigmoid", live), splits())
    assert shapes(compacted.population)["fc1.weight"] == (2, 1)  # 5 gives sigmoid(0), which the output reads
    assert_same(compacted, splits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pixels_are_scaled_as_their_channel_is(dtype):
    data = splits(torch.float32, 3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    if dtype is torch.uint8:
        data = replace(data, **{name: replace(part, images=(part.images * 255).byte())
                                for name, part in (("train", data.train), ("test", data.test))})  # fmt: skip
    pixels = torch.tensor([1, 399, 400, 799, 801, 1199])
    few = data.keep(pixels)
    expected = data.scale(data.train.images).flatten(1)[:, pixels]
    assert torch.equal(few.scale(few.train.images), expected) and few.input_shape == (6,)


def test_files_are_read_as_their_pixels():
    read = {"a": torch.arange(12).view(3, 2, 2), "b": torch.arange(12, 24).view(3, 2, 2)}
    few = Files(["a", "b"], torch.tensor([0, 1]), (3, 2, 2), read.__getitem__).keep(torch.tensor([0, 5, 11]))
    batch = next(few.batches(torch.tensor([[1, 0]]), 2))
    assert few.shape == (3,) and batch.images.tolist() == [[[12, 17, 23], [0, 5, 11]]]


def finetuned(population, data, seeds, monkeypatch, optimizer, *, dense, **numbers):
    """What finetuning makes of a population, compacted or not."""
    lr = 0.05 if optimizer is torch.optim.SGD else 2e-3
    own = {name: number for name, number in numbers.items() if name != "weight_decay"}
    decay = numbers.get("weight_decay", 0.0)
    arguments = {
        "schedule": StageSchedule(epochs=3, lr=lr, shape="constant", warmup=0.0, weight_decay=decay),
        "optimizer": Call("optimizer", "torch.optim", optimizer, own),
    }
    small, trained, run_loop = [], [], training.run_loop

    def compacted(*given):
        small.append(Compacted(*given, given[0], {}) if dense else compact(*given))
        return small[0]

    def looped(*given, **more):
        trained.append(run_loop(*given, **more))
        return trained[0]

    with monkeypatch.context() as patch:
        patch.setattr(training, "compact", compacted)
        patch.setattr(training, "run_loop", looped)
        context = context_of(trace(population.module, data.example()), data, seeds)
        outcome = training.train(population, context, **arguments, batch_size=16, hold="zeros", select=True)
    return replace(trained[0], last=small[0].restore(trained[0].last), selected=outcome.population)


# a large eps: Adam would make much of a gradient that is 0 but for rounding, such as batch normalisation leaves a bias
OPTIMIZERS = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adam": (torch.optim.Adam, {"fused": True, "eps": 1e-3})}
DECAYING = {
    "sgd_decay": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adam_decay": (torch.optim.Adam, {"weight_decay": 0.01, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
}


def assert_alike(one, other, data, atol, live_only=False):
    assert one.selected_epoch == other.selected_epoch and one.diverged == other.diverged
    for left, right in ((one.last, other.last), (one.selected, other.selected)):
        for name, tensor in left.parameters.items():
            assert torch.equal(tensor != 0, right.parameters[name] != 0), name
            if not live_only:
                torch.testing.assert_close(tensor, right.parameters[name], rtol=0, atol=atol)
        assert left.masks.keys() == right.masks.keys()
        assert all(torch.equal(mask, right.masks[name]) for name, mask in left.masks.items())
        assert evaluate(left, data.test, data) == evaluate(right, data.test, data)
        for member in range(left.num_members):
            outputs, others = (response(each, data, member, False)[0] for each in (left, right))
            torch.testing.assert_close(outputs, others, rtol=0, atol=10 * atol)
    for row, its in zip(one.history, other.history):
        assert (row.validation, row.test, row.lr) == (its.validation, its.test, its.lr)
        assert row.loss == pytest.approx(its.loss, abs=10 * atol) if row.loss else its.loss is None


@pytest.mark.parametrize("dtype", [torch.float64, *slow(torch.float32)])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "sgd_decay", "adamw"])
@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_finetuning_is_the_same(monkeypatch, name, optimizer, dtype):
    population, data = pruned(name, dtype=dtype), splits(dtype)
    function, numbers = {**OPTIMIZERS, **DECAYING}[optimizer]
    one, other = (
        finetuned(population, data, [5], monkeypatch, function, dense=dense, **numbers) for dense in (False, True)
    )
    atol = 1e-7 if dtype is torch.float64 else 1e-4
    assert_alike(one, other, data, atol, live_only=optimizer in DECAYING)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *DECAYING])
@pytest.mark.parametrize("name", [*NETWORKS])
def test_finetuning_is_the_same_for_all(monkeypatch, name, optimizer):
    test_finetuning_is_the_same(monkeypatch, name, optimizer, torch.float64)


@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_what_was_removed_comes_back_as_it_was(monkeypatch, name):
    population, data = pruned(name), splits()
    trained = finetuned(population, data, [5], monkeypatch, torch.optim.SGD, dense=False, weight_decay=0.1)
    compacted = compact(population, data)
    ones = replace(
        compacted.population,
        parameters={name: torch.zeros_like(p) for name, p in compacted.population.parameters.items()},
    )
    is_removed = {name: p != 0 for name, p in compacted.restore(ones).parameters.items()}
    assert any(removed.any() for removed in is_removed.values())  # such as the biases of unread units
    for name, removed in is_removed.items():
        assert torch.equal(trained.last.parameters[name][removed], population.parameters[name][removed])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_a_population_is_its_members(monkeypatch, name, optimizer):
    population, data = pruned(name, 3), splits()
    function, numbers = OPTIMIZERS[optimizer]
    together = finetuned(population, data, [1, 2, 3], monkeypatch, function, dense=False, **numbers)
    for member in range(3):
        alone = finetuned(population.member(member), data, [1 + member], monkeypatch, function, dense=False, **numbers)
        for name, tensor in alone.last.parameters.items():
            assert torch.equal(tensor != 0, together.last.member(member).parameters[name] != 0)
            torch.testing.assert_close(tensor, together.last.member(member).parameters[name], rtol=0, atol=1e-7)
        assert alone.history[-1].validation == [together.history[-1].validation[member]]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "lenet5"])
def test_the_whole_pipeline(run, monkeypatch, model):
    overrides = [f"model={model}", "precision=float32", "sensitivity=0.8", "plots=false"]
    compacted = run(*overrides)
    monkeypatch.setattr(training, "compact", lambda population, splits: Compacted(population, splits, population, {}))
    dense = run(*overrides)
    for key in ("nonzero", "total", "macs", "structure", "layers"):
        one, other = compacted[key], dense[key]
        if key == "layers":  # of the weights themselves, rounding is all that differs
            one, other = ([{**row, "std": None} for row in rows] for rows in (one, other))
        assert one == other
    for stage in ("pruned", "selected", "last", "final"):
        assert compacted["accuracy"][stage]["test"] == pytest.approx(dense["accuracy"][stage]["test"], abs=0.006)
