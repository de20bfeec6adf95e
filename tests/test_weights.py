"""Weights files: which are read, which are refused, and that nothing in them is executed."""

import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

import sparsity
from sparsity.data import digits
from sparsity.errors import WeightsError
from sparsity.models import lenet300
from sparsity.weights import fill, read_states, write_state


@pytest.fixture
def network():
    return lenet300(input_shape=(1, 28, 28), num_classes=10)


def save(kind, network, path):
    state = network.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "parallel":
        torch.save(OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()), path)
    elif kind == "both":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["state_dict", "safetensors", "legacy", "wrapped", "parallel", "both"])
def test_formats(tmp_path, network, kind):
    path = tmp_path / "weights.pth"
    save(kind, network, path)
    filled = fill(lenet300(input_shape=(1, 28, 28), num_classes=10), read_states(path), path).module
    for name, tensor in network.state_dict().items():
        assert torch.equal(filled.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["state_dict", "safetensors", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files(tmp_path, network, kind, share):
    path = tmp_path / "weights.pth"
    save(kind, network, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"model.weights=.*weights.pth") as error:
        read_states(path)
    assert "\n" not in str(error.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"fc1.weight": Payload(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="would execute code when loaded"):
        read_states(path)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path, network):
    torch.save(network, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match=r"save its state_dict by torch.save"):
        read_states(tmp_path / "whole.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"a": 3}, [1, 2], {1: torch.zeros(2)}])
def test_what_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="holds no state_dict"):
        read_states(tmp_path / "other.pth")


def test_no_file(tmp_path):
    with pytest.raises(WeightsError, match="is no file: give a safetensors file or a state_dict"):
        read_states(tmp_path / "nothing.pth")


def test_misfits_are_listed(network):
    state = network.state_dict()
    state["fc1.weight"] = state["fc1.weight"][:, :5]
    state["extra"] = state.pop("fc3.bias")
    with pytest.raises(WeightsError) as error:
        fill(network, state, "my.pth")
    for part in ("missing: fc3.bias", "unexpected: extra", r"mis-shaped: fc1.weight is [300, 5] for [300, 784]"):
        assert part in str(error.value)


def test_weights_that_are_nan_are_refused(network):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["fc2.bias"][0] = torch.nan
    with pytest.raises(WeightsError, match=r"NaN or infinity in fc2.bias"):
        fill(network, state, "my.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path, network, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_state(path, network.state_dict(), {})
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_state(path, network.state_dict(), {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_load_rebuilds_the_network_of_a_run(run):
    result = run("model=mlp", "model.factory.hidden=[20]", "stages=[pretrain,prune]", "plots=false")
    path = f"{result['folder']}/model.safetensors"
    network = sparsity.load(path)
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    assert sum(int(weight.count_nonzero()) for weight in weights) == result["nonzero"]["weights"]
    test = digits().test
    accuracy = (network(test.images.float() / 255).argmax(1) == test.labels).double().mean().item()
    assert accuracy == pytest.approx(result["accuracy"]["final"]["test"])


@pytest.mark.slow
def test_load_of_a_users_own_class_takes_a_module(run, tmp_path, monkeypatch):
    import sample_networks

    monkeypatch.setenv("SPARSITY_TRUST", "sample_networks")
    result = run(
        "model=custom", "model.factory._target_=sample_networks.Normalised", "stages=[pretrain]", "plots=false"
    )
    path = f"{result['folder']}/model.safetensors"
    with pytest.raises(WeightsError, match=r"give load\(path, module=…\)"):
        sparsity.load(path)
    assert isinstance(sparsity.load(path, module=sample_networks.Normalised(10)), sample_networks.Normalised)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(network, kind):
    state = {name: tensor.to(kind) for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"of another type: fc1.weight is"):
        fill(network, state, "my.pth")


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_taken(network, kind):
    state = {name: tensor.to(kind) for name, tensor in network.state_dict().items()}
    assert fill(network, state, "my.pth").module.fc1.weight.dtype is torch.float32


def test_weights_that_overflow_are_refused(network):
    state = {name: tensor.double() * 1e200 for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match="NaN or infinity"):
        fill(network, state, "my.pth")


def test_load_of_what_no_run_wrote(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"give load\(path, module=…\)"):
        sparsity.load(tmp_path / "other.pth")
    assert sparsity.load(tmp_path / "other.pth", module=network) is network


FACTORY = '{"factory": {"_target_": "%s", "hidden": "x"}, "input_shape": [1], "num_classes": 2}'


@pytest.mark.parametrize(
    "description, message",
    [
        ("not JSON", "describes its network by what no run writes"),
        ("[1]", "describes its network by what no run writes"),
        ('{"factory": {"_target_": 3}}', "describes its network by what no run writes"),
        ('{"factory": {"_target_": "sparsity.models.mlp"}}', "describes its network by what no run writes"),
        (FACTORY % "os.system", r"is of os\.system, not of this"),
        (FACTORY % "sparsity.models.get_close_matches", "is of sparsity.models.get_close_matches, not of this package"),
        (FACTORY % "sparsity.models.mlp", "describes a network that cannot be built: "),
    ],
)
def test_a_description_that_no_run_writes(tmp_path, network, description, message):
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata={"sparsity": description})
    with pytest.raises(WeightsError, match=rf"path=\S+a.safetensors {message}"):
        sparsity.load(tmp_path / "a.safetensors")
    assert sparsity.load(tmp_path / "a.safetensors", module=network) is network
