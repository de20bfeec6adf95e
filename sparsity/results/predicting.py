"""What a compact network says of images: the classes by name, and their shares."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsity import artifact
from sparsity.artifact import About
from sparsity.data.picture import Reader, Unreadable, shown
from sparsity.data.scaling import column, scaled
from sparsity.errors import DataError, WeightsError
from sparsity.tables import Column, show_table

AT_ONCE = 64  # images in a pass


class Said(NamedTuple):
    """What is said of one image: the most likely classes, and the share of each."""

    image: Path
    classes: list[str]
    shares: list[float]


def predict(path: Path, images: Sequence[Path], num_classes: int) -> list[Said]:
    """The most likely classes of image files, by the network of a `compact.safetensors`.

    Images are turned upright and brought to the size and the channels that the network was trained on, as
    `data=image_folder` does. Raises a WeightsError or a DataError of one line.
    """
    network = artifact.load(path)
    about = getattr(network, "about", None)
    if about is None:
        raise WeightsError(f"{path} is no compact network, which alone says what its images and classes are")
    reader, num_axes = _reader(about, path), len(about.input_shape)
    columns = [None if numbers is None else column(numbers, num_axes) for numbers in (about.mean, about.std)]
    found = []
    with torch.no_grad():
        for some in _some(images):
            pixels = torch.stack([_read(reader, image) for image in some])
            shares = _outputs(network, scaled(pixels, *columns), path).softmax(1)
            best = shares.topk(min(num_classes, shares.shape[1]), dim=1)
            for image, values, places in zip(some, best.values.tolist(), best.indices.tolist()):
                found.append(Said(image, [_name(about, place) for place in places], values))
    return found


def show(found: Sequence[Said]) -> None:
    """A table: one row an image."""
    columns = [Column("image", [shown(each.image) for each in found], is_text=True, cut="start")]
    for place in range(max(len(each.classes) for each in found)):
        cells = [f"{each.classes[place]} {each.shares[place]:.1%}" for each in found]
        columns.append(Column("class" if place == 0 else f"{place + 1}.", cells, is_text=True, rank=place))
    show_table(columns)


def _outputs(network: nn.Module, images: Tensor, path: Path) -> Tensor:
    outputs = network(images)
    if outputs.ndim != 2 or len(outputs) != len(images):
        raise WeightsError(f"{path} gives outputs {list(outputs.shape)}, which name no classes")
    return outputs


def _reader(about: About, path: Path) -> Reader:
    if len(about.input_shape) != 3 or about.input_shape[0] not in (1, 3):
        raise WeightsError(f"{path} takes arrays {list(about.input_shape)}, not images: use sparsity.load")
    channels, *size = about.input_shape
    return Reader(tuple(size), channels, "white")


def _read(reader: Reader, image: Path) -> Tensor:
    try:
        return reader(str(image))
    except Unreadable as error:
        raise DataError(f"{shown(image)} cannot be read ({error.why}): give images") from error


def _some(images: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for first in range(0, len(images), AT_ONCE):
        yield images[first : first + AT_ONCE]


def _name(about: About, place: int) -> str:
    return str(place) if about.classes is None or place >= len(about.classes) else about.classes[place]
