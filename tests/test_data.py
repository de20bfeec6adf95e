"""Data sets: standard ones, those of the user's own, the validation split, and what is kept between runs."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from PIL import Image

from sparsity import data
from sparsity.config import Normalization
from sparsity.config.schema import Data
from sparsity.errors import ConfigError, DataError
from sparsity.experiment import load_data
from sparsity.nodes import Call


def write_mnist(root, num=30, test=12):
    """A data set in MNIST's format, with labels in turn."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, size in (("train", num), ("t10k", test)):
        pixels = torch.randint(0, 256, (size, 28, 28), dtype=torch.uint8)
        head = struct.pack(">IIII", 0x803, size, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.numpy().tobytes())
        labels = bytes(index % 10 for index in range(size))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, size) + labels)
    return raw


def split(source, validation=0.0, seed=0, normalize=None):
    return data.split(source, validation=validation, seed=seed, normalize=normalize)


def test_digits():
    splits = split(data.digits(), validation=0.1)
    assert splits.input_shape == (1, 28, 28) and splits.num_classes == 10
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert splits.train.images.dtype is torch.uint8 and splits.train.images.max() > 200


def test_mnist_format(tmp_path):
    write_mnist(tmp_path)
    splits = split(data.mnist(root=str(tmp_path)), validation=10)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 10, 12)
    assert splits.input_shape == (1, 28, 28)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"<html>" + content])
def test_damaged_files_are_named(tmp_path, damage):
    file = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"data.root=.*damaged or incomplete.*: replace them") as error:
        data.mnist(root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_files_without_a_network(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def refuse(self):
        Path(self.raw_folder).mkdir(parents=True)  # as torchvision does
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(MNIST, "download", refuse)
    with pytest.raises(DataError, match=r"holds no MNIST, and downloading it failed .*name resolution.*data=digits"):
        data.mnist(root=str(tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir()), "folders of nothing are left"


def test_validation_is_taken_from_train_by_its_own_seed():
    source = data.digits()
    one, same, other = split(source, 100, 0), split(source, 100, 0), split(source, 100, 1)
    assert torch.equal(one.validation.images, same.validation.images)
    assert not torch.equal(one.validation.images, other.validation.images)
    assert torch.equal(one.test.images, other.test.images)
    parts = torch.cat([one.train.images, one.validation.images]).flatten(1)
    assert torch.equal(parts.unique(dim=0), source.train.images.flatten(1).unique(dim=0))
    assert split(source, 0).validation is None and len(split(source, 0).train) == len(source.train)


@pytest.mark.parametrize("validation", [5000, 1e-5])
def test_validation_must_leave_both_sides(validation):
    with pytest.raises(ConfigError, match=r"data.validation must leave images on both sides"):
        split(data.digits(), validation)


def test_pixels_are_scaled_and_normalised():
    source = data.digits()
    plain = split(source)
    assert plain.scale(plain.test.images).max() <= 1 and plain.scale(plain.test.images).dtype is torch.float32
    normal = split(source, normalize=Normalization([0.5], [0.25]))
    torch.testing.assert_close(normal.scale(plain.test.images[:4]), (plain.test.images[:4].float() / 255 - 0.5) / 0.25)
    with pytest.raises(ConfigError, match=r"data.normalize.mean must hold 1 number or one for each of 1 channels"):
        split(source, normalize=Normalization([0.5, 0.5], [1.0]))


def test_a_loader_of_the_users_own():
    images, labels = torch.rand(10, 3), torch.arange(10) % 2
    splits = split(((images, labels), (images, labels), 2), validation=0.2)
    assert len(splits.train) == 8 and torch.equal(splits.scale(splits.test.images), images)
    for bad, message in [
        (((images, labels[:5]), (images, labels), 2), "10 images and 5 labels"),
        (((images, labels), (images, labels), 1), "1 class"),
        (((images, labels + 1), (images, labels), 2), "labels reach from 1 to 2"),
        (((images, labels), (images[:, :2], labels), 2), r"test images are \[2\], the training images \[3\]"),
        ((3, (images, labels), 2), "must be a pair"),
        (((images, labels),), "a loader must return"),
        (((images.long(), labels), (images, labels), 2), "must be uint8 or floating point"),
        (((images, labels.float()), (images, labels), 2), "labels must be whole numbers"),
        (((images / 0, labels), (images, labels), 2), "hold NaN or infinity"),
        (((images[:0], labels[:0]), (images, labels), 2), "is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            split(bad)


@pytest.mark.slow
def test_mnist_fits_in_60_megabytes(mnist_root):
    splits = split(data.mnist(root=mnist_root), validation=5000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (55000, 5000, 10000)
    assert sum(part.num_bytes for part in (splits.train, splits.validation, splits.test)) < 60e6


def test_names_of_classes(tmp_path):
    write_mnist(tmp_path)
    assert split(data.digits()).classes == [str(digit) for digit in range(10)]
    assert data.mnist(root=str(tmp_path)).classes[3] == "3 - three"
    images, labels = torch.rand(10, 3), torch.arange(10) % 2
    sets = ((images, labels), (images, labels), 2)
    assert split((*sets, None, ("cat", "dog"))).classes == ["cat", "dog"] and split(sets).classes is None
    for bad in (["cat"], ["cat", "cat"], ["a", "b", "c"]):
        with pytest.raises(DataError, match="must name each of its 2 classes"):
            split((*sets, None, bad))


def test_files_of_mnist_that_do_not_belong_together(tmp_path, monkeypatch):
    raw = write_mnist(tmp_path)
    monkeypatch.setattr("sparsity.data.standard.SWAPPED", [30, 12])
    with pytest.raises(DataError, match=r"damaged or incomplete \(training and test files are swapped\)"):
        data.mnist(root=str(tmp_path))
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match=r"damaged or incomplete \(30 training images and 12 labels\): replace them"):
        data.mnist(root=str(tmp_path))


def test_a_pipe_among_the_files_of_mnist_is_not_waited_for(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "train-images-idx3-ubyte").unlink()
    os.mkfifo(raw / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match=r"damaged or incomplete \(train-images-idx3-ubyte is a pipe\)"):
        data.mnist(root=str(tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "sets")
    assert len(data.mnist(root="~/sets").train) == 30


def data_of(target, function=None, **numbers):
    """A run that asks for data alone."""
    loader = Call("data.loader", target, function or getattr(data, target.rpartition(".")[2]), numbers)
    return SimpleNamespace(data=Data(loader, 0.2, 0, None), name={})


def test_data_is_kept_for_as_long_as_it_lies_on_disk_as_it_did(tmp_path):
    run = data_of("sparsity.data.mnist", root=str(tmp_path))
    raw = write_mnist(tmp_path)
    first, fingerprint = load_data(run)
    assert load_data(run)[0] is first
    file = raw / "train-images-idx3-ubyte"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    second, other = load_data(run)
    assert other != fingerprint and load_data(run)[0] is second


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_of_images_that_changed_is_read_again(tmp_path, stream):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            Image.new("L", (4, 4), 9 * number).save(tmp_path / name / f"{number}.png")
    run = data_of("sparsity.data.image_folder", root=str(tmp_path), size=[4, 4], channels=1, test=0.25, stream=stream)
    first, fingerprint = load_data(run)
    assert load_data(run)[0] is first
    Image.new("L", (4, 4), 9).save(tmp_path / "a" / "8.png")
    grown, _ = load_data(run)
    assert sum(len(part) for part in (grown.train, grown.validation, grown.test)) == 17
    (tmp_path / "a" / "8.png").unlink()
    again, same = load_data(run)
    assert again is not grown and same == fingerprint  # by what the files hold, not by their times
    (tmp_path / "b").rename(tmp_path / "c")
    assert load_data(run)[0].classes == ["a", "c"]


def test_a_loader_of_the_users_own_is_asked_again_by_every_run_but_not_by_every_member(tmp_path):
    file = tmp_path / "shade.txt"

    def load(*, root="nowhere"):
        images = torch.full((10, 3), float(file.read_text()))
        return (images, torch.arange(10) % 2), (images, torch.arange(10) % 2), 2

    run = data_of("mine.load", load)
    file.write_text("1")
    assert load_data(run)[0].train.images.max() == 1
    file.write_text("2")
    first, _ = load_data(run, in_sweep=True)
    assert first.train.images.max() == 2 and load_data(run, in_sweep=True)[0] is first
    given = data_of("mine.load", load, root=str(file))
    second, _ = load_data(given, in_sweep=True)
    assert load_data(given, in_sweep=True)[0] is second
    file.write_text("3.5")
    assert load_data(given, in_sweep=True)[0].train.images.max() == 3.5


def test_what_a_run_says_of_its_images(tmp_path, run):
    for name, num in (("train", 6), ("test", 2), ("val", 2)):
        for label, shade in (("cat", 40), ("dog", 200), ("emu", 90))[: 2 if name == "val" else 3]:
            (tmp_path / "images" / name / label).mkdir(parents=True)
            for number in range(num):
                Image.new("L", (4, 4), shade).save(tmp_path / "images" / name / label / f"{number}.png")
    images = ["data=image_folder", f"data.root={tmp_path}/images", "data.loader.size=[4,4]", "data.loader.channels=1"]
    own = ["data.validation=0.5", "data.loader.test=0.1", "data.loader.background=black", "stages=[pretrain]"]
    result = run(*images, *own, "model=mlp", "plots=false")
    assert result["classes"] == ["cat", "dog", "emu"]
    with safetensors.safe_open(f"{result['folder']}/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sparsity"])["classes"] == ["cat", "dog", "emu"]
    assert result["warnings"][:4] == [
        "validation has no image of class emu",
        "data.validation does nothing: the data brings its own validation set",
        "data.loader.test does nothing: data.root has test/",
        "data.loader.background does nothing: no image is transparent",
    ]
