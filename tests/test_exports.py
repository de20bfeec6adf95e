"""Exports: what other programs make of the network, over all images, and what they do not take, in one line."""

import copy
import importlib.util
import json
import math
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import choices, compose, shipped_rule, slow, some_slow
from test_artifact import zeroed
from test_units import counted
from torch import nn
from torch.func import functional_call

from sparsity import compaction, config, exports, models
from sparsity import csr as matrices
from sparsity.artifact import About, Network, cut, load, write
from sparsity.budgets import meet
from sparsity.data import Images, Splits
from sparsity.errors import ConfigError, ExportError
from sparsity.graph import Facts, trace
from sparsity.limits import Budget, Limits
from sparsity.nodes import sensitivity_range
from sparsity.population import stack
from sparsity.stages.holding import holding_zeros
from sparsity.stages.rules import masks_of, rule_of, scores_of

NUMBERS = {"onnx": {"opset": 18}, "torch_export": {}, "csr": {"batch_sizes": [1, 64], "repeats": 3}}
FILES = {"onnx": "compact.onnx", "torch_export": "compact.pt2", "csr": "compact_csr.npz"}
CLASSES = [f"é{number}" for number in range(10)]
TORCHVISION = [
    "resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "convnext_tiny", "vit_b_16", "efficientnet_b0", "googlenet",
    "shufflenet_v2_x1_0",
]  # fmt: skip

EACH = some_slow([*FILES], "onnx")  # whose exporter takes seconds


def needs(name):
    """Skips where an export's packages are not installed."""
    for package in {"onnx": ("onnx", "onnxruntime", "onnxscript")}.get(name, ()):
        pytest.importorskip(package)


def network_of(name, share=0.4):
    """A compact network of a shipped model, with all that a run says beside it."""
    shape = {"lenet300": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 16, 16)}.get(name, (3, 64, 64))
    torch.manual_seed(0)
    own = {} if hasattr(models, name) else {"name": name}
    module = getattr(models, name, models.torchvision)(input_shape=shape, num_classes=10, **own)
    for parameter in module.parameters():
        if not parameter.any():  # biases, and heads, which would make all outputs equal
            nn.init.normal_(parameter, std=0.1)
    return compact(zeroed(module, share), About(shape, CLASSES, [0.3] * shape[0], [0.25] * shape[0]))


def compact(module, about):
    network = Network(cut(module.eval(), torch.rand(1, *about.input_shape)).program).eval()
    network.about = about
    return network


def test_set(shape, count=7):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Images(images, torch.randint(0, 10, (count,), generator=generator))


test_set.__test__ = False


def outputs_of(network, images):
    """What the run's own network gives, scaled as the data set scales."""
    about = network.about
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (about.mean, about.std))
    with torch.no_grad():
        return network((images.float() / 255 - mean) / std)


def exported(name, network, test, folder):
    needs(name)
    return getattr(exports, name)(network, test, folder, **NUMBERS[name])


PAIRS = [(model, name) for model in ("lenet300", "lenet5", "resnet20", "resnet18") for name in FILES]
PAIRS.remove(("resnet18", "onnx"))  # which is below
QUICK = [pair for pair in PAIRS if pair[0].startswith("lenet") and pair[1] != "onnx"]  # whose exporter takes seconds


@pytest.mark.parametrize(("model", "name"), [*QUICK, *slow(*(pair for pair in PAIRS if pair not in QUICK))])
def test_outputs_are_those_of_pytorch(model, name, tmp_path):
    network = network_of(model, 0.3 if model in TORCHVISION else 0.4)
    test = test_set(network.about.input_shape)
    found = exported(name, network, test, tmp_path)
    expected = outputs_of(network, test.images)
    assert found.difference <= 1e-4 * expected.abs().max()
    assert found.accuracy == pytest.approx((expected.argmax(1) == test.labels).double().mean().item())
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == found.files
    assert [*found.files] == [FILES[name]]
    (tmp_path / FILES[name]).unlink()  # of some networks it is large


def halved(name):
    """A network of torchvision at half its MACs, by the coupled rule and the bisection of budgets; and its graph."""
    torch.manual_seed(0)
    module, images = (
        models.torchvision(name=name, input_shape=(3, 64, 64), num_classes=10).eval(),
        torch.rand(1, 3, 64, 64),
    )
    if name == "vgg11_bn":  # most of its time would go into 100 million weights of its head
        module.avgpool, module.classifier[0] = nn.AdaptiveAvgPool2d(2), nn.Linear(512 * 4, 256)
        module.classifier[3], module.classifier[6] = nn.Linear(256, 128), nn.Linear(128, 10)
    if name == "vit_b_16":
        module.encoder.layers = module.encoder.layers[:2]
    for parameter in module.parameters():
        if not parameter.any():  # biases, and heads, which would make all outputs equal
            nn.init.normal_(parameter, std=0.1)
    population, graph = stack([module], "cpu", images), trace(module, images)
    node = replace(shipped_rule("coupled")[1], keep_at_least=0.1)  # of weights that nothing trained whole layers go
    rule = rule_of([node], [0.0], population)
    scores = scores_of(population, rule, graph.units)
    dense = counted(module, images)[0]
    met = meet(
        population,
        lambda numbers: masks_of(population, rule.at(numbers), graph.units, scores),
        sensitivity_range(node),
        [Budget(macs_reduction=2.0)],
        graph,
        enough=[Limits(None, int(0.48 * dense))],
    )
    assert met.reached[0].is_met and 0.45 * dense < met.reached[0].left.macs <= dense / 2
    kept = {name: torch.where(met.masks[name], p, 0) if name in met.masks else p
            for name, p in population.parameters.items()}  # fmt: skip
    module.load_state_dict({**module.state_dict(), **replace(population, parameters=kept).state(0)})
    return module, graph, met.reached[0].left.macs


class OfMember(nn.Module):
    """A population of one as a module."""

    def __init__(self, population):
        super().__init__()
        self.population = population

    def forward(self, images):
        parts = {**self.population.parameters, **self.population.buffers}
        tensors = {name: tensor[0] for name, tensor in parts.items()}
        return functional_call(self.population.module.eval(), tensors, (images,))


@pytest.mark.parametrize("name", slow(*TORCHVISION))
def test_torchvision_networks_at_half_their_macs(name, tmp_path):
    """Compact as is reported, in torch's own counts, the same in the file, and in onnxruntime as in PyTorch."""
    module, graph, macs = halved(name)
    example = torch.rand(1, 3, 64, 64)
    made = cut(module, example)
    network = Network(made.program).eval().requires_grad_(False)
    assert not made.stays and counted(network, example)[0] == macs
    parameters = dict(module.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    facts = Facts({name: each.detach() for name, each in (*parameters.items(), *module.named_buffers())})
    for (tensor, axis), kept in graph.units.along(graph.units.kept(facts)).items():
        if tensor in shapes:
            shapes[tensor][axis] = int(kept.sum())
    assert sum(each.numel() for each in network.parameters()) == sum(torch.Size(s).numel() for s in shapes.values())

    part = Images(torch.rand(8, 3, 64, 64, dtype=torch.double), torch.arange(8))
    held = holding_zeros(stack([copy.deepcopy(module).double()], images=example.double()), graph.units)
    small = compaction.compact(held, Splits(part, None, part, 10)).population  # what finetuning trains is as small
    assert counted(OfMember(small), example.double())[0] == macs

    about = About((3, 64, 64), CLASSES, [0.3] * 3, [0.25] * 3)
    write(tmp_path / "compact.safetensors", made, about)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = module(images)
        for each in (load(tmp_path / "compact.safetensors"), load(tmp_path / "compact.safetensors", dense=True)):
            torch.testing.assert_close(each(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    network.about, test = about, test_set((3, 64, 64), 3)
    found = exported("onnx", network, test, tmp_path)  # which onnx's checker and onnxruntime have seen
    assert found.difference <= 1e-4 * outputs_of(network, test.images).abs().max()
    for path in tmp_path.iterdir():  # of some networks they are large
        path.unlink()


@pytest.mark.parametrize(("outputs", "selects"), [(5, False), (2000, True)])
@pytest.mark.parametrize("flattens", [True, False])
def test_onnx_selects_inputs_where_that_saves_work(outputs, selects, flattens):
    torch.manual_seed(0)
    shape = (1, 4, 5) if flattens else (20,)
    module = nn.Sequential(
        *([nn.Flatten()] if flattens else []), nn.Linear(20, outputs), nn.ReLU(), nn.Linear(outputs, 3)
    )
    with torch.no_grad():
        module[-3].weight[:, [0, 3, 4, 11, *range(14, 20)]] = 0
    network = compact(module, About(shape, CLASSES[:3]))
    raw = exports.Raw(network, test_set(shape))
    found = exports._spread(raw)
    assert [call.name for call in network.program.calls].count("gather") == 1
    assert ("gather" in [call.name for call in found.program.calls]) == selects
    images = torch.rand(6, *shape)
    torch.testing.assert_close(found(images), network(images))


def test_onnx_takes_images_as_they_are_in_any_number(tmp_path):
    network = network_of("lenet5")
    exported("onnx", network, test_set((1, 28, 28)), tmp_path)
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(tmp_path / "compact.onnx")
    properties = {each.key: json.loads(each.value) for each in model.metadata_props}
    assert properties == {"classes": CLASSES, "input_shape": [1, 28, 28]}
    assert {"conv1.weight", "fc2.bias"} <= {tensor.name for tensor in model.graph.initializer}
    assert b"/exports" not in model.SerializeToString(), "it names files of this machine"
    session = runtime.InferenceSession(tmp_path / "compact.onnx")
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 1, 28, 28], "tensor(uint8)")
    assert (result.name, result.shape) == ("outputs", ["batch", 10])
    for count in (1, 2, 33):
        images = test_set((1, 28, 28), count).images
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs_of(network, images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_newer_operators_can_be_asked_for(tmp_path):
    needs("onnx")
    onnx = pytest.importorskip("onnx")
    exports.onnx(network_of("lenet300"), test_set((1, 28, 28)), tmp_path, opset=23)
    assert {each.version for each in onnx.load(tmp_path / "compact.onnx").opset_import if not each.domain} == {23}


LOADED = """
import io, json, sys
import torch
extra = {"about.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
torch.save(module(torch.load(sys.argv[2])), sys.argv[3])
assert json.loads(extra["about.json"])["input_shape"] == [1, 28, 28]
assert not any(name.partition(".")[0] == "sparsity" for name in sys.modules)
"""


@pytest.mark.slow
def test_pytorch_alone_loads_what_torch_export_writes(tmp_path):
    network, test = network_of("lenet5"), test_set((1, 28, 28), 33)
    exported("torch_export", network, test, tmp_path)
    torch.save(test.images, tmp_path / "images")
    paths = [str(tmp_path / name) for name in ("compact.pt2", "images", "outputs")]
    subprocess.run([sys.executable, "-I", "-c", LOADED, *paths], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "outputs"), outputs_of(network, test.images))
    with zipfile.ZipFile(tmp_path / "compact.pt2") as file:
        assert not any(b"program.py" in file.read(name) for name in file.namelist()), "it names our files"


def sparse_network():
    """A wide layer of which a hundredth of the weights is left, and a small one of which all are."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 1500), nn.ReLU(), nn.Linear(1500, 10), nn.LogSoftmax(1))
    with torch.no_grad():
        module[1].weight *= torch.rand(module[1].weight.shape, generator=torch.Generator().manual_seed(0)) < 0.01
    return compact(module, About((1, 28, 28), CLASSES, [0.3], [0.25]))


def test_layers_are_sparse_where_that_is_faster(tmp_path):
    network, test = sparse_network(), test_set((1, 28, 28), 33)
    found = exported("csr", network, test, tmp_path)
    assert "1 of 2 linear layers are sparse matrices (1)" in found.notes[0] and "in batches of 64" in found.notes[0]
    dense = sum(tensor.nbytes for tensor in network.program.tensors.values())
    assert found.files["compact_csr.npz"] < 0.1 * dense
    outputs = matrices.load(tmp_path / "compact_csr.npz")
    for count in (1, 33):
        expected = outputs_of(network, test.images[:count])
        torch.testing.assert_close(torch.from_numpy(outputs(test.images[:count].numpy())), expected)


def test_numpy_and_scipy_alone_read_the_matrices(tmp_path):
    from scipy.sparse import csr_array

    network = sparse_network()
    needs("csr")
    exports.csr(network, test_set((1, 28, 28)), tmp_path, batch_sizes=[], repeats=1)
    with np.load(tmp_path / "compact_csr.npz", allow_pickle=False) as file:
        program = json.loads(file["program.json"].tobytes())
        parts = [file[f"1.weight.{part}"] for part in ("data", "indices", "indptr")]
        matrix = csr_array(tuple(parts), shape=file["1.weight.shape"]).toarray()
    assert program["sparse"] == ["1.weight", "3.weight"] and program["classes"] == CLASSES
    assert np.array_equal(matrix, network.program.tensors["1.weight"].detach().numpy())


def test_linear_layers_alone_of_what_numpy_is_not_told(tmp_path):
    found = exported("csr", network_of("lenet5"), test_set((1, 28, 28)), tmp_path)
    assert found.notes[1].endswith("linear layers alone: the network computes convolution, max_pool2d too")
    with np.load(tmp_path / "compact_csr.npz") as file:
        assert {name.partition(".weight.")[0] for name in file.files} >= {"fc1.bias", "fc2.bias"}
        assert not any(name.startswith("conv") for name in file.files)
    with pytest.raises(ExportError, match="linear layers alone"):
        matrices.load(tmp_path / "compact_csr.npz")


class Activations(nn.Module):
    def __init__(self):
        super().__init__()
        self.images = nn.Parameter(torch.rand(6))  # which the export's own names must not meet
        self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.three(self.two(self.one(inputs + self.images).tanh()).sigmoid()).relu().softmax(1)


@pytest.mark.parametrize("name", EACH)
def test_floats_are_taken_as_they_are(name, tmp_path):
    test = Images(torch.randn(9, 6), torch.randint(0, 3, (9,)))
    network = compact(Activations(), About((6,)))
    found = exported(name, network, test, tmp_path)
    assert found.difference < 1e-6
    if name == "csr":
        with torch.no_grad():
            expected = network(test.images)
        outputs = matrices.load(tmp_path / "compact_csr.npz")(test.images.numpy())
        torch.testing.assert_close(torch.from_numpy(outputs), expected)


@pytest.mark.parametrize("name", EACH)
def test_a_network_of_which_all_is_dead(name, tmp_path):
    module = models.lenet300(input_shape=(1, 28, 28), num_classes=10)
    with torch.no_grad():
        module.fc3.weight.zero_()
    network, test = compact(module, About((1, 28, 28), CLASSES, [0.3], [0.25])), test_set((1, 28, 28))
    if name == "csr":
        with pytest.raises(ExportError, match="has none: take export=onnx"):
            exported(name, network, test, tmp_path)
        return
    assert exported(name, network, test, tmp_path).difference < 1e-6


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_what_differs_leaves_no_file(name, tmp_path, monkeypatch):
    network, test = network_of("lenet300"), test_set((1, 28, 28))
    monkeypatch.setattr(matrices.Held, "outputs", lambda held, images: images[:, 0, 0, :10] * np.float32(0))
    monkeypatch.setattr(exports, "_traced", lambda raw: _traced(nn.Sequential(raw, nn.ReLU()), raw.example()))
    with pytest.raises(ExportError, match=rf"export={name} cannot take this network \(its outputs of up to .* differ"):
        exported(name, network, test, tmp_path)
    assert not list(tmp_path.iterdir())


def _traced(module, example):
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("name", EACH)
def test_a_network_that_gives_nan_leaves_no_file(name, tmp_path):
    network, test = network_of("lenet300"), test_set((1, 28, 28))
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ExportError, match=r"differ from PyTorch's by nan"):
        exported(name, network, test, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FILES])
def test_a_folder_that_cannot_be_written(name, tmp_path):
    needs(name)
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(ExportError, match=rf"export={name} cannot write into .*file .*: make it writable") as caught:
        getattr(exports, name)(network_of("lenet300"), test_set((1, 28, 28)), place, **NUMBERS[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_what_another_program_refuses_is_one_line(name, tmp_path, monkeypatch):
    needs(name)

    def refuse(*_):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(exports, "_traced", refuse)
    with pytest.raises(ExportError, match=rf"export={name} cannot take this network \(no such operator\)"):
        exported(name, network_of("lenet300"), test_set((1, 28, 28)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"PK"])
def test_damaged_files(change, tmp_path):
    exported("csr", network_of("lenet300"), test_set((1, 28, 28)), tmp_path)
    path = tmp_path / "compact_csr.npz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExportError, match="damaged, or no file of export=csr"):
        matrices.load(path)
    with pytest.raises(ExportError, match="cannot be read"):
        matrices.load(tmp_path / "none.npz")


def rewritten(path, change):
    """A file whose arrays, and what its program says, are others."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    said = json.loads(arrays["program.json"].tobytes())
    change(arrays, said)
    arrays["program.json"] = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, said: arrays.update({"1.weight.indices": arrays["1.weight.indices"] + 10**6}),
        lambda arrays, said: arrays.pop("1.bias"),
        lambda arrays, said: said.update(format=99),
        lambda arrays, said: said["calls"][1].__setitem__(0, "system"),
        lambda arrays, said: said["calls"][1].__setitem__(0, "gelu.default"),
        lambda arrays, said: said.update(output=99),
    ],
)
def test_a_file_that_lies_is_refused_before_it_is_run(change, tmp_path):
    exports.csr(sparse_network(), test_set((1, 28, 28)), tmp_path, batch_sizes=[], repeats=1)
    rewritten(tmp_path / "compact_csr.npz", lambda arrays, said: None)
    assert matrices.load(tmp_path / "compact_csr.npz")
    rewritten(tmp_path / "compact_csr.npz", change)
    with pytest.raises(ExportError, match="damaged, or no file of export=csr"):
        matrices.load(tmp_path / "compact_csr.npz")


# --- as they are asked for -------------------------------------------------------------------------------------------


def test_several_at_once():
    run = config.read(compose(["export=[torch_export,csr]", "export.csr.function.batch_sizes=[1]"])[0])
    assert list(run.export.others) == ["torch_export", "csr"]
    assert run.export.others["csr"].function.partial().keywords == {"batch_sizes": [1], "repeats": 7}
    assert not config.read(compose([])[0]).export.others


def test_every_export_is_named_here():
    assert choices("export") == sorted([*FILES, "none"])


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_one_line_before_anything_trains(package, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else there("json" if "onnx" in name else name)
    )
    with pytest.raises(
        ConfigError, match=rf"export=onnx needs the package {package}: pip install -e '\.\[onnx\]', or take export=none"
    ):
        config.read(compose(["export=onnx"])[0])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("export.onnx.function.opset=3", r"export\.onnx\.function\.opset must be"),
        ("export.csr.function.batch_sizes=[0]", r"export\.csr\.function\.batch_sizes.*must be"),
        ("export.csr.function.repeats=0", r"export\.csr\.function\.repeats must be"),
    ],
)
def test_numbers_that_are_none(typed, line, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=line):
        config.read(compose(["export=[onnx,csr]", typed])[0])
