"""Data sets as whole tensors: loaders, the validation split, and batches.

A loader returns a `Source`: (train, test, num_classes[, validation]), each set an `Images`, a `Files` or a pair of
tensors (images [n, *shape], labels [n]).
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
import psutil
import torch
from torch import Tensor

from sparsity.errors import ConfigError, DataError
from sparsity.kinds import PositiveCount

Size = Annotated[list[PositiveCount], "height, width"]


@dataclass(frozen=True)
class Images:
    """A set held whole: images [n, *shape], uint8 or already floating point, and labels [n]."""

    images: Tensor
    labels: Tensor
    device: torch.device | None = None  # of the batches; None: where the set is

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> "Images":
        """The set on a device; one that would fill half a GPU's free memory stays, and its batches go there."""
        device = torch.device(device)
        if device.type == "cuda" and self.num_bytes > torch.cuda.mem_get_info(device)[0] / 2:
            return replace(self, device=device)
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        """The images and labels of an index [k]."""
        index = index.to(self.images.device)
        return replace(self, images=select(self.images, index), labels=self.labels[index])

    def keep(self, pixels: Tensor) -> "Images":
        """The set with some pixels of each flattened image alone: [n, kept]."""
        return replace(self, images=self.images.flatten(1)[:, pixels.to(self.images.device)])

    def batches(self, order: Tensor, batch_size: int) -> Iterator["Images"]:
        """Batches of [members, batch] images in the members' orders [members, n]."""
        target = self.device or self.images.device
        for index in cut(order.to(self.images.device), batch_size):
            yield Images(select(self.images, index).to(target), self.labels[index].to(target))

    @property
    def num_bytes(self) -> int:
        """The memory that the set takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.images, self.labels))


@dataclass(frozen=True)
class Files:
    """A set too large for memory: each image is read from its file when a batch asks for it."""

    paths: list[str]
    labels: Tensor
    shape: tuple[int, ...]
    read: Callable[[str], Tensor]  # a path to an image of `shape`, uint8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_bytes(self) -> int:
        """The memory that the set takes."""
        return self.labels.numel() * self.labels.element_size()

    def to(self, device: torch.device | str) -> "Files":
        """The set with its batches on a device."""
        return replace(self, device=torch.device(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> "Files":
        """The files and labels of an index [k]."""
        return replace(self, paths=[self.paths[i] for i in index.tolist()], labels=self.labels[index])

    def keep(self, pixels: Tensor) -> "Files":
        """The set with some pixels of each flattened image alone."""
        pixels = pixels.cpu()
        return replace(self, shape=(len(pixels),), read=lambda path: self.read(path).flatten()[pixels])

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Images]:
        """Batches of [members, batch] images in the members' orders [members, n]; the next is read meanwhile."""
        order = order.cpu()
        with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as readers:
            ahead = None
            for index in cut(order, batch_size):
                reading = [readers.submit(self.read, self.paths[i]) for i in index.flatten().tolist()]
                if ahead is not None:
                    yield self._collect(*ahead)
                ahead = reading, index
            if ahead is not None:
                yield self._collect(*ahead)

    def _collect(self, reading: list[Any], index: Tensor) -> Images:
        images = torch.stack([future.result() for future in reading])
        images = images.reshape(*index.shape, *self.shape).to(self.device, non_blocking=True)
        return Images(images, self.labels[index.to(self.labels.device)])


def cut(order: Tensor, batch_size: int) -> list[Tensor]:
    """An order [..., n] in batches; a last batch of one joins the one before, as batch normalisation needs two."""
    batches = list(order.split(batch_size, dim=-1))
    if len(batches) > 1 and batches[-1].shape[-1] == 1:
        batches[-2:] = [torch.cat(batches[-2:], dim=-1)]
    return batches


def select(images: Tensor, index: Tensor) -> Tensor:
    """Images [*index, *shape] of a set [n, *shape]: whole rows are copied, which indexing does entry by entry."""
    return images.index_select(0, index.reshape(-1)).view(*index.shape, *images.shape[1:])


def lies_on(data: Images | Files, device: torch.device) -> bool:
    """Whether a set is held whole on a device."""
    return isinstance(data, Images) and data.device is None and data.images.device == device


def count_batches(num_images: int, batch_size: int) -> int:
    """The number of batches that `cut` makes."""
    return len(cut(torch.empty(num_images), batch_size))


class Source(NamedTuple):
    """What a loader returns; without a validation set of its own, one is split from train."""

    train: Any
    test: Any
    num_classes: int
    validation: Any = None


@dataclass(frozen=True)
class Splits:
    """The three sets that a run uses, and how their pixels are scaled."""

    train: Images | Files
    validation: Images | Files | None
    test: Images | Files
    num_classes: int
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.train.shape

    def example(self) -> Tensor:
        """Two scaled images [2, *shape], on the CPU: enough for a module to show what it does."""
        return self.scale(next(self.test.batches(torch.zeros(1, 2, dtype=torch.long), 2)).images[0].cpu())

    def to(self, device: torch.device | str) -> "Splits":
        """The splits on a device."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), validation=validation, test=self.test.to(device))

    def keep(self, pixels: Tensor) -> "Splits":
        """The splits with some pixels [kept] of each flattened image alone, each scaled as before."""

        def numbers(given: list[float] | None) -> list[float] | None:
            if given is None or len(given) == 1:
                return given
            size = torch.Size(self.input_shape[1:]).numel()
            return [given[pixel // size] for pixel in pixels.tolist()]

        train, validation, test = (part and part.keep(pixels) for part in (self.train, self.validation, self.test))
        return Splits(train, validation, test, self.num_classes, numbers(self.mean), numbers(self.std))

    def scale(self, images: Tensor) -> Tensor:
        """Images [..., channels, *positions] as the network takes them: uint8 to [0, 1], then (x − mean) / std."""
        if not images.is_floating_point():
            images = images.float().mul_(1 / 255)
        if self.mean is None:
            return images
        num_axes = len(self.input_shape)
        mean, std = (_column(tuple(numbers), num_axes, images.device) for numbers in (self.mean, self.std))
        return (images - mean) / std


@functools.lru_cache
def _column(numbers: tuple[float, ...], num_axes: int, device: torch.device) -> Tensor:
    """Numbers [channels] with an axis of 1 for each further axis of an image; made once, not once a batch."""
    return torch.tensor(numbers, device=device).view(-1, *[1] * (num_axes - 1))


def split(source: Any, *, validation: float, seed: int, normalize: dict[str, list[float]] | None) -> Splits:
    """The splits of a loader's source: validation is taken from train, at random by a seed of its own.

    validation: a share of train below 1, or a number of images; 0 trains on everything. A source that brings its own
    validation set keeps it unless validation is 0.
    """
    try:
        source = Source(*source)
    except TypeError as error:
        raise DataError("a loader must return (train, test, num_classes), or (…, validation) too") from error
    train, test, held_out = (_as_set(part, name) for part, name in zip(source[:2] + source[3:], SETS))
    _check_labels(train, test, held_out, source.num_classes)
    if held_out is None and validation:
        size = round(validation * len(train)) if validation < 1 else int(validation)
        if not 0 < size < len(train):
            raise ConfigError(
                f"data.validation must leave images on both sides, got {validation:g} of {len(train)} training images: "
                "give a share below 1, a smaller number, or 0 for none"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train, held_out = train.take(order[size:]), train.take(order[:size])
    elif not validation and held_out is not None:
        train, held_out = _joined(train, held_out), None
    mean, std = _checked_normalization(normalize, train.shape)
    return Splits(train, held_out, test, source.num_classes, mean, std)


SETS = ("train", "test", "validation")
FOLDERS = ("train", "test", "val", "valid", "validation")  # of an image folder with sets of its own


def _as_set(part: Any, name: str) -> Images | Files | None:
    """A set from what a loader gave: one of ours, a pair of tensors, or None."""
    if part is None and name == "validation":
        return None
    if not isinstance(part, (Images, Files)):
        try:
            images, labels = part
            part = Images(torch.as_tensor(images), torch.as_tensor(labels))
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the {name} set of a loader must be a pair (images, labels) of tensors") from error
    if isinstance(part, Images):
        part = _checked_images(part, name)
    if len(part) == 0:
        raise DataError(f"the {name} set is empty: give it at least one image")
    if isinstance(part, Images) and len(part.images) != len(part.labels):
        raise DataError(f"the {name} set has {len(part.images)} images and {len(part.labels)} labels: they must match")
    return part


def _checked_images(part: Images, name: str) -> Images:
    """A held set whose images are uint8 or finite float32, with one label an image."""
    images, labels = part.images.detach(), part.labels
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"the {name} labels must be whole numbers [n], got {labels.dtype} {list(labels.shape)}")
    if images.is_floating_point():
        images = images.float()
        if not images.isfinite().all():
            raise DataError(f"the {name} images hold NaN or infinity: mend them")
    elif images.dtype is not torch.uint8:
        raise DataError(f"the {name} images must be uint8 or floating point, got {images.dtype}")
    return Images(images, labels.long())


def _joined(one: Images | Files, other: Images | Files) -> Images | Files:
    """Two sets as one."""
    labels = torch.cat([one.labels, other.labels])
    if isinstance(one, Files):
        return replace(one, paths=one.paths + other.paths, labels=labels)
    return Images(torch.cat([one.images, other.images]), labels)


def _check_labels(train: Any, test: Any, validation: Any, num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise DataError(f"the data has {num_classes} class(es): a classifier needs a whole number of at least 2")
    for name, part in zip(SETS, (train, test, validation)):
        if part is None:
            continue
        if part.shape != train.shape:
            raise DataError(f"the {name} images are {list(part.shape)}, the training images {list(train.shape)}")
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= num_classes:
            raise DataError(f"the {name} labels reach from {low} to {high}: they must lie in 0…{num_classes - 1}")


def _checked_normalization(normalize: Any, shape: tuple[int, ...]) -> tuple[list[float] | None, list[float] | None]:
    if normalize is None:
        return None, None
    for name, numbers in (("mean", normalize.mean), ("std", normalize.std)):
        if len(numbers) not in (1, shape[0]):
            raise ConfigError(
                f"data.normalize.{name} must hold 1 number or one for each of {shape[0]} channels, got {numbers}"
            )
    return list(normalize.mean), list(normalize.std)


# --- loaders ---------------------------------------------------------------------------------------------------------


def mnist(*, root: str) -> Source:
    """MNIST: 60,000 + 10,000 handwritten digits, 1×28×28; LeCun et al., 1998."""
    return _torchvision("MNIST", root, "MNIST/raw", "train-images-idx3-ubyte, …")


def fashion_mnist(*, root: str) -> Source:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 1×28×28; Xiao et al., 2017."""
    return _torchvision("FashionMNIST", root, "FashionMNIST/raw", "train-images-idx3-ubyte, …")


def cifar10(*, root: str) -> Source:
    """CIFAR-10: 50,000 + 10,000 photographs of 10 classes, 3×32×32; Krizhevsky, 2009."""
    return _torchvision("CIFAR10", root, "cifar-10-batches-py", "data_batch_1, …")


def _torchvision(name: str, root: str, folder: str, files: str) -> Source:
    """Both parts of a data set of torchvision's, downloaded where they are missing."""
    from torchvision import datasets

    place = Path(root) / folder
    there = place.is_dir() and any(place.iterdir())
    sets = []
    for train in (True, False):
        try:
            part = getattr(datasets, name)(root, train=train, download=True)
        except Exception as error:  # the readers raise whatever their file makes them trip over
            raise DataError(_loader_trouble(name, root, place, files, there, error)) from error
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        sets.append(Images(images, labels.long()))
    return Source(*sets, num_classes=len(part.classes))


def _loader_trouble(name: str, root: str, place: Path, files: str, there: bool, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if there:
        return f"data.root={root}: the {name} files in {place} are damaged or incomplete ({reason}): replace them"
    return (
        f"data.root={root} holds no {name}, and downloading it failed ({reason}): put the files ({files}) "
        f"into {place}, set data.root or SPARSITY_DATA to a folder that has them, or take data=digits, which needs none"
    )


def digits() -> Source:
    """The 1,797 handwritten digits inside scikit-learn, brought from 8×8 to 1×28×28; every fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    # 24×24 in a frame of 2, as MNIST frames its own
    large = torch.nn.functional.interpolate(small, size=(24, 24), mode="bilinear", align_corners=False)
    images = torch.nn.functional.pad(large.mul(255).round().byte(), (2, 2, 2, 2))
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(labels)) % 5 == 4
    return Source(Images(images[~is_test], labels[~is_test]), Images(images[is_test], labels[is_test]), 10)


def image_folder(
    *, root: str, size: Size, channels: PositiveCount, test: Annotated[float, "share"], stream: bool | None
) -> Source:
    """A folder of class folders; with train/, test/ and val/ inside, those are the sets, else test is split off.

    size: [height, width] that images are brought to; channels: 1 or 3; test: the share that is split off for testing
    where there is no test folder; stream: read images when needed (null: when they would fill half the memory).
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    if channels not in (1, 3):
        raise ConfigError(f"data.loader.channels must be 1 (grey) or 3 (colour), got {channels}")
    if len(size) != 2:
        raise ConfigError(f"data.loader.size must be [height, width], got {size}")
    base = Path(root)
    if not base.is_dir():
        raise DataError(f"data.root={root} is no folder: give a folder that holds one folder of images for each class")
    train_folder = base / "train" if (base / "train").is_dir() else base
    sets = [folder.name for folder in base.iterdir() if folder.is_dir() and folder.name.lower() in FOLDERS]
    if train_folder == base and sets:
        raise DataError(
            f"data.root={root} holds {', '.join(sorted(sets))} but no train: name its folders train, test, val"
        )
    classes = _class_names(train_folder, find_classes)
    index = {name: number for number, name in enumerate(classes)}
    read = _reader(size, channels)
    shape = (channels, *size)

    def load(folder: Path) -> Files:
        strange = [name for name in _class_names(folder, find_classes) if name not in index]
        if strange:
            raise DataError(f"data.root={root}: {folder.name} has classes that train lacks: {', '.join(strange[:5])}")
        try:
            samples = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data.root={root}: {reason} Put at least one image into each class folder") from error
        return Files([path for path, _ in samples], torch.tensor([label for _, label in samples]), shape, read)

    train = load(train_folder)
    held_out = next((base / name for name in FOLDERS[2:] if (base / name).is_dir()), None)
    validation = load(held_out) if held_out and train_folder != base else None
    train, rest = (train, load(base / "test")) if _has_test(base, train_folder) else _split_off(train, test, root)
    sets = [train, rest, validation]
    stream = stream if stream is not None else _too_large(sets)
    if not stream:
        sets = [part and _read_all(part) for part in sets]
    return Source(sets[0], sets[1], len(classes), sets[2])


def _class_names(folder: Path, find_classes: Callable[[str], Any]) -> list[str]:
    try:
        classes, _ = find_classes(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"data.root: {folder} holds no class folders: make one folder of images per class") from error
    if len(classes) < 2:
        raise DataError(f"data.root: {folder} holds one class ('{classes[0]}'): a classifier needs at least 2")
    return classes


def _has_test(base: Path, train_folder: Path) -> bool:
    return train_folder != base and (base / "test").is_dir()


def _split_off(files: Files, share: float, root: str) -> tuple[Files, Files]:
    """Train and test parts of a folder without a test folder; the split is always the same."""
    size = round(share * len(files))
    if not 0 < size < len(files):
        raise ConfigError(
            f"data.loader.test={share:g} leaves {len(files) - size} images to train and {size} to test on: give a "
            f"share that leaves both, or make {root} hold train/ and test/"
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    return files.take(order[size:]), files.take(order[:size])


def _reader(size: list[int], channels: int) -> Callable[[str], Tensor]:
    """A function from a path to an image [channels, height, width], uint8."""

    def read(path: str) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2.functional import pil_to_tensor, resize

        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
                    image = Image.fromarray((numpy.asarray(image).astype("int64") >> 8).clip(0, 255).astype("uint8"))
                pixels = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
        except Exception as error:  # readers of many formats, which raise whatever they trip over
            raise DataError(f"data.root: {path} is no image that can be read: mend or remove it") from error
        return pixels if list(pixels.shape[1:]) == size else resize(pixels, size, antialias=True)

    return read


def _too_large(sets: list[Files | None]) -> bool:
    """Whether the images would take more than half of the memory that is free."""
    num_bytes = sum(len(part) * int(torch.Size(part.shape).numel()) for part in sets if part)
    return num_bytes > psutil.virtual_memory().available / 2


def _read_all(files: Files) -> Images:
    """Every image of a set of files, in order."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as readers:
        return Images(torch.stack(list(readers.map(files.read, files.paths))), files.labels)
