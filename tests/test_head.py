"""The last layer: which one it is in networks of every kind, and checkpoints of another number of classes."""

import pytest
import torch
from conftest import slow
from safetensors.torch import load_file
from sample_networks import Normalised, WithDropout
from torch import nn

from sparsity import config
from sparsity.errors import ConfigError, WeightsError
from sparsity.models import lenet5, lenet300, torchvision
from sparsity.weights import fill
from sparsity.weights.head import last_layer


class Scaled(nn.Module):
    """A normalisation and a scale behind the last layer, a shared tensor before it."""

    def __init__(self, classes=5):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.out = nn.Linear(6, classes, bias=False)
        self.norm = nn.BatchNorm1d(classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * self.norm(self.out(self.first(images).relu())).log_softmax(1)


class Prototypes(nn.Module):
    """A tensor of the root's own in place of a last layer, and layers beside it."""

    def __init__(self):
        super().__init__()
        self.body = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.token = nn.Parameter(torch.ones(4))
        self.prototypes = nn.Parameter(torch.rand(5, 6))

    def forward(self, images):
        return self.body(images + self.token) @ self.prototypes.t()


class Parametrized(Prototypes):
    def __init__(self):
        super().__init__()
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))

    def forward(self, images):
        return self.out(self.body(images + self.token))


FLAT, SQUARE = torch.rand(2, 4), torch.rand(2, 1, 28, 28)


@pytest.mark.parametrize(
    "network, images, names",
    [
        (lenet300(input_shape=(1, 28, 28), num_classes=10), SQUARE, ["fc3.weight", "fc3.bias"]),
        (lenet5(input_shape=(1, 28, 28), num_classes=10), SQUARE, ["fc2.weight", "fc2.bias"]),
        (Normalised(10), SQUARE, ["out.weight", "out.bias"]),
        (WithDropout((1, 28, 28), 10), SQUARE, ["out.weight", "out.bias"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), SQUARE, ["1.weight", "1.bias"]),
        (nn.Linear(4, 3), FLAT, ["weight", "bias"]),
        (nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Flatten(2)), SQUARE, ["0.weight"]),
        (Scaled(), FLAT, ["out.weight", *(f"norm.{name}" for name in nn.BatchNorm1d(5).state_dict())]),
        (Prototypes(), FLAT, ["prototypes"]),
        (Parametrized(), FLAT, ["out.bias", *(f"out.parametrizations.weight.original{n}" for n in (0, 1))]),
        (nn.Sequential(nn.Flatten()), FLAT, []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_last_layer_is_found(network, images, names):
    assert last_layer(network, images) == names


FAMILIES = {
    "alexnet": "classifier.6", "convnext_tiny": "classifier.2", "densenet121": "classifier", "googlenet": "fc",
    "efficientnet_b0": "classifier.1", "efficientnet_v2_s": "classifier.1", "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1", "mobilenet_v2": "classifier.1", "mobilenet_v3_small": "classifier.3",
    "regnet_y_400mf": "fc", "resnet18": "fc", "resnext50_32x4d": "fc", "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1", "swin_t": "head", "swin_v2_t": "head", "vgg11_bn": "classifier.6",
    "vit_b_16": "heads.head",
}  # fmt: skip


@pytest.mark.parametrize("name", ["squeezenet1_1", *slow(*(name for name in FAMILIES if name != "squeezenet1_1"))])
@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
def test_the_last_layer_of_every_family_of_torchvisions(name):
    size = {"inception_v3": 96, "maxvit_t": 224}.get(name, 64)
    draws = name in ("maxvit_t", "regnet_y_400mf")  # numbers of tensors', while they are built
    with torch.device("cpu" if draws else "meta"):
        network = torchvision(name=name, input_shape=(3, size, size), num_classes=7).to("meta")
        found = last_layer(network, torch.empty(2, 3, size, size, device="meta"))
    parameters = ["weight"] if name == "maxvit_t" else ["weight", "bias"]
    assert found == [f"{FAMILIES[name]}.{parameter}" for parameter in parameters]


# --- checkpoints of another number of classes -------------------------------------------------------------------------


def of_classes(number):
    torch.manual_seed(number)
    return lenet300(input_shape=(1, 28, 28), num_classes=number)


def test_the_last_layer_alone_is_drawn_anew():
    network, given = of_classes(10), of_classes(1000).state_dict()
    drawn = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    filled = fill(network, given, "my.pth", images=SQUARE, new_head=True)
    for name, tensor in filled.module.state_dict().items():
        assert torch.equal(tensor, drawn[name] if name.startswith("fc3.") else given[name])
    assert filled.warnings == [
        "model.head=new: the last layer, fc3, is drawn anew, and not read from model.weights=my.pth"
    ]


def test_it_is_so_where_it_would_fit_and_where_the_file_has_none():
    network, given = of_classes(10), of_classes(11).state_dict()
    given = {name: tensor for name, tensor in given.items() if not name.startswith("fc3.")}
    assert torch.equal(fill(network, given, "a", images=SQUARE, new_head=True).module.fc1.weight, given["fc1.weight"])
    given = {name: tensor + 1 for name, tensor in of_classes(10).state_dict().items()}
    filled = fill(of_classes(10), given, "a", images=SQUARE, new_head=True).module
    assert torch.equal(filled.fc3.weight, of_classes(10).fc3.weight)


def test_the_files_own_last_layer_may_have_another_name():
    given = {name.replace("fc3", "head"): tensor for name, tensor in of_classes(11).state_dict().items()}
    filled = fill(of_classes(10), given, "a", images=SQUARE, new_head=True)
    assert torch.equal(filled.module.fc1.weight, given["fc1.weight"])
    with pytest.raises(WeightsError, match=r"unexpected: more.weight"):
        fill(of_classes(10), {**given, "more.weight": torch.ones(3, 3)}, "a", images=SQUARE, new_head=True)


def test_without_it_the_remedy_is_named():
    with pytest.raises(WeightsError) as error:
        fill(of_classes(10), of_classes(1000).state_dict(), "my.pth", images=SQUARE)
    assert "of another number of classes: fc3.weight is [1000, 100] for [10, 100]" in str(error.value)
    assert "model.head=new draws the last layer anew" in str(error.value)


@pytest.mark.parametrize("name", ["fc3.0.weight", "module.fc3.2.bias"])
def test_nor_must_it_be_one_layer(name):
    given = {("module." if "module" in name else "") + each: t for each, t in of_classes(11).state_dict().items()}
    given = {each: tensor for each, tensor in given.items() if "fc3" not in each} | {name: torch.ones(9)}
    filled = fill(of_classes(10), given, "a", images=SQUARE, new_head=True)
    assert torch.equal(filled.module.fc2.bias, of_classes(11).fc2.bias)


def test_where_there_is_no_other_layer_it_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
    with pytest.raises(WeightsError, match="does not fit"):
        fill(network, nn.Linear(3, 4).state_dict(), "a", images=SQUARE, new_head=True)


def test_a_first_convolution_of_colours_is_summed_for_gray_images():
    given = {**Normalised(7).state_dict(), "first.weight": torch.rand(8, 3, 3, 3)}
    filled = fill(Normalised(10), given, "a", images=SQUARE, new_head=True)
    assert any("first.weight is summed over its channels" in line for line in filled.warnings)
    colours = nn.Conv2d(3, 8, 3, stride=2)
    colours.load_state_dict({"weight": given["first.weight"], "bias": given["first.bias"]})
    torch.testing.assert_close(filled.module.first(SQUARE), colours(SQUARE.expand(-1, 3, -1, -1)))
    with pytest.raises(WeightsError, match=r"images of 3 channels, the data's have 1, for which model.head=new"):
        fill(Normalised(7), given, "a", images=SQUARE)


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_it_is_no_remedy_for_other_layers(layer):
    given = {**of_classes(10).state_dict(), f"{layer}.bias": torch.ones(7)}
    with pytest.raises(WeightsError, match=rf"mis-shaped: {layer}\.bias is \[7\]") as error:
        fill(of_classes(10), given, "my.pth", images=SQUARE)
    assert "model.head" not in str(error.value)
    with pytest.raises(WeightsError, match=rf"mis-shaped: {layer}\.bias is \[7\]"):
        fill(of_classes(10), given, "my.pth", images=SQUARE, new_head=True)


def test_a_network_without_a_last_layer_is_refused():
    class Sampled(nn.Linear):
        def forward(self, images):
            return super().forward(images).detach()

    with pytest.raises(WeightsError, match=r"model.head=new: the last layer of Sampled cannot be found"):
        fill(Sampled(4, 3), Sampled(4, 3).state_dict(), "my.pth", images=FLAT, new_head=True)


@pytest.mark.slow
def test_a_run_starts_from_it_and_says_so(run, tmp_path):
    torch.save(of_classes(1000).state_dict(), tmp_path / "big.pth")
    with pytest.raises(WeightsError, match=r"model.head=new draws"):
        run("stages=[]", "model.weights=big.pth")
    given = ["stages=[]", "model.weights=big.pth", "model.head=new", "plots=false"]
    first, other = (run(*given, f"seed={seed}") for seed in (0, 1))
    assert any("fc3, is drawn anew" in line for line in first["warnings"])
    assert any("does not train the new last layer" in line for line in first["warnings"])
    assert first["accuracy"]["dense"] != other["accuracy"]["dense"]
    states = [load_file(f"{result['folder']}/model.safetensors") for result in (first, other)]
    same = [name for name in states[0] if torch.equal(states[0][name], states[1][name])]
    assert same == [name for name in states[0] if not name.startswith("fc3.")]


@pytest.mark.slow
def test_it_makes_stages_of_their_own_in_the_store(run, tmp_path):
    torch.save(of_classes(10).state_dict(), tmp_path / "ten.pth")
    given = ["stages=[pretrain]", "model.weights=ten.pth", "store=store", "plots=false"]
    kept, drawn = run(*given), run(*given, "model.head=new")
    assert kept["keys"] != drawn["keys"] and drawn["computed"] == ["pretrain"]
    assert not any("does not train" in line for line in drawn["warnings"])


def test_without_weights_it_says_that_it_does_nothing():
    composed, _ = config.compose(["model.head=new"])
    lines = config.idle_settings(config.read(composed), composed, ["model.head=new"])
    assert lines == ["model.head=new does nothing: without model.weights=FILE every layer is drawn anew"]


def test_what_it_may_be(run):
    with pytest.raises(ConfigError, match=r"model\.head must be one of new; got 'fresh'"):
        run("model.head=fresh")
