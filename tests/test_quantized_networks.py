"""Networks in whole numbers: the same in float32, in integers and in other programs, over every kind of layer."""

import json

import numpy as np
import pytest
import torch
from conftest import slow
from test_artifact import zeroed
from test_exports import CLASSES, NUMBERS, needs, test_set
from torch import nn

from sparsity import csr as matrices
from sparsity import exports, models
from sparsity.artifact import About, Network, cut, is_quantized, quantized, with_integers
from sparsity.quantizing import activations
from sparsity.tensors import layouts

RANGE = (-1.5, 2.0)


class Residual(nn.Module):
    """Normalised, grouped and transposed convolutions, a sum, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.three = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.four, self.head = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Linear(4, 10)
        self.norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
        self.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))

    def forward(self, images):
        maps = self.norm(self.one(images)).relu()
        maps = maps + self.two(maps)
        maps = nn.functional.max_pool2d(maps, 2, padding=1).relu()
        maps = self.four(self.three(maps)).mean((2, 3))
        return self.head(maps)


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(784, 20), nn.Linear(20, 20)

    def forward(self, images):
        return self.two(self.two(self.one(images.flatten(1)).tanh()).tanh())[:, :10]


KINDS = {
    "lenet300": lambda: models.lenet300(input_shape=(1, 28, 28), num_classes=10),
    "lenet5": lambda: models.lenet5(input_shape=(1, 28, 28), num_classes=10),
    "residual": Residual,
    "twice": Twice,
    "resnet20": lambda: models.resnet20(input_shape=(1, 28, 28), num_classes=10),
}
EACH = [*list(KINDS)[:-1], *slow("resnet20")]


def in_whole_numbers(module, bits=8):
    """The module with its weights as whole numbers times a scale of each output."""
    of = layouts(module, torch.zeros(1, 1, 28, 28))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if of[name].kind == "weight":
                axis = 1 if "three" in name else 0
                others = [each for each in range(parameter.ndim) if each != axis]
                scale = parameter.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / torch.where(scale > 0, scale, 1)).round() * scale)
    return module


def made(kind, share=0.3):
    """A pruned module in whole numbers, its compact form, and what that computes in whole numbers."""
    torch.manual_seed(0)
    module = in_whole_numbers(zeroed(KINDS[kind](), share))
    images = torch.rand(16, 1, 28, 28)
    found = cut(module, images[:1])
    names = [name for name in dict(module.named_parameters()) if name.endswith("weight") and "norm" not in name]
    return module, images, found, quantized(found, dict.fromkeys(names, RANGE))


def plain_outputs(module, images, names):
    """The module's outputs, every layer's inputs rounded by the formula before it is called."""
    low, high = (torch.tensor(end) for end in RANGE)
    handles = [
        layer.register_forward_pre_hook(lambda _, given: (activations(given[0], low, high),))
        for name, layer in module.named_modules()
        if f"{name}.weight" in names
    ]
    with torch.no_grad():
        outputs = module(images)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", EACH)
def test_it_computes_what_the_formula_says(kind):
    module, images, found, program = made(kind)
    names = {call.args[1].name for call in program.calls if call.name in ("linear", "convolution")}
    assert is_quantized(program) and not is_quantized(found.program)
    assert sum(call.name == "rounded" for call in program.calls) == sum(
        call.name in ("linear", "convolution") for call in program.calls
    )
    expected = plain_outputs(module, images, names)
    with torch.no_grad():
        outputs, floats = Network(program)(images), module(images)
    # biases are rounded too, and a sum near a half may be rounded otherwise
    assert (outputs - expected).abs().mean() < 0.02 * expected.abs().max()
    assert (outputs - floats).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", EACH)
def test_integers_give_the_same(kind):
    _, images, _, program = made(kind)
    whole = with_integers(program)
    with torch.no_grad():
        torch.testing.assert_close(Network(whole)(images), Network(program)(images), rtol=1e-4, atol=1e-4)
    kinds = {name: tensor.dtype for name, tensor in whole.tensors.items() if f"{name}.scale" in whole.tensors}
    assert set(kinds.values()) >= ({torch.int8} if kind == "twice" else {torch.int8, torch.int32})
    floats = [name for name, tensor in whole.tensors.items() if tensor.is_floating_point() and tensor.ndim > 1]
    assert floats == {"residual": ["four.weight"], "twice": ["two.weight"]}.get(
        kind, []
    )  # more scales than an axis has


def test_normalised_weights_are_whole_numbers_too():
    _, _, found, program = made("residual", share=0.0)
    norm = found.program.fused().tensors["one.weight"]
    assert (program.tensors["one.weight"] - norm).abs().max() < 1e-5 * norm.abs().max()
    scale = program.tensors["one.weight"].abs().amax((1, 2, 3), keepdim=True) / 127
    whole = program.tensors["one.weight"] / scale
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)


def test_weights_of_other_numbers_stay():
    torch.manual_seed(0)
    module = KINDS["lenet300"]()
    found = cut(module.eval(), torch.rand(1, 1, 28, 28))
    program = quantized(found, {"fc2.weight": (0.0, 1.0)})
    assert sum(call.name == "rounded" for call in program.calls) == 1
    assert all(torch.equal(program.tensors[name], tensor) for name, tensor in found.program.tensors.items())
    assert not any(name.endswith(".scale") for name in with_integers(program).tensors)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.0, 1e-42), (-3e38, 3e38)])
def test_layers_that_are_all_zero_and_ranges_of_any_size_are_finite(ends):
    module = in_whole_numbers(KINDS["lenet300"]())
    with torch.no_grad():
        module.fc2.weight.zero_()
    program = quantized(cut(module.eval(), torch.rand(1, 1, 28, 28)), dict.fromkeys(["fc1.weight", "fc3.weight"], ends))
    for each in (program, with_integers(program)):
        assert Network(each)(torch.rand(3, 1, 28, 28)).isfinite().all()


# --- in other programs -----------------------------------------------------------------------------------------------


def network_of(kind):
    _, _, _, program = made(kind)
    network = Network(program).eval()
    network.about = About((1, 28, 28), CLASSES, [0.3], [0.25])
    return network


@pytest.mark.parametrize("kind", slow(*KINDS))
def test_onnx_has_int8_and_says_where_integers_are(kind, tmp_path):
    needs("onnx")
    onnx = pytest.importorskip("onnx")
    network, test = network_of(kind), test_set((1, 28, 28), 300)
    found = exports.onnx(network, test, tmp_path, **NUMBERS["onnx"])
    graph = onnx.load(tmp_path / "compact.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") >= 2 and kinds.count("DequantizeLinear") > kinds.count("QuantizeLinear")
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    layers = {call.args[1].name for call in network.program.calls if call.name in ("linear", "convolution")}
    whole = {name for name in layers if name in arrays and arrays[name].dtype == np.int8}
    assert layers - whole <= {"four.weight", "two.weight"} and whole
    images = (test.images.float() / 255 - 0.3) / 0.25
    with torch.no_grad():
        expected = network(images)
    assert found.accuracy == pytest.approx((expected.argmax(1) == test.labels).double().mean().item(), abs=0.011)
    assert found.difference < exports.IN_STEPS * expected.abs().max()
    assert found.latency.keys() == {"1", "256"} and min(found.latency.values()) > 0
    properties = {each.key: json.loads(each.value) for each in onnx.load(tmp_path / "compact.onnx").metadata_props}
    assert properties["classes"] == CLASSES


@pytest.mark.parametrize("kind", ["lenet300", *slow("lenet5")])
@pytest.mark.parametrize("name", ["csr", *slow("torch_export")])
def test_other_exports_round_too(name, kind, tmp_path):
    network, test = network_of(kind), test_set((1, 28, 28), 50)
    found = getattr(exports, name)(network, test, tmp_path, **NUMBERS[name])
    images = (test.images.float() / 255 - 0.3) / 0.25
    with torch.no_grad():
        expected = network(images)
    assert found.difference < exports.IN_STEPS * expected.abs().max()
    if (name, kind) == ("csr", "lenet300"):
        outputs = matrices.load(tmp_path / "compact_csr.npz")(test.images.numpy())
        assert (outputs.argmax(1) == expected.argmax(1).numpy()).mean() > 0.95


# --- as a run leaves them --------------------------------------------------------------------------------------------


def test_the_card_of_a_run(run, tmp_path, capsys):
    small = ("model=mlp", "model.factory.hidden=[30]", "plots=false")
    result = run("recipe=quantized", *small, "export=[csr]", "export.csr.function.batch_sizes=[]", "card=true")
    card, about = result["card"], result["stages_run"][-1]["quantized"]
    assert card["quantized"]["accuracy"] == pytest.approx(about["accuracy"]["after"]["test"], abs=0.011)
    assert card["quantized"]["accuracy"] == card["exports"]["csr"]["accuracy"]
    assert card["quantized"]["bytes"] == (tmp_path / "run0" / "compact.safetensors").stat().st_size
    assert card["quantized"]["difference"] > card["compact"]["difference"]
    assert "quantized" not in result["latency"]  # which onnxruntime measures, where it is asked for
    assert result["latency"]["csr"].keys() == {"1", "256"} and min(result["latency"]["csr"].values()) > 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "compact_csr.npz" in line and "│" in line)
    assert row.count(" ms") == 2
    shared = run("recipe=quantized", *small, "quantize=shared")
    assert "quantized" not in shared["card"]
    assert shared["card"]["compact"]["accuracy"] == shared["accuracy"]["final"]["test"]
