"""Every image of a data set looked at once, before anything trains: what cannot be read, what is black and white."""

import contextlib
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sparsity import files
from sparsity.data.disk import file_state
from sparsity.data.picture import DEEP, Look, Range, Reader, Unreadable, check_file, examine, range_of, shown
from sparsity.data.sets import Files, Images, num_readers
from sparsity.errors import DataError

log = logging.getLogger("sparsity")

FORMAT = 1  # of a kept survey: raised when other images can be read, so that old ones are not used
WORTH_KEEPING = 5.0  # seconds of looking
MANY = 5000  # images, of which it is said that they are read
AT_ONCE = 16  # images that a thread takes at a time
DIGEST = 16  # bytes
DARK = 64  # of 255: colours of 16 bits below it have lost what they show


class Survey(NamedTuple):
    """What the images of a data set hold."""

    extents: dict[str, Range]  # the least and the largest value of each mode of more than 8 bits
    transparent: bool


def held(sets: Sequence[Files], root: str, given: Range | None) -> tuple[list[Images], Survey, dict[str, Range]]:
    """The sets as tensors, what their images hold, and what is black and white in those of more than 8 bits.

    given: that range, where the user says it; else it goes by the values of all images. Raises DataError with
    everything that cannot be read.
    """
    paths, reader = _paths(sets), _with_range(sets[0].read, given)
    tensors = [torch.empty(len(part), *part.shape, dtype=torch.uint8) for part in sets]
    places = [image for tensor in tensors for image in tensor]

    def take(index: int) -> Look:
        image, look = examine(paths[index])
        if look.mode not in DEEP or look.mode in reader.ranges:
            places[index].copy_(reader.pixels(image, look, paths[index]))
        return look

    survey, looks = _survey(each(take, paths, root))
    ranges = ranges_of(survey, root, given)
    reader = replace(reader, ranges=ranges)
    deep = [] if given else [index for index, look in enumerate(looks) if look.mode in DEEP]
    each(lambda index: places[deep[index]].copy_(reader(paths[deep[index]])), [paths[index] for index in deep], root)
    return [Images(tensor, part.labels) for tensor, part in zip(tensors, sets)], survey, ranges


def streamed(sets: Sequence[Files], root: str, given: Range | None) -> tuple[list[Files], Survey, dict[str, Range]]:
    """The same with sets whose images stay on disk; a survey that took long is kept for as long as no file changes."""
    paths = _paths(sets)
    kept = _place(paths)
    survey, digests = _read(kept, len(paths)) or _looked_at(paths, root, kept)
    ranges = ranges_of(survey, root, given)
    reader = replace(sets[0].read, ranges=ranges)
    parts = zip(sets, digests.split([len(part) for part in sets]))
    return [replace(part, read=reader, digests=each) for part, each in parts], survey, ranges


def _looked_at(paths: Sequence[str], root: str, kept: Path) -> tuple[Survey, Tensor]:
    def look(index: int) -> tuple[Look, bytes]:
        check_file(paths[index])
        content = Path(paths[index]).read_bytes()
        _, look = examine(paths[index], io.BytesIO(content))
        return look, hashlib.blake2b(content, digest_size=DIGEST).digest()

    start = time.perf_counter()
    found = each(look, paths, root)
    survey, _ = _survey([look for look, _ in found])
    digests = torch.frombuffer(bytearray(b"".join(digest for _, digest in found)), dtype=torch.uint8).view(-1, DIGEST)
    if time.perf_counter() - start > WORTH_KEEPING:
        _keep(kept, survey, digests)
    return survey, digests


def _paths(sets: Sequence[Files]) -> list[str]:
    return [path for part in sets for path in part.paths]


def _with_range(reader: Reader, given: Range | None) -> Reader:
    return replace(reader, ranges={} if given is None else dict.fromkeys(DEEP, given))


def each(function: Callable[[int], Any], paths: Sequence[str], root: str) -> list[Any]:
    """What a function gives for the index of every path, by many threads; all that cannot be read in one DataError."""
    if len(paths) >= MANY:
        log.info(f"reading {len(paths):,} images of data.root={root}")

    def some(start: int) -> list[Any]:
        return [_tried(function, index) for index in range(start, min(start + AT_ONCE, len(paths)))]

    with ThreadPoolExecutor(max_workers=num_readers()) as readers:
        try:
            found = [one for chunk in readers.map(some, range(0, len(paths), AT_ONCE)) for one in chunk]
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
    _check_readable([one for one in found if isinstance(one, Unreadable)], len(paths), root)
    return found


def _tried(function: Callable[[int], Any], index: int) -> Any:
    try:
        return function(index)
    except Unreadable as error:
        return error


def _check_readable(troubles: Sequence[Unreadable], num_images: int, root: str, most: int = 3) -> None:
    if not troubles:
        return
    base = Path(root).expanduser().absolute()
    named = []
    for trouble in sorted(troubles, key=lambda trouble: trouble.path)[:most]:
        path = Path(trouble.path)
        named.append(f"{shown(path.relative_to(base) if path.is_relative_to(base) else path)} ({trouble.why})")
    more = f" and {len(troubles) - most} more" if len(troubles) > most else ""
    raise DataError(
        f"data.root={root}: {len(troubles)} of {num_images} images cannot be read: {', '.join(named)}{more}: "
        f"mend or remove {'it' if len(troubles) == 1 else 'them'}"
    )


def _survey(looks: Sequence[Look]) -> tuple[Survey, Sequence[Look]]:
    extents: dict[str, Range] = {}
    for look in looks:
        if look.mode is not None:
            low, high = extents.get(look.mode, (look.low, look.high))
            extents[look.mode] = min(low, look.low), max(high, look.high)
    return Survey(extents, any(look.transparent for look in looks)), looks


def ranges_of(survey: Survey, root: str, given: Range | None) -> dict[str, Range]:
    """What is black and white in each mode of more than 8 bits; refuses colours that would come out black."""
    for mode, (_, high) in survey.extents.items():
        if mode not in DEEP and high < DARK and given is None:
            raise DataError(
                f"data.root={root}: images of mode {mode} reach up to {high / 255:.0%} of white, and of colours of 16 "
                "bits only the upper 8 are read: convert them to 8 bits, or say data.loader.range=[0,65535] where "
                "they are that dark"
            )
    return {mode: given or range_of(*extent) for mode, extent in survey.extents.items() if mode in DEEP}


# --- a survey that took long -----------------------------------------------------------------------------------------


def _place(paths: Sequence[str]) -> Path:
    """Where the survey of some files is kept: under the hash of all that tells that they are still the same."""
    hashed = hashlib.sha256(f"{FORMAT} {PIL.__version__}".encode())
    for path in paths:
        hashed.update(repr(file_state(path)).encode("utf-8", "backslashreplace"))
    return files.cache_folder() / f"images-{hashed.hexdigest()[:32]}.safetensors"


def _keep(path: Path, survey: Survey, digests: Tensor) -> None:
    with contextlib.suppress(OSError, safetensors.SafetensorError):  # it is made again where it cannot be kept
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {"extents": survey.extents, "transparent": survey.transparent}
        content = safetensors.torch.save({"digests": digests}, {"sparsity": json.dumps(described)})
        files.write_bytes(path, content)


def _read(path: Path, num_images: int) -> tuple[Survey, Tensor] | None:
    """A kept survey; None where there is none that can be used."""
    with contextlib.suppress(OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        with safetensors.safe_open(path, framework="pt") as file:
            described, digests = json.loads(file.metadata()["sparsity"]), file.get_tensor("digests")
        extents = {str(mode): (float(low), float(high)) for mode, (low, high) in described["extents"].items()}
        if digests.dtype is torch.uint8 and digests.shape == (num_images, DIGEST):
            return Survey(extents, bool(described["transparent"])), digests
    return None
