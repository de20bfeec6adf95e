"""Tensors in few bytes: dense, or the entries that are not zero and where they lie; exact, bit for bit.

A dense tensor is kept as it is. Of a sparse one the entries in row-major order are kept, and their places either as one
bit an entry (`bits`), or as the number of zeros before each, one byte each, 255 meaning 255 zeros and no entry
(`gaps`). Whatever deflate makes smaller is deflated. The smallest of these is taken.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.tensors import Tensors, nonzero

MOST_ENTRIES_A_BYTE = 4096  # of all tensors, for each byte of a file: more is no honest file's
SKIP = 255
BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


class DamagedError(ValueError):
    """Bytes that are no coded tensor."""


def coded(name: str, tensor: Tensor) -> tuple[dict[str, Any], Tensors]:
    """How a tensor is kept, and its parts by name: those of the smallest form."""
    tensor = tensor.detach().cpu().contiguous()
    about = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    forms = [({**about, "form": "dense"}, {name: tensor})]
    if not tensor.dtype.is_floating_point and tensor.ndim == 1 and _ascends(tensor):
        bits, how = _smaller(
            _packed(torch.zeros(int(tensor[-1]) + 1, dtype=torch.bool).index_fill(0, tensor.long(), True))
        )
        forms.append(({**about, "form": "places", **how}, {f"{name}.bits": bits}))
    elif tensor.numel():
        there = nonzero(tensor).flatten()
        values = tensor.flatten()[there]
        for form, places in (("bits", _packed(there)), ("gaps", _gaps(there))):
            kept, how = _smaller(places)
            forms.append(({**about, "form": form, **how}, {f"{name}.values": values, f"{name}.{form}": kept}))
    return min(forms, key=lambda form: sum(part.nbytes for part in form[1].values()) + 80 * len(form[1]))


def decoded(name: str, about: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor again. Raises DamagedError where its parts are not what they say.

    It allocates what `about` says: see first that all tensors of a file have an honest number of entries.
    """
    try:
        dtype, shape, form = DTYPES[about["dtype"]], about["shape"], about["form"]
        sizes_are_whole = all(type(size) is int and size >= 0 for size in shape)
        own = {"dense": [name], "places": [f"{name}.bits"]}.get(form) or [f"{name}.values", f"{name}.{form}"]
        found = [parts[part] for part in own]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{name} lacks {error}") from error
    if not sizes_are_whole:
        raise DamagedError(f"{name} has no shape")
    count = math.prod(shape)
    if form == "dense":
        if found[0].dtype != dtype or list(found[0].shape) != list(shape):
            raise DamagedError(f"{name} is not of the shape {shape}")
        return found[0]
    if form == "places":
        return _places(name, about, found[0], count, dtype)
    values, places = found
    if values.dtype != dtype or values.ndim != 1:
        raise DamagedError(f"{name} has no {about['dtype']} numbers in a row")
    there = (_read_bits if form == "bits" else _read_gaps)(name, about, places, count, len(values))
    tensor = torch.zeros(count, dtype=dtype)
    tensor[torch.from_numpy(there)] = values
    return tensor.view(shape)


def _ascends(index: Tensor) -> bool:
    return len(index) > 0 and int(index[0]) >= 0 and bool((index[1:] > index[:-1]).all())


def _packed(there: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(there.numpy()))


def _gaps(there: Tensor) -> Tensor:
    """The zeros before each entry, a byte each; 255 stands for as many zeros and no entry."""
    places = there.nonzero().flatten().numpy()
    zeros = np.diff(places, prepend=-1) - 1
    skips = zeros // SKIP
    found = np.full(int(skips.sum()) + len(zeros), SKIP, dtype=np.uint8)
    found[np.arange(len(zeros)) + np.cumsum(skips)] = zeros % SKIP
    return torch.from_numpy(found)


def _smaller(part: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Bytes as they are, or deflated where that is smaller."""
    raw = part.numpy().tobytes()
    deflated = zlib.compress(raw, 9)
    if len(deflated) + 20 < len(raw):
        return torch.frombuffer(bytearray(deflated), dtype=torch.uint8), {"deflated": len(raw)}
    return part, {}


def _bytes(name: str, about: Mapping[str, Any], part: Tensor, most: int) -> np.ndarray:
    """The bytes of a part, at most so many."""
    if part.dtype != torch.uint8 or part.ndim != 1:
        raise DamagedError(f"{name} has no bytes where its places should be")
    if "deflated" not in about:
        return part.numpy()
    size = about["deflated"]
    if type(size) is not int or not 0 <= size <= most:
        raise DamagedError(f"{name} says that its places take {size} bytes")
    try:
        reader = zlib.decompressobj()
        raw = reader.decompress(part.numpy().tobytes(), size + 1)
    except zlib.error as error:
        raise DamagedError(f"{name} cannot be inflated: {error}") from error
    if len(raw) != size:
        raise DamagedError(f"{name} is inflated to other than {size} bytes")
    return np.frombuffer(raw, dtype=np.uint8)


def _read_bits(name: str, about: Mapping[str, Any], part: Tensor, count: int, num_values: int) -> np.ndarray:
    most = -(-count // 8)
    bits = _bytes(name, about, part, most)
    if len(bits) != most:
        raise DamagedError(f"{name} has {8 * len(bits):,} bits for {count:,} entries")
    return _there(name, bits, num_values)


def _there(name: str, packed: np.ndarray, count: int) -> np.ndarray:
    """The places of so many bits that are set; they are counted before they are laid out."""
    if (found := int(BITS_SET[packed].sum(dtype=np.int64))) != count:
        raise DamagedError(f"{name} has {found:,} places for {count:,} values")
    return np.flatnonzero(np.unpackbits(packed))


def _read_gaps(name: str, about: Mapping[str, Any], part: Tensor, count: int, num_values: int) -> np.ndarray:
    gaps = _bytes(name, about, part, num_values + count // SKIP)
    is_entry = gaps < SKIP
    if (found := np.count_nonzero(is_entry)) != num_values:
        raise DamagedError(f"{name} has {found:,} places for {num_values:,} values")
    gaps = gaps.astype(np.int64)
    places = np.cumsum(gaps + is_entry)[is_entry] - 1
    if len(places) and places[-1] >= count:
        raise DamagedError(f"{name} has places beyond its {count:,} entries")
    return places


def _places(name: str, about: Mapping[str, Any], part: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    most = about.get("deflated", len(part)) if isinstance(about.get("deflated", 0), int) else 0
    bits = _bytes(name, about, part, min(most, MOST_ENTRIES_A_BYTE * (1 + len(part))))
    return torch.from_numpy(_there(name, bits, count)).to(dtype)
