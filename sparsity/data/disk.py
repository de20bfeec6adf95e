"""What lies on disk: which folders are classes or sets, which files are images, and whether they are still the same."""

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsity.data.picture import EXTENSIONS, shown
from sparsity.errors import DataError, reason

HIDDEN = {"__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "recycler"}
HIDDEN |= {"system volume information", "network trash folder", "temporary items", "__pycache__", "thumbs.db"}
HIDDEN |= {"ehthumbs.db", "desktop.ini", "icon\r", "cvs", "found.000"}

WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "val", "valid", "validate", "validating", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "evaluate", "holdout", "heldout"),
}
SETS = {word: name for name, words in WORDS.items() for word in words}
FILLERS = {"set", "sets", "data", "dataset", "folder", "split", "image", "images", "img", "imgs", "samples"}

OTHER_PICTURES = {".heic", ".heif", ".svg", ".psd", ".eps", ".jxl", ".exr", ".hdr", ".tga", ".dcm", ".npy", ".npz"}
OTHER_PICTURES |= {".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".ico", ".nii", ".fits", ".mat", ".pdf"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left there by a system or a program, as `.DS_Store` or `__MACOSX` are."""
    return name.startswith(".") or name.casefold() in HIDDEN


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(EXTENSIONS)


def set_of(name: str) -> str | None:
    """The set that a folder is by its name, in any case: `Training`, `test_set`, `val2017`; None where it is none."""
    words = [word for word in _words(name) if word not in FILLERS]
    return SETS.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    words = re.findall(r"[a-z]+", name.lower())
    return [word.removesuffix("set") if word.removesuffix("set") in SETS else word for word in words]


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name."""
    return [folder / name for name, is_folder in _entries(folder) if is_folder]


def has_images(folder: Path) -> bool:
    """Whether images lie directly in a folder."""
    return any(is_image(name) and not is_folder for name, is_folder in _entries(folder))


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """The names in a folder that are not hidden, and which of them are folders; links are followed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, _is_folder(entry)) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"data.root: {shown(folder)} cannot be read: {error.strerror or reason(error)}") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


# --- the sets of a folder --------------------------------------------------------------------------------------------


def sets_of(base: Path, root: str, sets: bool | None) -> dict[str, Path]:
    """The folders of train, validation and test; of a folder of classes, `train` alone, the folder itself.

    root: the folder as it was given; sets: whether the folders in it are sets; None goes by their names.
    """
    folders = folders_in(base)
    if sets is False:
        return {"train": base}
    named = [(folder, set_of(folder.name)) for folder in folders]
    found = {folder.name: name for folder, name in named if name}
    remedy = "name its folders train, test, val, or say data.loader.sets=false where they are classes"
    if not found:
        strange = [folder.name for folder in folders if _is_like_a_set(folder)]
        if sets or len({_kind(name) for name in strange}) > 1:
            listed = _listed(strange or [folder.name for folder in folders])
            raise DataError(f"data.root={root} holds {listed}, of which none is a set by its name: {remedy}")
        return {"train": base}
    for name in WORDS:
        same = [folder for folder, kind in found.items() if kind == name]
        if len(same) > 1:
            raise DataError(f"data.root={root} holds {_listed(same)}, which are all {name} sets: keep one")
    if "train" not in found.values():
        raise DataError(f"data.root={root} holds {_listed(found)} but no train: {remedy}")
    return {name: folder for folder, name in named if name}


def _kind(name: str) -> str | None:
    return next((SETS[word] for word in _words(name) if word in SETS), None)


def _is_like_a_set(folder: Path) -> bool:
    """Whether a folder is named somewhat like a set, such as `seg_train`, and holds folders instead of images."""
    return _kind(folder.name) is not None and bool(folders_in(folder)) and not has_images(folder)


# --- the images of a set ---------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The images of a folder of classes."""

    paths: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of each image
    empty: dict[str, str] = field(default_factory=dict)  # classes without images, and what they hold instead
    left_out: Counter[str] = field(default_factory=Counter)  # endings of files that may be pictures and are not read


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The class folders by the names of their classes, sorted; accents are the same however they are written."""
    found: dict[str, list[Path]] = {}
    for each in folders_in(folder):
        found.setdefault(unicodedata.normalize("NFC", each.name), []).append(each)
    return dict(sorted(found.items()))


def images_in(folder: Path, *, sets: bool | None) -> Found:
    """Every image of every class folder in a folder, also in folders inside; sorted by class, folder and name."""
    found, owners = Found(), {}
    for name, folders in classes_of(folder).items():
        before, held = len(found.paths), Counter()
        for each in folders:
            if sets is not False:
                _check_no_sets_inside(each)
            for place, names in sorted(_walk(each)):
                _check_owner(place, name, owners)
                images = [entry for entry in names if is_image(entry)]
                found.paths += [os.path.join(place, entry) for entry in images]
                held.update(os.path.splitext(entry)[1].lower() for entry in names if not is_image(entry))
        found.classes += [name] * (len(found.paths) - before)
        if len(found.paths) == before:
            found.empty[name] = ", ".join(f"{n} {ending or 'without ending'}" for ending, n in held.most_common(3))
        found.left_out.update({ending: n for ending, n in held.items() if ending in OTHER_PICTURES})
    return found


def same_inside(folder: Path) -> list[str]:
    """The folders that every class folder holds, where they hold nothing else, as sets of classes would."""
    inside = [[each.name for each in folders_in(place)] for place in folders_in(folder) if not has_images(place)]
    is_same = len(inside) == len(folders_in(folder)) and all(names == inside[0] for names in inside)
    return inside[0] if is_same and len(inside[0]) > 1 else []


def _check_no_sets_inside(folder: Path) -> None:
    inside = {set_of(each.name): each.name for each in folders_in(folder)}
    if "train" in inside and len(inside.keys() - {None}) > 1:
        listed = _listed([name for kind, name in inside.items() if kind])
        raise DataError(
            f"data.root: the class {shown(folder)} holds sets ({listed}): put folders of classes into the sets, "
            "or say data.loader.sets=false to take all of them together"
        )


def _check_owner(place: str, name: str, owners: dict[tuple[int, int], str]) -> None:
    """Refuses a folder that links make a part of two classes."""
    owner = owners.setdefault(_identity(place), name)
    if owner != name:
        raise DataError(f"data.root: {shown(place)} is of class {shown(owner)} too, by a link: an image has one class")


def _walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder from the top down with the names of its files, each folder once however links lead to it.

    A folder that is named as an image is given as if it were one, so that it is refused by what it is.
    """
    seen = {_identity(str(each)) for each in Path(os.path.realpath(top)).parents}  # links may lead back up
    waiting = [str(top)]
    while waiting:
        place = waiting.pop()
        identity = _identity(place)
        if identity in seen:
            continue
        seen.add(identity)
        entries = _entries(Path(place))
        waiting += [os.path.join(place, name) for name, is_folder in entries if is_folder and not is_image(name)]
        yield place, [name for name, is_folder in entries if is_image(name) or not is_folder]


def _identity(place: str) -> tuple[int, int]:
    found = os.stat(place)
    return found.st_dev, found.st_ino


def _listed(names: Sequence[str], most: int = 5) -> str:
    names = [shown(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


# --- whether it is still the same ------------------------------------------------------------------------------------


def state_of(places: Sequence[str], most: int = 1_000_000) -> list[tuple]:
    """What tells whether files, and those in folders, are still the same; of the first `most` of each folder.

    The time of a file's last change of any kind is among it: nobody can set it back, as that of its content.
    """
    state = []
    for place in places:
        if os.path.isdir(place):
            state += itertools.islice(_states_in(Path(place)), most)
        else:
            state.append(file_state(place))
    return state


def _states_in(top: Path) -> Iterator[tuple]:
    for folder, names in _walk(top):
        yield (os.path.abspath(folder),)
        yield from (file_state(os.path.join(folder, name)) for name in names)


def file_state(path: str) -> tuple:
    """What changes whenever a file does."""
    try:
        found = os.stat(path)
    except OSError:
        return (os.path.abspath(path), None)
    return (os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
