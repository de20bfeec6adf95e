"""Checkpoints of other programs: names that wrappers changed, states beside each other, weights stored in parts."""

import copy
from collections import OrderedDict

import pytest
import torch
from sample_networks import Normalised
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from sparsity.errors import WeightsError
from sparsity.models import lenet300
from sparsity.population import stack
from sparsity.weights import fill, read_states, write_state


class Inner(nn.Module):
    """A network whose submodules are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.model = nn.Linear(3, 2)

    def forward(self, images):
        return self.model(self.module(images))


class Bare(nn.Module):
    """Where one submodule, named as a wrapper, is all there is."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 2)

    def forward(self, images):
        return self.module(images)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.second(self.first(images).relu())


def networks():
    return [lenet300(input_shape=(1, 4, 4), num_classes=3), Normalised(3), Inner(), Bare()]


def anew(network):
    """A network of the same kind with other numbers."""
    other = copy.deepcopy(network)
    for tensor in other.state_dict().values():
        tensor.zero_() if tensor.dtype is torch.int64 else tensor.normal_().abs_()
    return other


def assert_same(network, state):
    own = network.state_dict()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def through(content, path, network):
    """What a network is after a file of the content was read into another one of its kind."""
    torch.save(content, path)
    return fill(anew(network), read_states(path), path)


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "model._orig_mod."]
PREFIXES += ["module.module.", "backbone.", "learner.net.", "_forward_module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_prefixes_are_taken_off(tmp_path, network, prefix):
    state = network.state_dict()
    filled = through({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "a.pth", network)
    assert_same(filled.module, state)
    assert not filled.warnings


@pytest.mark.parametrize("part", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_submodules_are_taken_off(tmp_path, part):
    network = Inner()
    state = network.state_dict()
    wrapped = {name.replace("module.0", f"module.{part}.0", 1): tensor for name, tensor in state.items()}
    assert wrapped.keys() != state.keys()
    assert_same(through({f"module.{k}": v for k, v in wrapped.items()}, tmp_path / "a.pth", network).module, state)


@pytest.mark.slow
def test_a_compiled_submodule_and_a_parallel_one(tmp_path):
    network = Normalised(3)
    state = OrderedDict(network.state_dict())
    network.first = torch.compile(network.first)
    network.left = nn.DataParallel(network.left)
    assert {"first._orig_mod.weight", "left.module.weight"} <= network.state_dict().keys()
    assert_same(through(network.state_dict(), tmp_path / "a.pth", Normalised(3)).module, state)


def test_what_the_model_wants_before_its_names_is_put_there(tmp_path):
    inner = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    network = nn.Module()
    network.body = nn.Sequential(inner)
    filled = through(inner.state_dict(), tmp_path / "a.pth", network)
    assert_same(filled.module.body[0], inner.state_dict())


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_averaged_weights(tmp_path, network):
    average = AveragedModel(network)
    average.update_parameters(network)
    assert "n_averaged" in average.state_dict()
    assert_same(through(average.state_dict(), tmp_path / "a.pth", network).module, network.state_dict())


WRAPPERS = [
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "ema",
    "model_ema",
    "params",
    "weights",
    "best",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_training_checkpoint(tmp_path, wrapper):
    network = Normalised(3)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 1, 9, 9)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3, "best_acc": 0.5, "optimizer": optimizer.state_dict(), "history": [1.0], "name": "x",
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        wrapper: {f"module.{name}": tensor for name, tensor in network.state_dict().items()},
    }  # fmt: skip
    filled = through(content, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    assert not filled.warnings
    nested = through({"checkpoint": {"inner": content}}, tmp_path / "a.pth", network)
    assert_same(nested.module, network.state_dict())


@pytest.mark.parametrize("names", [("model", "ema"), ("ema", "state_dict"), ("params_ema", "params"), ("best", "net")])
def test_of_several_states_the_networks_own_is_taken_and_it_is_said(tmp_path, names):
    network = Normalised(3)
    average = anew(network).state_dict()
    own = next(name for name in names if name in ("model", "state_dict", "params", "net"))
    content = {name: network.state_dict() if name == own else average for name in names}
    filled = through(content, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    other = next(name for name in names if name != own)
    assert f"{own} is taken, and not {other}" in " ".join(filled.warnings)


def test_of_several_prefixes_too(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    states = {"model.": network.state_dict(), "ema_model.": anew(network).state_dict()}
    content = {prefix + name: tensor for prefix, state in states.items() for name, tensor in state.items()}
    filled = through({"state_dict": content}, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    assert "state_dict.model is taken, and not state_dict.ema_model" in " ".join(filled.warnings)


@pytest.mark.parametrize("average", ["ema.", "module.ema.", "averaged_model."])
def test_an_average_beside_the_names_as_they_are(tmp_path, average):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    content = {average + name: tensor for name, tensor in anew(network).state_dict().items()}
    filled = through({**network.state_dict(), **content}, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    assert "is taken, and not " + average.removesuffix(".") in " ".join(filled.warnings)


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("encoder_q.", "encoder_k.")])
def test_several_states_without_an_order_are_refused(tmp_path, prefixes):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    content = {p + name: torch.rand_like(t) for p in prefixes for name, t in network.state_dict().items()}
    with pytest.raises(WeightsError, match=f"several states that fit.*{prefixes[0][:-1]}, {prefixes[1][:-1]}"):
        through(content, tmp_path / "a.pth", network)


def test_one_state_under_two_names_is_one(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    state = network.state_dict()
    assert not through({"a": state, "b": state}, tmp_path / "a.pth", network).warnings


def test_other_modules_beside_the_network_are_left_out_and_named(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    content = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    filled = through({**content, "criterion.weight": torch.ones(3)}, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    assert "what is not under model. is left out: criterion" in " ".join(filled.warnings)


# --- what is no weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["num_batches_tracked", "total_ops", "total_params"])
def test_counters_may_be_missing_or_too_many(tmp_path, leaf):
    network = Normalised(3)
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    content = {**state, f"left.{leaf}": torch.zeros(1, dtype=torch.float64)}
    assert_same(through(content, tmp_path / "a.pth", network).module, state)


@pytest.mark.parametrize("kind", [torch.float32, torch.int32])
def test_a_counter_of_another_type_is_taken(tmp_path, kind):
    network = Normalised(3)
    network.norm.num_batches_tracked += 7
    content = {name: t.to(kind) if t.dtype is torch.int64 else t for name, t in network.state_dict().items()}
    assert through(content, tmp_path / "a.pth", network).module.norm.num_batches_tracked == 7


def test_running_statistics_that_one_of_both_lacks_are_named(tmp_path):
    tracking, bare = Normalised(3), Normalised(3)
    bare.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(WeightsError, match=r"missing: norm.running_mean, norm.running_var.*keeps no running"):
        through(bare.state_dict(), tmp_path / "a.pth", tracking)
    with pytest.raises(WeightsError, match=r"unexpected: norm.running_mean.*the model's normalisation"):
        through(tracking.state_dict(), tmp_path / "a.pth", bare)


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_tied_tensor_under_one_of_its_names(tmp_path, name):
    network = Tied()
    filled = through({name: network.first.weight.detach()}, tmp_path / "a.pth", network).module
    assert torch.equal(filled.first.weight, network.first.weight) and filled.second.weight is filled.first.weight


def test_tied_tensors_that_differ_in_the_file_are_refused(tmp_path):
    content = {"first.weight": torch.zeros(4, 4), "second.weight": torch.ones(4, 4)}
    with pytest.raises(WeightsError, match=r"first.weight and second.weight are one tensor in the model, and differ"):
        through(content, tmp_path / "a.pth", Tied())


def test_a_name_more_for_a_tensor_that_the_model_has(tmp_path):
    network = nn.Sequential(OrderedDict(first=nn.Linear(4, 4, bias=False)))
    assert_same(through(Tied().state_dict(), tmp_path / "a.pth", network).module, {})
    separate = {"first.weight": torch.ones(4, 4), "second.weight": torch.ones(4, 4)}
    with pytest.raises(WeightsError, match=r"unexpected: second.weight"):
        through(separate, tmp_path / "a.pth", network)


@pytest.mark.parametrize("name", ["aux1.conv.weight", "AuxLogits.fc.bias", "aux_head.weight"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_auxiliary_heads_are_left_out_and_named(tmp_path, name, prefix):
    network = Normalised(3)
    content = {prefix + own: tensor for own, tensor in {**network.state_dict(), name: torch.ones(2)}.items()}
    filled = through(content, tmp_path / "a.pth", network)
    assert_same(filled.module, network.state_dict())
    assert f"the model has no {prefix}{name.rpartition('.')[0]}: left out" in " ".join(filled.warnings)


# --- weights in parts -------------------------------------------------------------------------------------------------


def test_the_form_of_torch_prune(tmp_path):
    network = Normalised(3)
    for layer in (network.first, network.left, network.out):
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.random_unstructured(layer, "bias", 0.25)
    network(torch.rand(2, 1, 9, 9))  # now the plain weights are what the masks make of them
    assert "left.bias_orig" in network.state_dict()
    content = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    filled = through({"model": content}, tmp_path / "a.pth", Normalised(3)).module
    for layer in ("first", "left", "out"):
        for name in ("weight", "bias"):
            found, expected = (getattr(getattr(each, layer), name) for each in (filled, network))
            assert torch.equal(found, expected) and (expected == 0).any()


def test_the_form_of_torch_prune_in_attention(tmp_path):
    network = nn.Sequential(nn.MultiheadAttention(8, 2))
    plain = copy.deepcopy(network)
    prune.l1_unstructured(network[0], "in_proj_weight", 0.5)
    prune.l1_unstructured(network[0].out_proj, "weight", 0.5)
    filled = through(network.state_dict(), tmp_path / "a.pth", plain).module
    assert torch.equal(filled[0].in_proj_weight, network[0].in_proj_weight)
    assert int((filled[0].out_proj.weight == 0).sum()) == 32


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("how", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_into_plain_weights(tmp_path, how, dim):
    network = Normalised(3)
    network.left, network.out = how(network.left, dim=dim), how(network.out, dim=dim)
    expected = [network.left.weight.detach().clone(), network.out.weight.detach().clone()]
    filled = through({"state_dict": network.state_dict()}, tmp_path / "a.pth", Normalised(3)).module
    assert torch.equal(filled.left.weight, expected[0]) and torch.equal(filled.out.weight, expected[1])


@pytest.mark.parametrize("how", [nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_what_cannot_be_put_together_is_named(tmp_path, how):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    plain = copy.deepcopy(network)
    how(network.fc2)
    with pytest.raises(WeightsError, match=r"fc2.weight is (under spectral_norm|parametrized).*remove_.* before"):
        through(network.state_dict(), tmp_path / "a.pth", plain)


def test_a_form_that_the_model_is_in_stays(tmp_path):
    pruned, other = (lenet300(input_shape=(1, 4, 4), num_classes=3) for _ in range(2))
    for network in (pruned, other):
        prune.random_unstructured(network.fc1, "weight", 0.5)
    torch.save(pruned.state_dict(), tmp_path / "a.pth")
    assert_same(fill(other, read_states(tmp_path / "a.pth"), "a.pth").module, pruned.state_dict())


# --- what does not fit ------------------------------------------------------------------------------------------------


def told(content, network):
    with pytest.raises(WeightsError) as error:
        fill(network, content, "my.pth")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unlike_names_are_told_with_their_prefix():
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    line = told({f"features.{n}.weight": torch.rand(n + 2, 3) for n in range(5)}, network)
    assert "no name is the model's; the file's 5 are features.0.weight" in line
    assert "begin with features. and the model's do not" in line and "the model's 6 are fc1.weight" in line


def test_names_that_differ_while_all_shapes_fit_are_said_to():
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    content = {f"layers.{n}": tensor for n, tensor in enumerate(network.state_dict().values())}
    assert "all shapes fit in their order, but the names differ; rename layers.0 → fc1.weight" in told(content, network)


def test_another_number_of_layers_is_told():
    content = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)]).state_dict()
    line = told(content, nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)]))
    assert "unexpected: 3.weight, 3.bias" in line and "the file has 8 tensors, the model 6" in line


def test_images_of_other_channels_are_told():
    content = {**Normalised(3).state_dict(), "first.weight": torch.rand(8, 3, 3, 3)}
    assert "it is of images of 3 channels, the data's have 1" in told(content, Normalised(3))


def test_objects_in_the_place_of_weights_are_named(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    content = {**network.state_dict(), "fc1.weight": [1.0, 2.0]}
    with pytest.raises(WeightsError, match=r"of another type: fc1\.weight is a list"):
        through(content, tmp_path / "a.pth", network)


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
def test_tensors_of_other_layouts():
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    state = network.state_dict()
    quantized = torch.quantize_per_tensor(state["fc1.weight"], 0.1, 0, torch.qint8)
    for tensor, word in (
        (quantized, "fc1.weight is quantized"),
        (state["fc1.weight"].to("meta"), "fc1.weight is on the device meta"),
        (state["fc1.weight"].to(torch.complex64), r"fc1.weight is torch.complex64 for torch.float32"),
    ):
        assert word in told({**state, "fc1.weight": tensor}, network)
    for tensor in (state["fc1.weight"].to_sparse(), state["fc1.weight"].t().contiguous().t()):
        filled = fill(anew(network), {**state, "fc1.weight": tensor}, "my.pth").module
        assert_same(filled, state)


def test_maps_in_any_memory_order(tmp_path):
    network = Normalised(3).to(memory_format=torch.channels_last)
    filled = through(network.state_dict(), tmp_path / "a.pth", Normalised(3)).module
    assert_same(filled, network.state_dict())
    assert filled.left.weight.is_contiguous()


def test_a_buffer_that_is_infinite_by_design(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    network.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1))
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert fill(copy.deepcopy(network), read_states(tmp_path / "a.pth"), "a.pth").module.causal[0, 1] == -torch.inf


def test_numbers_that_float32_cannot_hold(tmp_path):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    state["fc1.bias"] = torch.full((300,), 1e-60, dtype=torch.float64)
    filled = fill(network, state, "my.pth")
    assert "entries of fc1.bias are too small for float32" in filled.warnings[0]
    state["fc1.bias"] *= 1e120
    assert "too large for float32, NaN or infinity there, in fc1.bias" in told(state, network)


# --- what a run writes ------------------------------------------------------------------------------------------------


def odd_networks():
    """Networks whose names are those of wrappers, of forms, of heads and of counters, or that share tensors."""
    infinite = nn.Sequential(nn.Linear(4, 2))
    infinite.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1))
    pruned, normed = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    parametrizations.weight_norm(normed[0])
    named = nn.ModuleDict({name: nn.Linear(4, 2) for name in ("_orig_mod", "module", "model", "aux", "ema")})
    named["module"].module = nn.Linear(4, 2)
    for name in ("weight_mask", "total_ops", "n_averaged"):
        named.register_buffer(name, torch.ones(2))
    others = [nn.GRU(4, 3), nn.BatchNorm1d(4, momentum=None), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]
    return [*networks(), Tied(), infinite, pruned, normed, named, *others]


@pytest.mark.parametrize("network", odd_networks(), ids=lambda network: type(network).__name__)
def test_what_a_run_writes_is_read_back(tmp_path, network):
    written = stack([network]).state(0)
    assert written.keys() == network.state_dict().keys()
    write_state(tmp_path / "model.safetensors", written, {})
    for tensor in network.parameters():
        tensor.detach().zero_()
    filled = fill(network, read_states(tmp_path / "model.safetensors"), "model.safetensors")
    assert_same(filled.module, written)
    assert not filled.warnings


def test_a_module_is_left_as_it_is_where_the_file_is_refused():
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    told({**anew(network).state_dict(), "fc3.bias": torch.full((3,), torch.nan)}, network)
    assert_same(network, before)


@pytest.mark.parametrize("name", ["fc1.mask", "fc1.weight_mask"])
def test_masks_beside_weights(tmp_path, name):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    mask = (torch.rand(300, 16) > 0.5).float()
    loose = {**network.state_dict(), name: mask}
    assert f"weights are not zero where {name} is" in told(loose, network)
    filled = fill(network, {**loose, "fc1.weight": loose["fc1.weight"] * mask}, "my.pth")
    assert torch.equal(filled.module.fc1.weight == 0, mask == 0)
    assert filled.warnings == [f"model.weights=my.pth: the weights are zero where {name} are: these are left out"]


def test_tensors_of_a_device_that_is_not_there(tmp_path, monkeypatch):
    network = lenet300(input_shape=(1, 4, 4), num_classes=3)
    for extra in ({}, {"args": Inner}):
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:5")
        torch.save({"model": network.state_dict(), **extra}, tmp_path / "a.pth")
        monkeypatch.undo()
        assert b"cuda:5" in (tmp_path / "a.pth").read_bytes()
        filled = fill(anew(network), read_states(tmp_path / "a.pth"), "a.pth")
        assert_same(filled.module, network.state_dict())
