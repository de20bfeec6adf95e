"""What is left: MACs and structure against the closed formulas, branches, groups; and the traced graph."""

import pytest
import sample_networks
import torch
from conftest import slow

from sparsity import models
from sparsity.accounting import account
from sparsity.graph import trace
from sparsity.tensors import BITS, layouts


def report_of(module, parameters, shape):
    return account(parameters, layouts(module), trace(module, torch.zeros(2, *shape)))


def thinned(module, seed, share=0.02):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: parameter.detach() * (torch.rand(parameter.shape, generator=generator) < share * (1 + parameter.ndim % 2))
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("seed", range(4))
def test_lenet300_is_the_formula(seed):
    module = models.lenet300(input_shape=(1, 28, 28), num_classes=10)
    parameters = thinned(module, seed, share=0.01)
    live_in = {n: (p != 0).any(0).sum().item() for n, p in parameters.items() if p.ndim > 1}
    live_out = {n: (p != 0).any(1).sum().item() for n, p in parameters.items() if p.ndim > 1}
    a = live_in["fc1.weight"]
    b = min(live_out["fc1.weight"], live_in["fc2.weight"])
    c = min(live_out["fc2.weight"], live_in["fc3.weight"])
    report = report_of(module, parameters, (1, 28, 28))
    assert (report.macs["dense"], report.macs["pruned"]) == (266200, a * b + b * c + live_out["fc3.weight"] * c)
    inputs, first, second = removable_of(parameters)
    assert report.macs["removable"] == inputs * first + first * second + second * 10
    assert report.structure_removable == f"{inputs}-{first}-{second}"
    assert report.structure == f"{a}-{b}-{c}" and report.dense_structure == "784-300-100"
    assert report.total == {"weights": 266200, "parameters": 266610}
    assert report.nonzero["parameters"] == sum(int(p.count_nonzero()) for p in parameters.values())


def removable_of(parameters):
    """How many inputs and hidden units LeNet-300-100 cannot do without, found by trying each of them."""
    weights = [parameters[f"fc{number}.weight"] != 0 for number in (1, 2, 3)]
    varies = [torch.ones(784, dtype=torch.bool)]  # what hears no pixel is a constant, whatever its bias
    for weight in weights[:2]:
        varies.append((weight & varies[-1]).any(1))
    heard = torch.ones(10, dtype=torch.bool)
    counts = []
    for weight, given in zip(reversed(weights), reversed(varies)):
        heard = weight[heard].any(0) & given
        counts.insert(0, int(heard.sum()))
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_lenet5_is_the_formula(seed):
    module = models.lenet5(input_shape=(1, 28, 28), num_classes=10)
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    keep = {size: torch.rand(size, generator=generator) < 0.4 for size in (20, 50, 800, 500)}
    parameters["conv1.weight"][~keep[20]] = 0
    parameters["conv2.weight"][~keep[50]] = 0
    parameters["fc1.weight"][:, ~keep[800]] = 0
    parameters["fc2.weight"][:, ~keep[500]] = 0
    c1, h = int(keep[20].sum()), int(keep[500].sum())
    c2 = min(int(keep[50].sum()), int(keep[800].view(50, 16).any(1).sum()))
    f = min(int(keep[800].sum()), 16 * int(keep[50].sum()))
    report = report_of(module, parameters, (1, 28, 28))
    assert report.macs["dense"] == 2293000 and report.macs["pruned"] == 14400 * c1 + 1600 * c1 * c2 + f * h + 10 * h
    # a filter of zeros gives a constant, which the next bias can hold; with filters go all of their positions
    read = int((keep[50] & keep[800].view(50, 16).any(1)).sum())
    assert report.structure_removable == f"{c1}-{read}-{16 * read}-{h}"
    assert report.macs["removable"] == 14400 * c1 + 1600 * c1 * read + 16 * read * h + 10 * h
    assert report.structure == f"{c1}-{c2}-{f}-{h}" and report.dense_structure == "20-50-800-500"


def test_branches_count_for_themselves_and_groups_divide():
    module = sample_networks.Normalised(num_classes=10, width=8)
    graph = trace(module, torch.zeros(2, 1, 9, 9))
    assert {name: (layer.source, layer.target) for name, layer in graph.items()} == {
        "first.weight": (None, None),  # two layers read it
        "left.weight": ("first.weight", None),
        "right.weight": ("first.weight", None),
        "out.weight": (None, None),  # where branches meet
    }
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    report = account(parameters, layouts(module), graph)
    positions = 16  # 9×9, kernel 3, stride 2
    expected = positions * (8 * 9 + 8 * 8 * 9 // 2 + 8 * 9) + 80
    assert report.macs == {"dense": expected, "pruned": expected, "removable": expected}
    assert report.total == {"weights": 72 + 288 + 72 + 80, "parameters": 72 + 288 + 72 + 80 + 8 + 8 + 8 + 10 + 16}


def test_a_sum_made_in_place_has_no_single_source():
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

        def forward(self, maps):
            maps = self.one(maps)
            maps += maps.flip(1)
            return self.two(maps)

    graph = trace(Residual(), torch.zeros(2, 3, 4, 4))
    assert graph["two.weight"].source is None and graph["one.weight"].target is None


def test_a_weight_that_is_used_twice_counts_twice():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, units):
            return self.layer(self.layer(units).relu())

    module = Twice()
    graph = trace(module, torch.zeros(2, 4))
    assert graph["layer.weight"].num_positions == 2 and graph["layer.weight"].source is None
    assert account(dict(module.named_parameters()), layouts(module), graph).macs["dense"] == 32


@pytest.mark.parametrize("convolution", [torch.nn.Conv1d, torch.nn.Conv3d, torch.nn.ConvTranspose2d])
def test_other_convolutions(convolution):
    module = convolution(4, 6, 3, groups=2)
    axes = int(convolution.__name__[-2])
    images = torch.zeros(2, 4, *[5] * axes)
    layer = trace(module, images)["weight"]
    # every input position of a transposed convolution meets the whole kernel
    positions = images if "Transpose" in convolution.__name__ else module(images)
    assert layer.num_positions == positions[0, 0].numel()
    macs = account(dict(module.named_parameters()), layouts(module), {"weight": layer}).macs["dense"]
    assert macs == 4 * 6 // 2 * 3**axes * layer.num_positions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", *slow("mobilenet_v2")])
def test_networks_of_torchvision(name):
    module = models.torchvision(name=name, input_shape=(1, 32, 32), num_classes=10)
    graph = trace(module, torch.zeros(2, 1, 32, 32))
    weights = [n for n, layout in layouts(module).items() if layout.kind == "weight"]
    assert sorted(graph) == sorted(weights)
    report = account(dict(module.named_parameters()), layouts(module), graph)
    assert report.macs["dense"] == report.macs["pruned"] > 0
    assert all(layer.source is None or layer.source in graph for layer in graph.values())


def test_a_linear_layer_on_the_positions_of_a_map_is_no_reader_of_its_channels():
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 64, 3, padding=1), torch.nn.Linear(28, 5))
    report = report_of(module, dict(module.named_parameters()), (1, 28, 28))
    assert report.macs["dense"] == 64 * 9 * 784 + 28 * 5 * 64 * 28


def test_flattened_tokens_are_no_channels():
    module = torch.nn.Sequential(torch.nn.Linear(28, 6), torch.nn.Flatten(), torch.nn.Linear(168, 10))
    graph = trace(module, torch.zeros(2, 28, 28))
    assert (graph["2.weight"].source, graph["0.weight"].target) == (None, None)


def test_linear_layers_on_tokens_feed_each_other():
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    graph = trace(module, torch.zeros(2, 5, 8))
    assert graph["2.weight"].source == "0.weight" and graph["0.weight"].target == "2.weight"
    assert graph["0.weight"].num_positions == 5


@pytest.mark.parametrize("also", ["chunk", "argmax", "output"])
def test_every_reader_counts(also):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, units):
            units = self.one(units)
            result = self.two(units)
            if also == "chunk":
                return result[:, :2] + units.chunk(2, 1)[0]
            return (result, units) if also == "output" else result + units.argmax(1, keepdim=True)

    graph = trace(Module(), torch.zeros(2, 4))
    assert graph["one.weight"].target is None and graph["two.weight"].source == "one.weight"


def test_functions_of_parameters_alone_are_passed_over():
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.layer = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Linear(4, 3)

        def forward(self, units):
            return torch.nn.functional.linear(units, torch.sigmoid(self.gate)) + self.layer(units)

    assert list(trace(Gated(), torch.zeros(2, 4))) == ["layer.weight"]


@pytest.fixture
def flushed():
    """Denormals flushed, as while training."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_zeros_are_counted_by_their_bits(flushed, dtype):
    module = torch.nn.Linear(4, 3, dtype=dtype)
    bits = torch.zeros(3, 4, dtype=BITS[dtype])
    bits[0, 1], bits[2, 1], bits[2, 3] = 1, torch.iinfo(bits.dtype).min, torch.iinfo(bits.dtype).min + 1  # the 2nd: -0
    parameters = {"weight": bits.view(dtype), "bias": torch.ones(3, dtype=dtype)}
    report = account(parameters, layouts(module), trace(module, torch.zeros(2, 4, dtype=dtype)))
    assert [row.nonzero for row in report.rows] == [2, 3]
    assert (report.rows[0].live_inputs, report.rows[0].live_outputs) == (2, 2)


@pytest.mark.parametrize(("groups", "left"), [(1, 8 * 4), (2, 4 * 4), (4, 2 * 4), (8, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_of_a_grouped_convolution_costs_half(groups, left, transposed):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    module = torch.nn.Sequential(kind(8, 8, 3, padding=1, groups=groups))
    with torch.no_grad():
        if transposed and groups == 1:
            module[0].weight[:, 4:] = 0
        else:
            module[0].weight[4:] = 0
    report = report_of(module, dict(module.named_parameters()), (8, 6, 6))
    assert report.macs["dense"] == 8 * 8 // groups * 9 * 36 and report.macs["pruned"] == left * 9 * 36
