"""The loader of a folder of images."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch

from sparsity.data.picture import reader
from sparsity.data.sets import Files, Images
from sparsity.data.splits import Source
from sparsity.errors import ConfigError, DataError
from sparsity.kinds import PositiveCount
from sparsity.memory import free_bytes

Size = Annotated[list[PositiveCount], "height, width"]
FOLDERS = ("train", "test", "val", "valid", "validation")  # of an image folder with sets of its own


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
    read = reader(size, channels)
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


def _too_large(sets: list[Files | None]) -> bool:
    """Whether the images would take more than half of the memory that is free."""
    num_bytes = sum(len(part) * int(torch.Size(part.shape).numel()) for part in sets if part)
    return num_bytes > free_bytes() / 2


def _read_all(files: Files) -> Images:
    """Every image of a set of files, in order."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as readers:
        return Images(torch.stack(list(readers.map(files.read, files.paths))), files.labels)
