"""Compact networks: exact, small as reported, the same from their file; hostile files are refused in one line."""

import json
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import sparsity
from sparsity import artifact, models
from sparsity.artifact import About, Network, UnrecordableError, cut, file
from sparsity.artifact.coding import DamagedError, coded, decoded
from sparsity.errors import WeightsError
from sparsity.graph import Facts, trace
from sparsity.results.__main__ import main
from sparsity.weights import write_state

# --- what is cut -----------------------------------------------------------------------------------------------------


def zeroed(module, share, seed=0):
    """The module with a share of each weight's rows at zero, their biases as they are, and of single entries too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand(len(parameter), generator=generator) < share] = 0
                parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return module.eval()


def assert_same(module, images):
    found = cut(module, images[:1])
    with torch.no_grad():
        expected, outputs = module(images), Network(found.program)(images)
        whole = Network(found.dense())(images)
    scale = expected.abs().max().item()
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5 * scale)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lenet300", "lenet5", "resnet20"])
def test_outputs_are_those_of_the_masked_network(name, seed):
    shape = (3, 32, 32) if name == "resnet20" else (1, 28, 28)
    module = zeroed(getattr(models, name)(input_shape=shape, num_classes=10), 0.4, seed)
    found = assert_same(module, torch.rand(3, *shape))
    dense = sum(parameter.numel() for parameter in module.parameters())
    assert sum(tensor.numel() for tensor in found.program.tensors.values()) < dense and not found.stays


def test_a_constant_is_in_the_bias_of_what_reads_it():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        module[0].weight[1], module[0].bias[1] = 0, 2.0
    found = assert_same(module, torch.rand(5, 4))
    tensors = found.program.tensors
    assert [tuple(tensors[name].shape) for name in ("0.weight", "0.bias", "2.weight")] == [(2, 4), (2,), (2, 2)]
    torch.testing.assert_close(tensors["2.weight.folded"], 2 * module[2].weight[:, 1])


def test_a_constant_stays_where_padding_meets_it():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(), nn.LazyLinear(3))
    module(torch.rand(1, 1, 8, 8))
    with torch.no_grad():
        module[0].weight[:2], module[0].bias[0], module[0].bias[1] = 0, 1.0, 0.0
    found = assert_same(module.eval(), torch.rand(5, 1, 8, 8))
    assert found.program.tensors["0.weight"].shape[0] == 3  # ReLU(1) gives more inside than at the edges


def test_pixels_that_nothing_reads_are_left_out():
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 5)).eval()
    with torch.no_grad():
        module[1].weight[:, 100:] = 0
    found = assert_same(module, torch.rand(2, 1, 28, 28))
    assert found.program.tensors["1.weight"].shape == (5, 100)


def test_a_network_of_which_all_is_dead_gives_its_biases():
    module = models.lenet5(input_shape=(1, 28, 28), num_classes=10).eval()
    with torch.no_grad():
        module.conv2.weight.zero_()
    found = assert_same(module, torch.rand(3, 1, 28, 28))
    assert [call.name for call in found.program.calls] == ["reshape", "expand", "log_softmax"]


def test_units_that_a_function_holds_together_stay_and_it_is_said_why():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, inputs):
            return self.two(self.one(inputs).relu().cumsum(1))

    module = Sorted().eval()
    with torch.no_grad():
        module.one.weight[:3], module.one.bias[:3] = 0, 0
    found = assert_same(module, torch.rand(3, 4))
    assert found.program.tensors["one.weight"].shape == (6, 4)


class Of(nn.Module):
    """A function of layers, which are called by their names."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, images):
        return self.function(images, **self.layers)


def two(**more):
    return {"one": nn.Linear(4, 6), "two": nn.Linear(6, 3), **more}


SMALL = {
    "a mean of channels, which is no constant": lambda: Of(
        lambda x, one, two: two((y := one(x).relu()) - y.mean(1, keepdim=True)), **two()
    ),
    "a softmax of constants": lambda: Of(lambda x, one, two: two(one(x).softmax(1)), **two()),
    "a product that has no bias": lambda: Of(
        lambda x, one, two: torch.einsum("bni,ji->bnj", one(x).sigmoid().unsqueeze(1), two.weight)[:, 0], **two()
    ),
    "gated units": lambda: Of(lambda x, one, two: two(nn.functional.glu(one(x), -1)), **two(two=nn.Linear(3, 3))),
    "units as maps": lambda: nn.Sequential(nn.Linear(4, 18), nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 1)),
    "an index into the images": lambda: Of(
        lambda x, one, two: two(one(x[:, torch.tensor([3, 1, 0, 0])]).relu()), **two()
    ),
    "halves of the images": lambda: Of(lambda x, one, two: two(one(x.chunk(2, 1)[1])), **two(one=nn.Linear(2, 6))),
    "one number": lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name, double):
    for seed in range(6):
        torch.manual_seed(seed)
        module = zeroed(SMALL[name](), 0.4, seed)
        images = torch.randn(3, 4)
        assert_same(module.double() if double else module, images.double() if double else images)


def test_what_is_divided_by_goes_without_an_infinity():
    module = Of(lambda x, one, two: two(one(x) / two.weight[0].abs().add(1)), **two())
    module.register_parameter("scale", nn.Parameter(torch.rand(6) + 1))
    module.function = lambda x, one, two: two(one(x) / module.scale)
    with torch.no_grad():
        module.layers["one"].weight[:3], module.layers["two"].weight[:, :3] = 0, 0
    assert_same(module.eval(), torch.rand(3, 4))


def test_channels_of_the_images_go_from_a_depthwise_convolution():
    module = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Flatten(), nn.Linear(6 * 4, 2)).eval()
    with torch.no_grad():
        module[0].weight[2:4] = 0
    found = assert_same(module, torch.rand(2, 3, 4, 4))
    assert found.program.tensors["0.weight"].shape[0] == 4


def test_a_compact_network_is_its_own():
    module = models.lenet300(input_shape=(1, 28, 28), num_classes=10).eval()
    network = Network(cut(module, torch.rand(1, 1, 28, 28)).program)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(parameter.any() for name, parameter in module.named_parameters() if name.endswith("weight"))


class OfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs * (1.0 if len(inputs) == 2 else 2.0))


class Twice(nn.Module):
    def forward(self, inputs):
        return inputs, inputs


@pytest.mark.parametrize("module", [OfTheBatch(), Twice()])
def test_what_a_recording_does_not_tell_is_refused(module):
    with pytest.raises(UnrecordableError):
        cut(module.eval(), torch.rand(1, 4))


def test_a_tensor_changed_under_a_view_is_not_recorded():
    class Changing(nn.Module):
        def forward(self, inputs):
            part = inputs * 2
            part[:, :2].mul_(3)
            return part + 1

    with pytest.raises(UnrecordableError):
        cut(Changing(), torch.rand(1, 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_normalisation_is_in_the_convolution_before_it(affine, bias):
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4), nn.Flatten(),
    )  # fmt: skip
    for norm in (module[1], module[4], module[6]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    program, images = cut(module.eval(), torch.rand(1, 3, 8, 8)).program, torch.rand(4, 3, 8, 8)
    fused = program.fused()
    assert [sum(call.name == "batch_norm" for call in each.calls) for each in (program, fused)] == [3, 1]
    with torch.no_grad():
        torch.testing.assert_close(Network(fused)(images), module(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Network(program)(images), module(images), rtol=1e-4, atol=1e-5)


def test_a_convolution_that_something_else_reads_too_stays_as_it_is():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.norm.running_var.fill_(3.0)

        def forward(self, images):
            maps = self.conv(images)
            return (self.norm(maps) + maps).flatten(1)

    module, images = Both().eval(), torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(Network(cut(module, images[:1]).program.fused())(images), module(images))


def test_it_trains():
    module = zeroed(models.lenet300(input_shape=(1, 28, 28), num_classes=10), 0.5)
    network, images = Network(cut(module, torch.rand(1, 1, 28, 28)).program), torch.rand(8, 1, 28, 28)
    for each in (module, network):
        each(images).square().sum().backward()
    units = trace(module, images).units
    kept = units.kept(Facts(dict(module.named_parameters())))
    (link,) = [each for each in units.links if (each.name, each.axis) == ("fc3.weight", 1)]
    own = dict(zip(network.places, network.parameters()))["fc3.weight"].grad
    torch.testing.assert_close(own, module.fc3.weight.grad[:, kept[link.units]], rtol=1e-3, atol=1e-4)


# --- tensors in few bytes --------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=3), st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]), st.sampled_from(DTYPES))
def test_a_tensor_is_what_it_was_bit_for_bit(shape, density, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    tensor = torch.randn(shape, generator=generator) * 100 * (torch.rand(shape, generator=generator) < density)
    tensor = tensor.to(dtype)
    about, parts = coded("name", tensor)
    found = decoded("name", json.loads(json.dumps(about)), parts)
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_the_smallest_form_is_taken():
    tensor = torch.zeros(1000, 1000)
    assert sum(part.nbytes for part in coded("w", tensor)[1].values()) < 2000
    tensor.view(-1)[::50] = 1.0
    about, parts = coded("w", tensor)
    assert about["form"] == "gaps" and sum(part.nbytes for part in parts.values()) < 20_000 * 5
    assert coded("w", torch.rand(100, 100))[0]["form"] == "dense"
    assert coded("w", torch.rand(100, 100) * (torch.rand(100, 100) < 0.5))[0]["form"] == "bits"
    far = torch.zeros(3000)
    far[[0, 255, 256, 2999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(decoded("w", *coded("w", far)), far)


def test_denormals_are_kept_and_nan_too():
    tensor = torch.zeros(4000)
    tensor[7], tensor[8] = 1e-40, float("nan")
    torch.set_flush_denormal(True)
    try:
        found = decoded("w", *coded("w", tensor))
    finally:
        torch.set_flush_denormal(False)
    assert found[7].item() == tensor[7].item() != 0 and found[8].isnan() and int((found != 0).sum()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [7, 7]},
        {"shape": [-1, 10]},
        {"shape": "ten"},
        {"dtype": "float31"},
        {"form": "secret"},
        {"deflated": 10**15},
        {"deflated": 3},
        {"deflated": "x"},
    ],
)
def test_parts_that_are_not_what_is_said(change):
    tensor = torch.zeros(100, 100)
    tensor[::7, 3] = 1.0
    about, parts = coded("w", tensor)
    with pytest.raises(DamagedError):
        decoded("w", about | change, parts)
    with pytest.raises(DamagedError):
        decoded("w", about, {})


def in_few_values(form, shape=(12, 40), density=0.3):
    """A tensor of 8 values, or of whole numbers times a scale of each output or input."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    if form == "book":
        return (drawn * 2).round().clamp(-4, 4) * 0.1 + 0.0
    scale = drawn.abs().amax([axis for axis in range(drawn.ndim) if axis != form], keepdim=True) / 127
    return (drawn / scale.clamp_min(1e-9)).round() * scale + 0.0


FORMS = {"book": "book", "outputs": 0, "inputs": 1}


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(150, 500), (20, 30, 5, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_few_values_are_kept_by_codes(form, shape, density):
    tensor = in_few_values(FORMS[form], shape, density)
    for each in (tensor, tensor[:, 3:], tensor[5:]):  # whose largest entries may have gone
        about, parts = coded("w", each)
        assert torch.equal(decoded("w", json.loads(json.dumps(about)), parts).view(torch.int32), each.view(torch.int32))
        there = int((each != 0).sum())
        assert about["values"]["form"] == ("book" if form == "book" else "scaled")
        size = sum(part.nbytes for name, part in parts.items() if not name.endswith((".bits", ".gaps")))
        assert size < (0.5 if form == "book" else 1.0) * there + 4 * max(shape[:2]) + 40


def test_numbers_of_their_own_are_kept_as_they_are():
    tensor = torch.rand(40, 50)
    off = in_few_values(0)
    off *= 1 + 1e-5 * torch.rand(off.shape)
    for each in (tensor, tensor.double(), off, torch.full((3, 3), 1e-42), torch.full((40, 9), torch.nan)):
        about, parts = coded("w", each)
        found = decoded("w", about, parts)
        same = found.isnan() & each.isnan() | (found == each)
        assert same.all() and about.get("values", {}).get("form") != "scaled"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        {"values": {"form": "secret"}},
        {"values": "book"},
        {"values": {"deflated": 10**15}},
        {"values": {"deflated": 3}},
        {"values": {"deflated": "x"}},
        {"values": {"axis": 5}},
        {"values": {"axis": [0]}},
        {"shape": [7, 7]},
        {"form": "dense"},
        {"form": "places"},
        {"form": "values"},
        {"dtype": "float64"},
        {"dtype": "int64"},
    ],
)
def test_codes_that_are_not_what_is_said(form, change):
    about, parts = coded("w", in_few_values(FORMS[form], (100, 300), 0.05))
    if isinstance(change.get("values"), dict):
        if "axis" in change["values"] and form == "book":
            return
        change = {"values": about["values"] | change["values"]}
    for said, some in (
        (about | change, parts),
        (about, {}),
        *((about, {**parts, name: parts[name][:-1]}) for name in parts),
    ):
        with pytest.raises(DamagedError):
            decoded("w", said, some)
    with pytest.raises(DamagedError):
        decoded("w", about, {name: part.double() for name, part in parts.items()})


def test_a_file_of_codes_is_of_a_format_of_its_own(written, monkeypatch, tmp_path):
    path, module = written
    assert described(path)["format"] == 1  # as older programs read it
    for name in ("fc1", "fc2", "fc3"):
        weight = getattr(module, name).weight
        weight.data.copy_(in_few_values("book", tuple(weight.shape)))
    artifact.write(path, cut(module, torch.rand(1, 1, 28, 28)), About((1, 28, 28)))
    assert described(path)["format"] == 2
    images = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        for each in (sparsity.load(path), sparsity.load(path, dense=True)):
            torch.testing.assert_close(each(images), module(images), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(file, "FORMAT", 1)
    with pytest.raises(WeightsError, match="is of format 2, which is newer than this program's 1"):
        sparsity.load(path)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    module = zeroed(models.lenet300(input_shape=(1, 28, 28), num_classes=10), 0.5)
    path = tmp_path / "compact.safetensors"
    about = About((1, 28, 28), [str(digit) for digit in range(10)], [0.1], [0.3], {"accuracy": 0.5})
    artifact.write(path, cut(module, torch.rand(1, 1, 28, 28)), about)
    return path, module


def test_a_network_comes_back_without_its_source(written):
    path, module = written
    images = torch.rand(5, 1, 28, 28)
    network, dense = sparsity.load(path), sparsity.load(path, dense=True)
    assert not network.training and network.about.classes[3] == "3" and network.about.mean == [0.1]
    assert network.about.figures == {"accuracy": 0.5}
    shapes = {tuple(parameter.shape) for parameter in dense.parameters()}
    assert {(300, 784), (100, 300), (10, 100)} <= shapes
    own = models.lenet300(input_shape=(1, 28, 28), num_classes=10)
    with torch.no_grad():
        expected = module(images)
        for each in (network, dense, sparsity.load(path, own)):
            torch.testing.assert_close(each(images), expected, rtol=1e-4, atol=1e-5)


def test_other_programs_read_it(written):
    path, _ = written
    tensors = safetensors.torch.load_file(path)
    assert "fc3.bias" in tensors and any(name.startswith("fc1.weight") for name in tensors)


def test_equal_networks_give_equal_bytes(written, tmp_path):
    path, module = written
    about = About((1, 28, 28), [str(digit) for digit in range(10)], [0.1], [0.3], {"accuracy": 0.5})
    artifact.write(tmp_path / "again", cut(module, torch.rand(1, 1, 28, 28)), about)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_weights_alone_need_their_module(tmp_path):
    path, module = tmp_path / "w.safetensors", nn.Linear(4, 3)
    file.write_state(path, module.state_dict(), About((4,)), "its output is a tuple")
    with pytest.raises(WeightsError, match=r"its output is a tuple.*module="):
        sparsity.load(path)
    found = sparsity.load(path, nn.Linear(4, 3))
    assert torch.equal(found.weight, module.weight)


def described(path):
    with safetensors.safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()[file.KEY])


def changed(path, **changes):
    """The file with other things said in it."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {file.KEY: json.dumps(described(path) | changes)})


def with_call(path, call):
    return {"calls": [*described(path)["calls"][:-1], call]}


def shaped(path, shape, **more):
    """The file's tensors with something else said of each."""
    return {"tensors": {name: how | more | {"shape": shape} for name, how in described(path)["tensors"].items()}}


LIES = {
    "a newer format": (lambda path: {"format": 99}, "newer"),
    "no calls": (lambda path: {"calls": [["linear"]]}, "no run writes"),
    "an unknown function": (lambda path: with_call(path, ["system.default", ["rm"], [99]]), "no run writes"),
    "another library": (lambda path: with_call(path, ["__class__", ["rm"], [99]]), "no run writes"),
    "a tensor that is not there": (lambda path: with_call(path, ["relu.default", [{"tensor": "x"}], [9]]), "not there"),
    "a result that is not there": (lambda path: with_call(path, ["relu.default", [{"ref": 77}], [9]]), "not there"),
    "no output": (lambda path: {"output": 77}, "no output"),
    "huge shapes": (
        lambda path: {
            "tensors": {
                name: how | {"shape": [10**6, 10**6]} if how["form"] != "dense" else how
                for name, how in described(path)["tensors"].items()
            }
        },
        "more than",
    ),
    "lists without end": (
        lambda path: with_call(path, ["relu.default", json.loads("[" * 50 + "]" * 50), [9]]),
        "no run",
    ),
    "a list far too deep": (lambda path: with_call(path, ["relu.default", [{"ref": {"ref": 0}}], [9]]), "no run"),
    "a reference below 0": (lambda path: with_call(path, ["relu.default", [{"ref": -1}], [9]]), "not there"),
    "a reference to what comes": (lambda path: with_call(path, ["relu.default", [{"ref": 9}], [9]]), "not there"),
    "a reference of no kind": (lambda path: with_call(path, ["relu.default", [{"ref": [0]}], [9]]), "no run"),
    "what changes its input": (lambda path: with_call(path, ["relu.out", [{"ref": 0}], [9]]), "changes what"),
    "what changes torch": (lambda path: with_call(path, ["relu.__setattr__", ["default", 0], [9]]), "no run"),
    "what is no function": (lambda path: with_call(path, ["relu.__class__", ["x", "y"], [9]]), "no run"),
    "outs below 0": (lambda path: with_call(path, ["relu.default", [{"ref": 0}], [-1]]), "no size"),
    "outs that are no list": (lambda path: with_call(path, ["relu.default", [{"ref": 0}], 9]), "no run"),
    "numbers too large": (lambda path: {"mean": [10**400]}, "no run"),
    "a number that is none": (lambda path: with_call(path, ["relu.default", [{"number": 10**400}], [9]]), "no run"),
    "a size that is no number": (lambda path: shaped(path, [float("nan"), 3]), "no size"),
    "a size of many digits": (lambda path: shaped(path, [10**4000, 10**4000]), "no run"),
    "sizes beside a 0": (lambda path: shaped(path, [0, 10**30]), "no run"),
    "another dtype": (lambda path: shaped(path, [3, 3], dtype="int64"), "no run"),
    "a dtype of no kind": (lambda path: shaped(path, [3, 3], dtype=["float32"]), "no run"),
    "a form of no kind": (lambda path: shaped(path, [3, 3], form={"a": 1}), "no run"),
    "tensors of no kind": (lambda path: {"tensors": [1, 2]}, "no run"),
    "another input": (lambda path: {"input_shape": "wide"}, "no run writes"),
    "figures": (lambda path: {"figures": 3}, "no run writes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_in_one_line(lie, written):
    path, _ = written
    make, words = LIES[lie]
    changed(path, **make(path))
    with pytest.raises(WeightsError, match=words) as caught:
        sparsity.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_dense_network_too_large_for_its_file_is_refused(written):
    path, _ = written
    dense = described(path)["dense"]
    changed(path, dense=dense | {"sizes": dense["sizes"] | {"fc1.weight": [10**9, 10**9]}})
    with pytest.raises(WeightsError, match="more than"):
        sparsity.load(path, dense=True)


def test_a_header_of_lists_in_lists_is_refused(tmp_path):
    path = tmp_path / "compact.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {file.KEY: "[" * 100_000})
    with pytest.raises(WeightsError, match="damaged"):
        sparsity.load(path)


def bombs():
    """Parts of few bytes that say or hold far more than they should, by what is said of them."""
    ones, zeros = (
        torch.frombuffer(bytearray(zlib.compress(b * 10**7, 9)), dtype=torch.uint8) for b in (b"\xff", b"\0")
    )
    how = {"dtype": "float32", "shape": [8 * 10**7], "deflated": 10**7}
    one = torch.ones(1)
    yield "places", {**how, "dtype": "int64", "shape": [3], "form": "places"}, {"w.bits": ones}
    yield "bits", {**how, "form": "bits"}, {"w.values": one, "w.bits": ones}
    yield "gaps", {**how, "form": "gaps"}, {"w.values": one, "w.gaps": zeros}
    yield "more than is said", {**how, "deflated": 10, "shape": [80], "form": "bits"}, {"w.values": one, "w.bits": ones}
    yield "cut short", {**how, "form": "bits"}, {"w.values": one, "w.bits": ones[:500]}
    coded = {"w.codes": zeros, "w.book": one, "w.gaps": torch.zeros(1, dtype=torch.uint8)}
    for name, said in (("codes", 10**7), ("more codes than entries", 10**9), ("more codes than are said", 10)):
        about = {**how, "form": "gaps", "values": {"form": "book", "deflated": said}}
        yield name, {key: value for key, value in about.items() if key != "deflated"}, coded


@pytest.mark.parametrize("bomb", [pytest.param(bomb[1:], id=bomb[0]) for bomb in bombs()])
def test_what_is_inflated_to_far_more_is_refused(bomb, tmp_path):
    about, parts = bomb
    path = tmp_path / "compact.safetensors"
    said = {"format": 1, "tensors": {"w": about}, "calls": None}
    safetensors.torch.save_file(parts, path, {file.KEY: json.dumps(said)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError):
        sparsity.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_file_cut_short_is_refused(share, written):
    path, _ = written
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=r"damaged|empty|cut short|no file|holds"):
        sparsity.load(path)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_give_one_line_or_a_network(seed, written):
    path, _ = written
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, min(len(content), 6000), 3):
        content[place] ^= int(generator.integers(1, 256))
    path.write_bytes(content)
    try:
        sparsity.load(path)
    except WeightsError as error:
        assert "\n" not in str(error)


def test_dense_is_for_compact_files_alone(tmp_path):
    about = {"factory": {"_target_": "sparsity.models.lenet300"}, "input_shape": [1, 28, 28], "num_classes": 10}
    state = models.lenet300(input_shape=(1, 28, 28), num_classes=10).state_dict()
    write_state(tmp_path / "model.safetensors", state, about)
    assert isinstance(sparsity.load(tmp_path / "model.safetensors"), models.MLP)
    with pytest.raises(WeightsError, match="dense"):
        sparsity.load(tmp_path / "model.safetensors", dense=True)
    with pytest.raises(WeightsError, match="no file"):
        sparsity.load(tmp_path / "nothing.safetensors")


# --- runs ------------------------------------------------------------------------------------------------------------

QUICK = ("model=mlp", "model.factory.hidden=[20]", "plots=false")


def test_a_run_leaves_its_compact_network(run):
    result = run(*QUICK, "reg=group_hs", "prune=group_std", "sensitivity=0.5")
    folder, card = Path(result["folder"]), result["card"]
    network = sparsity.load(folder / "compact.safetensors")
    assert card["compact"]["macs"] == result["macs"]["removable"] < card["masked"]["macs"] == result["macs"]["dense"]
    assert card["compact"]["parameters"] == sum(each.numel() for each in network.parameters())
    assert card["compact"]["bytes"] == (folder / "compact.safetensors").stat().st_size < card["masked"]["bytes"]
    assert card["compact"]["accuracy"] == card["masked"]["accuracy"] == result["accuracy"]["final"]["test"]
    assert card["dense"]["accuracy"] == result["accuracy"]["dense"]["test"] and card["compact"]["difference"] < 1e-4
    assert result["latency"].keys() == {"masked", "compact"} and all(
        each > 0 for kind in result["latency"].values() for each in kind.values()
    )
    assert network.about.classes == result["classes"] and network.about.figures["macs"] == result["macs"]
    masked = sparsity.load(folder / "model.safetensors", models.MLP([784, 20, 10]))
    images = torch.rand(7, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(network(images), masked(images), rtol=1e-4, atol=1e-5)


def test_a_run_without_one(run):
    result = run(*QUICK, "compact=false")
    assert result["card"] is None and not (Path(result["folder"]) / "compact.safetensors").exists()


def test_what_cannot_be_recorded_is_kept_as_weights(run):
    target = ("model=custom", "model.factory._target_=sample_networks.OfTheBatch", "trust=[sample_networks]")
    result = run(*target, "plots=false", "sensitivity=0.5")
    assert any("holds weights alone" in line for line in result["warnings"]) and "compact" not in result["card"]
    path = Path(result["folder"]) / "compact.safetensors"
    with pytest.raises(WeightsError, match="module="):
        sparsity.load(path)


@pytest.mark.slow
def test_members_of_a_sweep_have_one_where_it_is_asked_for(tmp_path):
    for name, more, expected in (("without", [], False), ("with", ["compact=true"], True)):
        sweep = tmp_path / name
        command = [sys.executable, "main.py", "-m", "data=digits", "schedule=smoke", "stages=[pretrain]", "seed=0,1"]
        command += [*QUICK, *more, f"store={tmp_path}/store", f"hydra.sweep.dir={sweep}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert all((sweep / member / "compact.safetensors").exists() is expected for member in "01")
    say = [sys.executable, "-m", "sparsity.results", str(tmp_path / "without"), "--at-least-accuracy", "0"]
    done = subprocess.run([*say, "--export", str(tmp_path / "chosen")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "masked " in done.stdout and "compact " in done.stdout
    assert isinstance(sparsity.load(tmp_path / "chosen" / "compact.safetensors"), Network)


def test_images_are_named(run, tmp_path, capsys):
    folder = Path(run(*QUICK, "stages=[pretrain]")["folder"])
    digit = Image.fromarray(np.full((40, 30, 3), 200, dtype=np.uint8))
    for name in ("a.png", "b.png"):
        digit.save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--classes=2"]) == 0
    said = capsys.readouterr().out
    assert said.count("%") == 4 and "a.png" in said and "b.png" in said
    for wrong in ([str(folder), str(tmp_path)], [str(tmp_path / "nothing"), "x.png"], [str(folder), "nothing.png"]):
        assert main(["predict", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
