"""The loader of a NumPy archive: images, or vectors of any shape, with their labels."""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch

from sparsity.data.disk import SETS
from sparsity.data.picture import checked_range, shown
from sparsity.data.sets import Images
from sparsity.data.splits import Source, split_off
from sparsity.errors import DataError, reason
from sparsity.files import obstacle

INPUTS = ("x", "image", "images", "img", "imgs", "data", "input", "inputs", "feature", "features")
LABELS = ("y", "label", "labels", "target", "targets")
CLASSES = ("classes", "classnames", "labelnames", "targetnames")  # their names
EXAMPLE = "x_train, y_train and x_test, y_test; or images, labels"
LARGE = 10.0  # values beyond are no scaled pixels, and train badly as they are


class Named(NamedTuple):
    """What an array is by its name."""

    part: str  # train, validation or test
    kind: Literal["inputs", "labels"]


def _names() -> dict[str, Named]:
    """By name, in small letters alone: of a set and a kind in either order, or of a kind alone, which is train's."""
    found = {}
    for kind, words in (("inputs", INPUTS), ("labels", LABELS)):
        for word in words:
            found[word] = Named("train", kind)
            for name, part in SETS.items():
                found |= {f"{name}{word}": Named(part, kind), f"{word}{name}": Named(part, kind)}
    return found


NAMES = _names()


def arrays(
    *, root: str, channels: Literal["first", "last"] | None, range: list[float] | None, test: Annotated[float, "share"]
) -> Source:
    """The arrays of an .npz file: `x_train`, `y_train`, `x_test`, `y_test` and the like, or `images` and `labels`.

    channels: the axis of the channels after that of the examples; null: the last one of four where it holds 1 to 4
    and the first does not; arrays [n, height, width] have one channel. range: the values that become 0 and 1; null:
    0 and 255 of uint8, and all others are taken as they are. test: the share that is split off for testing where the
    file has no test set. Labels are whole numbers, texts, or vectors with a single 1; classes are those of train.
    """
    scale = checked_range(range)
    path = Path(os.path.expanduser(root)).absolute()
    held = _read(path, root)
    names = _by_part(held, root)
    inputs = {part: _inputs(held[own["inputs"]], own["inputs"], channels, scale, root) for part, own in names.items()}
    given = held.get(next((name for name in held if _letters(name) in CLASSES), ""))
    labels, classes = _labels({own["labels"]: held[own["labels"]] for own in names.values()}, given, root)
    sets = {part: Images(inputs[part], labels[own["labels"]]) for part, own in names.items()}
    for part, own in names.items():
        if len(sets[part].images) != len(sets[part].labels):
            raise DataError(
                f"data.root={root}: {own['inputs']} holds {len(sets[part].images)} examples and {own['labels']} "
                f"{len(sets[part].labels)}: they must match"
            )
    notes = _notes(held, names, inputs, scale)
    idle = {"data.loader.test": f"data.root has {names['test']['inputs']}"} if "test" in sets else {}
    if "test" not in sets:
        sets["train"], sets["test"] = split_off(sets["train"], test, f"let {root} hold x_test and y_test")
    return Source(
        train=sets["train"],
        test=sets["test"],
        num_classes=len(classes),
        validation=sets.get("validation"),
        classes=classes,
        notes=notes,
        idle=idle,
        places=[str(path)],
    )


def _read(path: Path, root: str) -> dict[str, np.ndarray]:
    """Every array of a file; nothing in it is executed."""
    if not path.is_file():
        trouble = obstacle(path) if path.exists() else "no file"
        raise DataError(f"data.root={root} is {trouble}: give an .npz file that holds {EXAMPLE}")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_single = file.read(len(SINGLE)) == SINGLE
        what = "holds one array" if is_single else "is no .npz file, or is damaged"
        raise DataError(f"data.root={root} {what}: save images and labels by numpy.savez(FILE, images=…, labels=…)")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zlib refuse in many ways
        if "allow_pickle" in str(error):
            raise DataError(f"data.root={root} holds Python objects, which only code could read: save arrays") from None
        raise DataError(f"data.root={root} is damaged ({reason(error)}): take another copy") from error


SINGLE = b"\x93NUMPY"  # what a file of one array begins with


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _by_part(held: Mapping[str, Any], root: str) -> dict[str, dict[str, str]]:
    """By set and kind, the name of the array."""
    found: dict[str, dict[str, str]] = {}
    for name in held:
        named = NAMES.get(_letters(name))
        if named is None:
            continue
        before = found.setdefault(named.part, {}).setdefault(named.kind, name)
        if before != name:
            raise DataError(f"data.root={root}: {shown(before)} and {shown(name)} are both the {named.kind} of "
                            f"{named.part}: keep one")  # fmt: skip
    for part in ("train", *found):
        missing = [kind for kind in ("inputs", "labels") if kind not in found.get(part, {})]
        if missing:
            has = ", ".join(map(shown, list(held)[:8])) or "nothing"
            raise DataError(f"data.root={root} lacks the {' and '.join(missing)} of {part}: it holds {has}; name the "
                            f"arrays {EXAMPLE}")  # fmt: skip
    return found


def _inputs(array: np.ndarray, name: str, channels: str | None, scale: Any, root: str) -> torch.Tensor:
    """Examples [n, channels, *positions] or [n, features]: uint8 as they are, others as float32."""
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise DataError(f"data.root={root}: {shown(name)} is {array.dtype} {list(array.shape)}: give numbers [n, …]")
    if not len(array):
        raise DataError(f"data.root={root}: {shown(name)} is empty: give at least one example")
    if array.ndim == 1 or (array.ndim == 3 and channels is None):
        array = array[:, None]
    elif array.ndim > 2 and (channels == "last" or (channels is None and _has_last(array.shape))):
        array = np.moveaxis(array, -1, 1)
    if array.dtype == np.uint8 and scale in (None, (0.0, 255.0)):
        return torch.from_numpy(np.ascontiguousarray(array))
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not tensor.isfinite().all():
        raise DataError(f"data.root={root}: {shown(name)} holds NaN or infinity: mend it")
    return tensor if scale is None else (tensor - scale[0]) / (scale[1] - scale[0])


def _has_last(shape: Sequence[int]) -> bool:
    """Whether the last axis of four is that of the channels."""
    return len(shape) == 4 and shape[-1] in COLOURS and shape[1] not in COLOURS


COLOURS = (1, 2, 3, 4)  # numbers of channels that images have


def _labels(
    given: Mapping[str, np.ndarray], classes: np.ndarray | None, root: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """By name, the index of each label's class [n]; and the names of the classes, those of train in their order."""
    flat = {name: _flat(array, name, root) for name, array in given.items()}
    train = next(iter(sorted(flat, key=lambda name: NAMES[_letters(name)].part != "train")))
    known = np.unique(flat[train])
    if classes is not None:
        names = [str(each) for each in np.asarray(classes).reshape(-1).tolist()]
        if known.dtype.kind not in "iu" or (len(known) and not 0 <= known[0] <= known[-1] < len(names)):
            ends = f"{known[0]} to {known[-1]}"
            raise DataError(f"data.root={root}: {shown(train)} holds {ends}, and {len(names)} classes are named")
        known = np.arange(len(names))
    else:
        names = [str(each) for each in known.tolist()]
    found = {}
    for name, array in flat.items():
        strange = np.setdiff1d(array, known)
        if len(strange):
            listed = ", ".join(shown(str(each)) for each in strange[:5].tolist())
            raise DataError(f"data.root={root}: {shown(name)} has classes that {shown(train)} lacks: {listed}")
        found[name] = torch.from_numpy(np.searchsorted(known, array).astype(np.int64))
    if len(names) < 2:
        raise DataError(f"data.root={root}: {shown(train)} holds one class: a classifier needs at least 2")
    return found, names


def _flat(array: np.ndarray, name: str, root: str) -> np.ndarray:
    """Labels [n] as whole numbers or texts, of [n], [n, 1] or vectors with a single 1."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and array.dtype.kind in "biuf" and ((array == 0) | (array == 1)).all():
        if not (array.sum(1) == 1).all():
            raise DataError(f"data.root={root}: {shown(name)} gives an example several classes, or none: give one")
        array = array.argmax(1)
    if array.dtype.kind == "f" and array.ndim == 1 and (np.isfinite(array) & (array == np.round(array))).all():
        array = array.astype(np.int64)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.ndim != 1 or array.dtype.kind not in "biuU":
        raise DataError(
            f"data.root={root}: {shown(name)} is {array.dtype} {list(array.shape)}: give one whole number or text an "
            "example"
        )
    return array.astype(np.int64) if array.dtype.kind == "b" else array


def _notes(held: Mapping[str, Any], names: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], scale: Any) -> list:
    """What of the file is left out, and values that are no pixels in [0, 1]."""
    taken = {name for own in names.values() for name in own.values()}
    beside = [shown(name) for name in held if name not in taken and _letters(name) not in CLASSES]
    lines = [f"data.root: {', '.join(beside[:5])} is left out"] if beside else []
    low, high = inputs["train"].min().item(), inputs["train"].max().item()
    if scale is None and inputs["train"].is_floating_point() and max(-low, high) > LARGE:
        lines.append(
            f"{names['train']['inputs']} reaches from {low:g} to {high:g}, and is taken as it is: "
            f"data.loader.range=[{low:g},{high:g}] brings it into [0, 1]"
        )
    return lines
