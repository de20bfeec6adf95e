"""Data as the arrays of an .npz file: which array is what, the shapes of examples, labels of every kind."""

import numpy as np
import pytest
import torch

from sparsity.data import arrays, split
from sparsity.errors import SparsityError

NUM = 30
LABELS = np.arange(NUM) % 3
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 6, 5), dtype=np.uint8)


@pytest.fixture
def load(tmp_path):
    """What the loader makes of some arrays."""

    def loaded(channels=None, scale=None, **held):
        np.savez(tmp_path / "data.npz", **held)
        return arrays(root=str(tmp_path / "data.npz"), channels=channels, range=scale, test=0.2)

    return loaded


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (("x_train", "y_train"), None, ("x_test", "y_test")),
        (("train_images", "train_labels"), ("val_images", "val_labels"), ("test_images", "test_labels")),
        (("X", "Y"), ("X_dev", "Y_dev"), ("X_eval", "Y_eval")),
        (("trainData", "trainTargets"), None, ("testData", "testTargets")),
    ],
)
def test_sets_go_by_their_names(load, train, validation, test):
    held = {}
    for names, size in ((train, 20), (validation, 4), (test, 6)):
        held |= dict(zip(names or (), (IMAGES[:size], LABELS[:size])))
    source = load(**held)
    assert torch.equal(source.train.images[:, 0], torch.from_numpy(IMAGES[:20]))
    assert source.train.images.dtype is torch.uint8 and source.train.labels.tolist() == LABELS[:20].tolist()
    assert len(source.test.labels) == 6 and (source.validation is None) == (validation is None)
    assert source.num_classes == 3 and source.classes == ["0", "1", "2"] and not source.notes
    assert "data.loader.test" in source.idle


def test_one_set_is_split_by_a_seed_of_its_own(load):
    source, again = load(images=IMAGES, labels=LABELS), load(images=IMAGES, labels=LABELS)
    assert (len(source.train.labels), len(source.test.labels)) == (24, 6) and not source.idle
    assert torch.equal(source.test.images, again.test.images)
    splits = split(source, validation=4, seed=0, normalize=None)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 4, 6]


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((), None, (1,)),
        ((7,), None, (7,)),
        ((6, 5), None, (1, 6, 5)),
        ((6, 5), "first", (6, 5)),
        ((6, 5), "last", (5, 6)),
        ((3, 6, 5), None, (3, 6, 5)),
        ((6, 5, 3), None, (3, 6, 5)),
        ((3, 5, 3), None, (3, 5, 3)),
        ((3, 5, 3), "last", (3, 3, 5)),
        ((2, 4, 6, 5), None, (2, 4, 6, 5)),
    ],
)
def test_examples_have_their_channels_first(load, shape, channels, expected):
    values = np.random.default_rng(1).random((NUM, *shape))
    source = load(channels, x_train=values, y_train=LABELS, x_test=values, y_test=LABELS)
    assert source.train.shape == expected and source.train.images.dtype is torch.float32
    assert np.array_equal(np.sort(values.ravel()).astype(np.float32), source.train.images.flatten().sort().values)
    if shape == (6, 5, 3):
        assert torch.equal(source.train.images[:, 1], torch.from_numpy(values[..., 1]).float())


@pytest.mark.parametrize("kind", ["uint8", "int64", "float64", "uint16"])
def test_values_are_taken_by_their_range(load, kind):
    given = IMAGES.astype(kind)
    source = load(scale=[0, 255], x=given, y=LABELS)
    values = source.train.images.float() / (255 if kind == "uint8" else 1)
    assert values.max() <= 1 and values.min() >= 0 and values.std() > 0.2
    plain = load(x=given, y=LABELS)
    is_told = any("data.loader.range=[0,255]" in line for line in plain.notes)
    assert is_told == (kind != "uint8") and (plain.train.images.max() > 200)
    assert not load(x=given / 255, y=LABELS).notes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS[:, None], ["0", "1", "2"]),
        (LABELS.astype(float), ["0", "1", "2"]),
        (LABELS * 5 - 3, ["-3", "2", "7"]),
        (np.array(["fox", "cat", "dog"])[LABELS], ["cat", "dog", "fox"]),
        (np.array([b"fox", b"cat", b"dog"])[LABELS], ["cat", "dog", "fox"]),
        (np.eye(3)[LABELS], ["0", "1", "2"]),
        (LABELS > 0, ["0", "1"]),
    ],
)
def test_labels_of_every_kind(load, labels, classes):
    source = load(x_train=IMAGES, y_train=labels, x_test=IMAGES, y_test=labels)
    assert source.classes == classes and source.train.labels.dtype is torch.int64
    named = [classes[index] for index in source.train.labels.tolist()]
    values = labels.argmax(1) if labels.ndim == 2 and labels.shape[1] == 3 else np.ravel(labels)
    values = (
        values.astype(int)
        if values.dtype.kind in "bf"
        else np.char.decode(values)
        if values.dtype.kind == "S"
        else values
    )
    assert named == [str(each) for each in values.tolist()]


def test_classes_may_be_named(load):
    source = load(x=IMAGES, y=LABELS, class_names=np.array(["ant", "bee", "cow", "doe"]), ids=LABELS)
    assert source.classes == ["ant", "bee", "cow", "doe"] and source.num_classes == 4
    assert list(source.notes) == ["data.root: ids is left out"]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "lacks the inputs and labels of train: it holds nothing; name the arrays x_train, y_train"),
        ({"x_train": IMAGES, "foo": LABELS}, "lacks the labels of train: it holds x_train, foo"),
        ({"x": IMAGES, "y": LABELS, "x_test": IMAGES}, "lacks the labels of test"),
        ({"x": IMAGES, "images": IMAGES, "y": LABELS}, "x and images are both the inputs of train: keep one"),
        ({"x": IMAGES, "y": LABELS[:-1]}, "x holds 30 examples and y 29: they must match"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "x is empty"),
        ({"x": IMAGES * 1j, "y": LABELS}, r"x is complex128 \[30, 6, 5\]: give numbers"),
        ({"x": np.where(IMAGES, np.nan, 1.0), "y": LABELS}, "x holds NaN or infinity"),
        ({"x": IMAGES, "y": LABELS + 0.5}, r"y is float64 \[30\]: give one whole number or text"),
        ({"x": IMAGES, "y": np.ones((NUM, 3))}, "y gives an example several classes, or none"),
        ({"x": IMAGES, "y": LABELS * 0}, "y holds one class"),
        ({"x": IMAGES, "y": LABELS, "x_test": IMAGES, "y_test": LABELS + 2}, "y_test has classes that y lacks: 3, 4"),
        ({"x": IMAGES, "y": LABELS, "classes": np.array(["a", "b"])}, "y holds 0 to 2, and 2 classes are named"),
        ({"x": np.array([{}, None, 1]), "y": LABELS}, "holds Python objects"),
        ({"x": IMAGES[:2], "y": LABELS[:2]}, "leaves 2 images to train and 0 to test on: give a share"),
    ],
)
def test_what_is_no_data_is_told_by_what_it_is(load, held, message):
    with pytest.raises(SparsityError, match=message):
        load(**held)


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "one.npy", IMAGES)
    np.savez(tmp_path / "whole.npz", x=IMAGES, y=LABELS)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "turned.npz").write_bytes(whole.replace(IMAGES.tobytes()[:64], bytes(64)))
    for name, message in (("one.npy", "holds one array"), ("cut.npz", "is no .npz file, or is damaged"),
                          ("turned.npz", "is damaged"), ("none.npz", "is no file"), (".", "is a folder")):  # fmt: skip
        with pytest.raises(SparsityError, match=message):
            arrays(root=str(tmp_path / name), channels=None, range=None, test=0.2)


def test_a_run_on_vectors(run, tmp_path):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(300, 12)) + np.eye(12)[:3][np.arange(300) % 3] * 4
    np.savez(tmp_path / "vectors.npz", features=inputs, targets=np.array(["low", "mid", "top"])[np.arange(300) % 3])
    result = run(
        "data=arrays", f"data.root={tmp_path}/vectors.npz", "model=mlp", "model.factory.hidden=[8]", "plots=false",
        "schedule.pretrain.epochs=20", "schedule.pretrain.lr=0.02",
    )  # fmt: skip
    assert result["classes"] == ["low", "mid", "top"] and result["dense_structure"] == "12-8"
    assert result["accuracy"]["final"]["test"] > 0.6
