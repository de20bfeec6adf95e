"""The loader of a folder of images."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch

from sparsity.data import disk, survey
from sparsity.data.picture import Range, Reader, checked_range, shown
from sparsity.data.sets import Files
from sparsity.data.splits import Source, split_off
from sparsity.errors import ConfigError, DataError
from sparsity.kinds import PositiveCount
from sparsity.memory import free_bytes

Size = Annotated[list[PositiveCount], "height, width"]


def image_folder(
    *,
    root: str,
    size: Size,
    channels: PositiveCount,
    test: Annotated[float, "share"],
    stream: bool | None,
    background: str = "white",
    range: list[float] | None = None,
    sets: bool | None = None,
) -> Source:
    """A folder of class folders; with train/, test/ and val/ inside, those are the sets, else test is split off.

    size: [height, width] that images are brought to; channels: 1 or 3; test: the share that is split off for testing
    where there is no test folder; stream: read images when needed (null: when they would fill half the memory);
    background: the colour seen through transparent pixels; range: the values that are black and white in images of
    more than 8 bits (null: by the values of all); sets: whether the folders inside are sets (null: by their names).
    """
    reader, given = _checked_reader(size, channels, background), checked_range(range)
    base = Path(os.path.expanduser(root)).absolute()
    if not base.is_dir():
        raise DataError(f"data.root={root} is no folder: give a folder that holds one folder of images for each class")
    folders = disk.sets_of(base, root, sets)
    classes = _classes(folders["train"], base, root)
    found = {name: disk.images_in(folder, sets=sets) for name, folder in folders.items()}
    _check_classes(found, folders, classes, root)
    parts = {name: _files(each, classes, reader) for name, each in found.items()}
    if "test" not in parts:
        parts["train"], parts["test"] = split_off(parts["train"], test, f"make {root} hold train/ and test/")
    stream = stream if stream is not None else _too_large(list(parts.values()))
    taken, seen, ranges = (survey.streamed if stream else survey.held)(list(parts.values()), root, given)
    parts = dict(zip(parts, taken))
    return Source(
        train=parts["train"],
        test=parts["test"],
        num_classes=len(classes),
        validation=parts.get("validation"),
        classes=list(classes),
        notes=[*_notes(base, folders, found), *_range_notes(seen, ranges, given)],
        idle=_idle(folders, seen, ranges),
        places=[str(base)],
    )


def _checked_reader(size: list[int], channels: int, background: str) -> Reader:
    if channels not in (1, 3):
        raise ConfigError(f"data.loader.channels must be 1 (grey) or 3 (colour), got {channels}")
    if len(size) != 2:
        raise ConfigError(f"data.loader.size must be [height, width], got {size}")
    return Reader(tuple(size), channels, background)


def _classes(folder: Path, base: Path, root: str) -> dict[str, int]:
    """The classes by the index of their output, in the order of their names."""
    broken = [name for name in sorted(os.listdir(folder)) if not disk.is_hidden(name) and not (folder / name).exists()]
    if broken:
        raise DataError(f"data.root: {shown(folder / broken[0])} is a link to nothing: mend or remove it")
    classes = list(disk.classes_of(folder))
    if not classes:
        ambiguous = folder != base and len(disk.folders_in(base)) > 1
        remedy = f", or say data.loader.sets=false where {shown(folder.name)} is a class" if ambiguous else ""
        raise DataError(
            f"data.root: {shown(folder)} holds no class folders: make one folder of images per class{remedy}"
        )
    if len(classes) < 2:
        inside = disk.folders_in(folder / classes[0]) if (folder / classes[0]).is_dir() else []
        hint = f"; is it data.root={shown(Path(root) / classes[0])}?" if len(inside) > 1 else ""
        raise DataError(
            f"data.root: {shown(folder)} holds one class ('{shown(classes[0])}'): a classifier needs at least 2{hint}"
        )
    return {name: index for index, name in enumerate(classes)}


def _check_classes(
    found: Mapping[str, disk.Found], folders: Mapping[str, Path], classes: Mapping[str, int], root: str
) -> None:
    """Refuses classes of train without an image, and images of classes that train lacks."""
    for name, held in found["train"].empty.items():
        others = len(found["train"].empty) - 1
        more = f" and {others} more" if others else ""
        raise DataError(
            f"data.root={root}: the class folder {shown(name)}{more} of {shown(folders['train'].name)} holds no image"
            f"{f' ({held})' if held else ''}: put at least one into each class folder, or remove it"
        )
    for name, folder in folders.items():
        strange = [shown(each) for each in dict.fromkeys(found[name].classes) if each not in classes]
        if strange:
            like = [each for each in classes if each.casefold() == strange[0].casefold()]
            hint = f" (train has {shown(like[0])})" if like else ""
            raise DataError(
                f"data.root={root}: {shown(folder.name)} has classes that train lacks: {', '.join(strange[:5])}{hint}"
            )
        if not found[name].paths:
            raise DataError(f"data.root={root}: {shown(folder.name)} holds no image: fill it, or remove it")


def _files(found: disk.Found, classes: Mapping[str, int], reader: Reader) -> Files:
    labels = torch.tensor([classes[name] for name in found.classes])
    return Files(found.paths, labels, (reader.channels, *reader.size), reader)


def _too_large(sets: Sequence[Files]) -> bool:
    """Whether the images would take more than half of the memory that is free."""
    num_bytes = sum(len(part) * int(torch.Size(part.shape).numel()) for part in sets)
    return num_bytes > free_bytes() / 2


# --- what there is to say --------------------------------------------------------------------------------------------


def _notes(base: Path, folders: Mapping[str, Path], found: Mapping[str, disk.Found]) -> list[str]:
    """What of the folder is left out, and sets that are one folder."""
    lines = []
    beside = [each.name for each in disk.folders_in(base) if each not in folders.values()]
    if beside and folders["train"] != base:
        lines.append(f"data.root: {', '.join(map(shown, beside[:5]))} beside the sets is left out")
    same = disk.same_inside(folders["train"])
    if same:
        lines.append(
            f"data.root: the class folders of {shown(folders['train'])} all hold {', '.join(map(shown, same[:5]))}: "
            "name sets train, test, val if these are the classes"
        )
    for name, folder in folders.items():
        if disk.has_images(folder):
            lines.append(f"data.root: images that lie in {shown(folder)} beside the class folders are left out")
        if found[name].left_out:
            listed = ", ".join(f"{number} {ending}" for ending, number in found[name].left_out.most_common(5))
            lines.append(f"data.root: {shown(folder)} holds files that are not read as images: {listed}")
        for other, place in folders.items():
            if other < name and place.samefile(folder):
                lines.append(f"data.root: {shown(folder.name)} and {shown(place.name)} are the same folder")
    return lines


def _range_notes(seen: survey.Survey, ranges: Mapping[str, Range], given: Range | None) -> list[str]:
    """What was taken for black and white, unless it is said or all of 16 bits."""
    return [
        f"images of mode {mode} hold values from {seen.extents[mode][0]:g} to {seen.extents[mode][1]:g}, and "
        f"data.loader.range=[{low:g},{high:g}] is taken for black and white"
        for mode, (low, high) in ranges.items()
        if given is None and (mode, low, high) != ("I;16", 0, 65535)
    ]


def _idle(folders: Mapping[str, Path], seen: survey.Survey, ranges: Mapping[str, Range]) -> dict[str, str]:
    """Settings that this folder makes no use of, and why."""
    idle = {}
    if "test" in folders:
        idle["data.loader.test"] = f"data.root has {shown(folders['test'].name)}/"
    if not ranges and all(mode.endswith(";16") for mode in seen.extents):
        idle["data.loader.range"] = "no image has more than 8 bits"
    if not seen.transparent:
        idle["data.loader.background"] = "no image is transparent"
    return idle
