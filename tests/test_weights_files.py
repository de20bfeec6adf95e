"""Files of every kind in the place of weights: what lies beside tensors runs nothing, what is foreign is named."""

import argparse
import collections
import datetime
import enum
import functools
import gzip
import io
import os
import pathlib
import pickle
import pickletools
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from sparsity.errors import WeightsError
from sparsity.models import lenet300
from sparsity.weights import fill, read_states

RAN = []


def tick(*_):
    """What nothing may call."""
    RAN.append("called")
    return {}


class Settings(dict):
    """A dict of a class of its own, as configurations are."""

    def __setitem__(self, key, value):
        tick()
        super().__setitem__(key, value)

    def __setstate__(self, state):
        tick()


class Logger:
    def __init__(self):
        self.lines = ["a"]

    def __setstate__(self, state):
        tick()


class Color(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


class Calls:
    """Would call a function when loaded."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Lists:
    """Would fill a list, a dict and a state of a class when loaded."""

    def __reduce__(self):
        return Settings, (), {"a": 1}, iter([1, 2]), iter([("b", 2)])


class Attribute:
    """Would set an attribute of a function when loaded."""

    def __reduce__(self):
        return nn.Module.forward, (), (None, {"__doc__": "changed"})


OBJECTS = {
    "scalar": np.float64(0.5), "array": np.arange(3.0), "strings": np.array(["a"], dtype=object), "enum": Color.RED,
    "namespace": argparse.Namespace(lr=0.1), "path": pathlib.Path("a/b"), "time": datetime.datetime(2020, 1, 1),
    "settings": Settings(a=1), "logger": Logger(), "counts": collections.Counter("aab"), "point": Point(1, 2),
    "default": collections.defaultdict(list, a=[1]), "function": tick, "partial": functools.partial(tick, 1),
    "random": random.Random(1).getstate(), "generator": np.random.default_rng(1).bit_generator.state,
    "numbers": (1, 2.5, None, True, "é", b"\x00\xff", 2**80, 1j, {1, 2}, frozenset((3,)), bytearray(b"x")),
    "ranges": [range(3), slice(1, 2)], "size": torch.Size([1, 2]), "dtype": torch.bfloat16, "type": Logger,
    "device": torch.device("cpu"), "parameter": nn.Parameter(torch.ones(2)), "loss": nn.CrossEntropyLoss(),
    "exception": ValueError("x"), "method": Logger().__init__, "called": Calls(tick), "lists": Lists(),
}  # fmt: skip


@pytest.fixture
def network():
    return lenet300(input_shape=(1, 4, 4), num_classes=3)


@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()
    yield
    assert not RAN


def assert_read(path, network):
    other = lenet300(input_shape=(1, 4, 4), num_classes=3)
    filled = fill(other, read_states(path), path).module
    for name, tensor in network.state_dict().items():
        assert torch.equal(filled.state_dict()[name], tensor)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_do_no_harm(tmp_path, network, zipped, protocol):
    how = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    for name, value in OBJECTS.items():
        torch.save({"first": value, "state_dict": network.state_dict(), name: value}, tmp_path / "a.pth", **how)
        RAN.clear()  # making it may run, reading it must not
        assert_read(tmp_path / "a.pth", network)
        assert not RAN, name


def test_tensors_with_attributes_and_parameters_are_read_beside_objects(tmp_path, network):
    state = dict(network.named_parameters())
    state["fc1.weight"].note = "x"
    state["fc2.weight"].register_hook(lambda gradient: gradient)
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", network)


def test_weights_in_a_dict_of_another_class_are_read(tmp_path, network):
    torch.save(Settings(model=Settings(network.state_dict())), tmp_path / "a.pth")
    RAN.clear()
    assert_read(tmp_path / "a.pth", network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_other_number_types_beside_objects(tmp_path, network, dtype):
    state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "a.pth")
    filled = fill(network, read_states(tmp_path / "a.pth"), "a.pth").module
    assert torch.equal(filled.fc2.weight, state["fc2.weight"].float())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function, args",
    [
        (os.system, ("touch ran",)), (os.mkdir, ("ran",)), (exec, ("open('ran', 'w')",)), (eval, ("open('ran', 'w')",)),
        (open, ("ran", "w")), (__import__, ("antigravity",)), (print, ("ran",)), (pickle.loads, (b"",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_would_run_a_program_is_refused_and_named(tmp_path, network, zipped, protocol, function, args, capsys):
    content = {"model": network.state_dict(), "extra": [Calls(function, *args)]}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(WeightsError, match=f"would execute code when loaded .*{function.__name__}"):
        read_states(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"] and not capsys.readouterr().out


def test_nothing_of_this_process_is_changed(tmp_path, network):
    before = nn.Module.forward.__doc__
    torch.save({"model": network.state_dict(), "attribute": Attribute()}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", network)
    assert nn.Module.forward.__doc__ == before


# Instructions of a pickle, written by hand, that reach for what no program of torch's writes.
BY_HAND = {
    "a class's attribute": b"\x80\x02ctorch\nTensor\nN}X\x03\x00\x00\x00addNs\x86b.",
    "an attribute of what is known": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aNs\x86b.",
    "an item of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nX\x01\x00\x00\x00aNs.",
    "a call of a call": b"\x80\x02ctorch\nnn\n)R)R.",
    "an old instance": b"\x80\x02(itests\nClass\n.",
    "an old object": b"\x80\x02(ctests\nClass\no.",
    "an extension": b"\x80\x02\x82\x01.",
    "a nested name": b"\x80\x04\x8c\x05torch\x8c\x0cnn.functional\x93)R.",
    "nothing": b"\x80\x02.",
    "a pop of nothing": b"\x80\x020.",
    "a mark alone": b"\x80\x02(.",
    "a buffer": b"\x80\x05\x97.",
    "a storage of no tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR.",
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_by_hand_are_refused_in_one_line(tmp_path, name, zipped):
    path = tmp_path / "a.pth"
    if zipped:
        torch.save({}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, BY_HAND[name] if entry.endswith("data.pkl") else content)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        buffer = io.BytesIO(path.read_bytes())
        for _ in range(3):  # torch's number, its protocol, the system
            collections.deque(pickletools.genops(buffer), maxlen=0)
        path.write_bytes(buffer.getvalue()[: buffer.tell()] + BY_HAND[name])
    before = dict(vars(torch.Tensor))
    with pytest.raises(WeightsError) as error:
        read_states(path)
    assert "\n" not in str(error.value)
    assert dict(vars(torch.Tensor)) == before and not hasattr(torch._utils._rebuild_tensor_v2, "a")


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path, network):
    for content in (network, {"model": network, "epoch": 3}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match=r"a whole sparsity.models.MLP.*save its state_dict by torch.save"):
            read_states(tmp_path / "a.pth")


def test_arrays_in_the_place_of_weights_are_named(tmp_path, network):
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"holds no state_dict.*fc1.weight is an object of numpy"):
        read_states(tmp_path / "a.pth")
    torch.save({**network.state_dict(), "fc1.weight": state["fc1.weight"]}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"fc1.weight is an object of numpy"):
        fill(network, read_states(tmp_path / "a.pth"), "a.pth")


def test_cycles_and_depths_end(tmp_path, network):
    content = {"state": network.state_dict()}
    content |= {f"again{number}": content for number in range(50)}
    deep = inner = {}
    for _ in range(200):
        inner["a"] = inner = {}
    torch.save({**content, "deep": deep}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", network)


# --- files of other kinds ---------------------------------------------------------------------------------------------


def write_zip(path, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)


def write_arrays(path, save, *arrays, **named):
    with path.open("wb") as file:
        save(file, *arrays, **named)


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


FOREIGN = {
    "is empty": lambda path: path.touch(),
    "is a Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "is a web page": lambda path: path.write_text("\n <!DOCTYPE html><html>Not found</html>"),
    "is text that begins with 'hello'": lambda path: path.write_text("hello\nworld"),
    'is text that begins with \'{"a": 1,': lambda path: path.write_text('{"a": 1, "b": {"c": 2}, "dddd": {}}'),
    "is a NumPy array": lambda path: write_arrays(path, np.save, np.ones(3)),
    r"is a NumPy archive \(npz\) of a.npy, b.npy": lambda path: write_arrays(
        path, np.savez, a=np.ones(3), b=np.ones(3)
    ),
    "is an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "is an ONNX model": lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(50)),
    "is a GGUF file": lambda path: path.write_bytes(b"GGUF" + bytes(100)),
    "is compressed by gzip": lambda path: path.write_bytes(gzip.compress(b"a")),
    "is a tar archive": write_tar,
    "is a pickle that torch.save did not write": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "is a zip archive of a.txt": lambda path: write_zip(path, **{"a.txt": "x"}),
    "is a program of torch.export's": lambda path: write_zip(path, model__archive_format="pt2", model__a="x"),
    "is damaged or cut short": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)),
    r"is damaged or cut short \(": lambda path: path.write_bytes(bytes(range(200, 256)) + bytes(9)),
    "is a folder, not a weights file: give a file": lambda path: path.mkdir(),
    "is a folder, not a weights file: give b.pt in it": lambda path: (path.mkdir(), (path / "b.pt").touch()),
    "is a pipe, not a weights file": os.mkfifo,
    "is no file: give": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_changed_byte_is_noticed_where_there_are_checksums(tmp_path, network, with_checksums):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(with_checksums)
    try:
        torch.save(network.state_dict(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_read(tmp_path / "a.pth", network)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(network.fc1.weight.detach().numpy().tobytes()) + 5] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    if with_checksums:
        with pytest.raises(WeightsError, match=r"is damaged: a/data/0 in it is not what its checksum says"):
            read_states(tmp_path / "a.pth")
    else:
        assert read_states(tmp_path / "a.pth")


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_is_named(tmp_path, what):
    path = tmp_path / "weights.pth"
    FOREIGN[what](path)
    with pytest.raises(WeightsError, match=rf"model.weights=\S+weights.pth {what}") as error:
        read_states(path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"TorchScript archive: save its state_dict by torch.save\(torch.jit.load"):
        read_states(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.onnx.pth", "a"])
def test_the_content_counts_and_not_the_name(tmp_path, network, name):
    torch.save(network.state_dict(), tmp_path / name)
    assert_read(tmp_path / name, network)


def test_safetensors_that_are_damaged(tmp_path):
    for header in (b"{}", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', b"{" * 8):
        (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(WeightsError, match=r"is damaged or cut short \(|holds no state_dict") as error:
            read_states(tmp_path / "a")
        assert "\n" not in str(error.value)
