"""Data sets: loaders, the validation split, streaming, and what is wrong with a file or a folder."""

import struct

import pytest
import torch
from PIL import Image

from sparsity import data
from sparsity.config import Normalization
from sparsity.data.picture import reader
from sparsity.errors import ConfigError, DataError


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


def write_images(folder, classes=("cat", "dog"), num=6, size=(9, 7)):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(num):
            colour = (40 * index, 100 * number, 7)
            Image.new("RGB", size, colour).save(folder / name / f"{index}.png")


def split(source, validation=0.0, seed=0, normalize=None):
    return data.split(source, validation=validation, seed=seed, normalize=normalize)


def folder(root, stream=False, size=(5, 4), channels=3, test=0.25):
    return data.image_folder(root=str(root), size=list(size), channels=channels, test=test, stream=stream)


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
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(MNIST, "download", refuse)
    with pytest.raises(DataError, match=r"holds no MNIST, and downloading it failed .*name resolution.*data=digits"):
        data.mnist(root=str(tmp_path))


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


def test_image_folder_splits_test_off(tmp_path):
    write_images(tmp_path)
    splits = split(folder(tmp_path), validation=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 2, 3)
    assert splits.input_shape == (3, 5, 4)
    assert split(folder(tmp_path, channels=1)).input_shape == (1, 5, 4)


def test_image_folder_with_its_own_sets(tmp_path):
    for name, num in (("train", 5), ("val", 2), ("test", 3)):
        write_images(tmp_path / name, num=num)
    splits = split(folder(tmp_path), validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 4, 6)
    everything = split(folder(tmp_path), validation=0)
    assert everything.validation is None and len(everything.train) == 14


def test_streaming_gives_the_same_batches(tmp_path):
    write_images(tmp_path, num=9)
    held, streamed = (split(folder(tmp_path, stream=stream), validation=3) for stream in (False, True))
    assert isinstance(held.train, data.Images) and isinstance(streamed.train, data.Files)
    order = torch.stack([torch.randperm(len(held.train)) for _ in range(2)])
    batches = list(zip(held.train.batches(order, 4), streamed.train.batches(order, 4), strict=True))
    for one, other in batches:
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert one.images.shape[:2] == (2, len(held.train) % 4 or 4)


@pytest.mark.parametrize(
    ("classes", "num", "message"),
    [
        ((), 0, "holds no class folders"),
        (("cat",), 3, r"holds one class \('cat'\)"),
        (("cat", "dog"), 0, "at least one"),
    ],
)
def test_empty_and_one_class_folders(tmp_path, classes, num, message):
    write_images(tmp_path, classes, num)
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/0.png is no image that can be read: mend or remove it"):
        folder(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="is no folder: give a folder that holds"):
        folder(tmp_path / "nothing")


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


def test_sets_without_train_and_classes_that_train_lacks(tmp_path):
    write_images(tmp_path / "one" / "Test")
    with pytest.raises(DataError, match="holds Test but no train"):
        folder(tmp_path / "one")
    write_images(tmp_path / "two" / "train")
    write_images(tmp_path / "two" / "test", classes=("cat", "dog", "emu"))
    with pytest.raises(DataError, match="test has classes that train lacks: emu"):
        folder(tmp_path / "two")


def test_grey_of_16_bits(tmp_path):
    write_images(tmp_path)
    import numpy

    Image.fromarray(numpy.full((7, 9), 20000, dtype=numpy.uint16)).save(tmp_path / "cat" / "0.png")
    read = reader([7, 9], 1)
    assert read(str(tmp_path / "cat" / "0.png")).unique().tolist() == [78]


def test_what_would_fill_the_memory_is_streamed(tmp_path, monkeypatch):
    write_images(tmp_path)
    assert isinstance(folder(tmp_path, stream=None).train, data.Images)
    monkeypatch.setattr("sparsity.data.folder.free_bytes", lambda: 100)
    assert isinstance(folder(tmp_path, stream=None).train, data.Files)
