"""Tensors in few bytes: dense, or the entries that are not zero and where they lie; exact, bit for bit.

A tensor is kept dense, or of a sparse one the entries in row-major order and their places, either as one bit an entry
(`bits`), or as the number of zeros before each, one byte each, 255 meaning 255 zeros and no entry (`gaps`). Entries are
kept as they are; or, of few values, as one byte each that says which of them (`book`); or as whole numbers from -127 to
127 times a scale of each output (`scaled`). Whatever deflate makes smaller is deflated, by the best of its strategies:
on trained LeNets its Huffman codes are within 3 to 6 % of the entropy. The smallest of these is taken.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.tensors import Tensors, nonzero

MOST_ENTRIES_A_BYTE = 4096  # of all tensors, for each byte of a file: more is no honest file's
SKIP = 255
BOOK, LEVELS = 256, 127  # distinct values that a byte tells apart; the largest whole number
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what holds the bits of a number of so many bytes
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)
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
        for values, parts in _values(name, tensor, torch.ones_like(there)):
            if values:
                forms.append(({**about, "form": "dense", **values}, parts))
        values, parts = _smallest(_values(name, tensor, there))
        for form, places in (("bits", _packed(there)), ("gaps", _gaps(there))):
            kept, how = _smaller(places)
            forms.append(({**about, "form": form, **how, **values}, {**parts, f"{name}.{form}": kept}))
    return _smallest(forms)


def decoded(name: str, about: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Tensor:
    """The tensor again. Raises DamagedError where its parts are not what they say.

    It allocates what `about` says: see first that all tensors of a file have an honest number of entries.
    """
    try:
        dtype, shape, form = DTYPES[about["dtype"]], about["shape"], about["form"]
        sizes_are_whole = all(type(size) is int and size >= 0 for size in shape)
        is_plain = form == "dense" and "values" not in about
        own = {"dense": [name] if is_plain else [], "places": [f"{name}.bits"]}
        own |= {"bits": [f"{name}.bits"], "gaps": [f"{name}.gaps"]}
        found = [parts[part] for part in own[form]]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{name} lacks {error}") from error
    if not sizes_are_whole:
        raise DamagedError(f"{name} has no shape")
    count = math.prod(shape)
    if form == "places":
        return _read_places(name, about, found[0], count, dtype)
    if is_plain:
        if found[0].dtype != dtype or list(found[0].shape) != list(shape):
            raise DamagedError(f"{name} is not of the shape {shape}")
        return found[0]
    codes = None if "values" not in about else _read_codes(name, about["values"], parts, count)
    values = _part(name, "values", parts, dtype) if codes is None else codes
    if form == "dense" and len(values) != count:
        raise DamagedError(f"{name} has {len(values):,} values for {count:,} entries")
    read = {"bits": _read_bits, "gaps": _read_gaps}.get(form)
    there = slice(None) if form == "dense" else torch.from_numpy(read(name, about, found[0], count, len(values)))
    if codes is not None:
        values = _read_values(name, about, parts, codes, there)
    tensor = torch.zeros(count, dtype=dtype)
    tensor[there] = values
    return tensor.view(shape)


# --- values ----------------------------------------------------------------------------------------------------------

Form = tuple[dict[str, Any], Tensors]


def _smallest(forms: Iterable[Form]) -> Form:
    """The form whose parts take the fewest bytes, what is said of them included."""
    return min(forms, key=lambda form: sum(part.nbytes + 60 for part in form[1].values()) + len(json.dumps(form[0])))


def _values(name: str, tensor: Tensor, there: Tensor) -> Iterator[Form]:
    """The ways to keep the entries that are there, in their order: as they are, and what else is exact."""
    values = tensor.flatten()[there]
    yield {}, {f"{name}.values": values}
    if not tensor.dtype.is_floating_point or not len(values):
        return
    if (found := _book(values)) is not None:
        codes, how = _smaller(found[1])
        yield {"values": {"form": "book", **how}}, {f"{name}.book": found[0], f"{name}.codes": codes}
    for axis in range(min(2, tensor.ndim) if tensor.dtype is torch.float32 and tensor.ndim > 1 else 0):
        rows = _along(torch.arange(tensor.numel())[there], tensor.shape, axis)
        if (scales := _scales(values, rows, tensor.shape[axis])) is not None:
            whole = (values / _divisor(scales[rows])).round().to(torch.int8)
            codes, how = _smaller(whole.view(torch.uint8))
            about = {"form": "scaled", "axis": axis, **how}
            yield {"values": about}, {f"{name}.scales": scales, f"{name}.codes": codes}
            return


def _book(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """The distinct values, and which of them each is; None where a byte does not tell."""
    numbers = values.view(BITS[values.element_size()]).numpy()  # bit for bit
    if len(np.unique(numbers[: 4 * BOOK])) > BOOK:  # of many, quickly seen
        return None
    book, codes = np.unique(numbers, return_inverse=True)
    if len(book) > BOOK:
        return None
    return torch.from_numpy(book).view(values.dtype), torch.from_numpy(codes.astype(np.uint8))


def scales_of(tensor: Tensor, axis: int) -> Tensor | None:
    """A scale of each place along an axis of which all entries there are whole multiples, as of `_scales`; -0 is 0."""
    if tensor.dtype is not torch.float32 or not tensor.numel():
        return None
    tensor = tensor.detach() + 0.0
    rows = _along(torch.arange(tensor.numel()), tensor.shape, axis)
    return _scales(tensor.cpu().flatten(), rows, tensor.shape[axis])


def _scales(values: Tensor, rows: Tensor, count: int) -> Tensor | None:
    """A scale of each row of which all its values are multiples from -127 to 127, bit for bit; None where one has none.

    That of a row is near max / 127, or where its largest entry has gone since, near the largest one's part of that.
    """
    if _scale(values[rows == rows[0]]) is None:  # of other numbers, quickly seen
        return None
    scales = torch.zeros(count).scatter_reduce(0, rows, values.abs(), "amax") / LEVELS
    is_open = torch.ones(count, dtype=torch.bool)
    for candidate in _neighbours(scales):
        misses = torch.zeros(count).index_add(0, rows, (~_is_multiple(values, candidate[rows])).float())
        scales, is_open = torch.where(is_open & (misses == 0), candidate, scales), is_open & (misses > 0)
    left = is_open[rows]
    ordered = values[left][rows[left].argsort(stable=True)]
    sizes = rows[left].bincount(minlength=count)[is_open]
    for row, own in zip(is_open.nonzero().flatten(), ordered.split(sizes.tolist()) if len(sizes) else ()):
        if (scale := _scale(own)) is None:
            return None
        scales[row] = scale
    return scales


def _scale(values: Tensor) -> Tensor | None:
    """The largest scale of which all values are such multiples, max over 1 to 127; None where there is none."""
    candidates = torch.cat(_neighbours(values.abs().max() / torch.arange(1, LEVELS + 1)))
    fits = _is_multiple(values, candidates.unsqueeze(1)).all(1)
    return candidates[fits].max() if fits.any() else None


def _neighbours(scales: Tensor) -> list[Tensor]:
    """Scales, and the numbers beside them, as the largest entry was rounded."""
    return [scales, scales.nextafter(torch.tensor(torch.inf)), scales.nextafter(torch.tensor(0.0))]


def _is_multiple(values: Tensor, scales: Tensor) -> Tensor:
    """Whether values are whole multiples of scales, and have the same bits when they are read, unlike -0."""
    whole = (values / _divisor(scales)).round()
    is_same = ((whole + 0.0) * scales).view(torch.int32) == values.view(torch.int32)
    return is_same & (whole.abs() <= LEVELS) & ((scales == 0) | (scales >= torch.finfo(torch.float32).tiny))


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1)


def _along(places: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Where entries, by their places in row-major order, lie along an axis."""
    return places // math.prod(shape[axis + 1 :]) % shape[axis]


def _part(name: str, kind: str, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A part that is a row of numbers."""
    found = parts.get(f"{name}.{kind}")
    if found is None or found.dtype != dtype or found.ndim != 1:
        raise DamagedError(f"{name} has no {str(dtype).removeprefix('torch.')} {kind} in a row")
    return found


def _read_codes(name: str, how: Any, parts: Mapping[str, Tensor], count: int) -> np.ndarray:
    if not isinstance(how, dict) or how.get("form") not in ("book", "scaled"):
        raise DamagedError(f"{name} has values of an unknown form")
    codes = _bytes(name, how, _part(name, "codes", parts, torch.uint8), count)
    if len(codes) > count:
        raise DamagedError(f"{name} has {len(codes):,} codes for {count:,} entries")
    return codes


def _read_values(
    name: str, about: Mapping[str, Any], parts: Mapping[str, Tensor], codes: np.ndarray, there: slice | Tensor
) -> Tensor:
    how, dtype = about["values"], DTYPES[about["dtype"]]
    if how["form"] == "book":
        book = _part(name, "book", parts, dtype)
        if len(codes) and int(codes.max()) >= len(book):
            raise DamagedError(f"{name} has codes beyond its {len(book)} values")
        return book[torch.from_numpy(codes.astype(np.int64))]
    axis, shape = how.get("axis"), about["shape"]
    scales = _part(name, "scales", parts, dtype)
    if axis not in range(len(shape)) or len(scales) != shape[axis]:
        raise DamagedError(f"{name} has {len(scales)} scales along the axis {axis} of {shape}")
    rows = _along(torch.arange(math.prod(shape))[there], shape, axis)
    return torch.from_numpy(codes.view(np.int8).astype(np.float32)).to(dtype) * scales[rows]


# --- places, and bytes -----------------------------------------------------------------------------------------------


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
    deflated = min((_deflated(raw, strategy) for strategy in STRATEGIES), key=len)
    if len(deflated) + 20 < len(raw):
        return torch.frombuffer(bytearray(deflated), dtype=torch.uint8), {"deflated": len(raw)}
    return part, {}


def _deflated(raw: bytes, strategy: int) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return deflate.compress(raw) + deflate.flush()


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
    if len(raw) != size or not reader.eof:
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


def _read_places(name: str, about: Mapping[str, Any], part: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    most = about.get("deflated", len(part)) if isinstance(about.get("deflated", 0), int) else 0
    bits = _bytes(name, about, part, min(most, MOST_ENTRIES_A_BYTE * (1 + len(part))))
    return torch.from_numpy(_there(name, bits, count)).to(dtype)
