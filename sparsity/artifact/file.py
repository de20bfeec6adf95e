"""The file of a compact network: its program, its tensors in few bytes, and what a user needs to run it; only data."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from sparsity import files
from sparsity.artifact.coding import DTYPES, MOST_ENTRIES_A_BYTE, DamagedError, coded, decoded
from sparsity.artifact.cutting import Cut, Place, cut, empty, filled
from sparsity.artifact.program import Program, function_of, leaves
from sparsity.errors import WeightsError, reason
from sparsity.graph.tape import Batch, Call, Named, Ref, UnrecordableError
from sparsity.tensors import Tensors
from sparsity.weights.foreign import begins_as_safetensors, no_file

KEY = "sparsity.compact"  # in a safetensors file's metadata: JSON of all but the tensors
FORMAT = 2  # the newest that is read; 1 where no values are kept by codes
NAME = "compact.safetensors"
DEEPEST = 8  # lists in lists that a call is given
LIES = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
)  # of what is said


@dataclass(frozen=True)
class About:
    """What an artifact says beside its network."""

    input_shape: tuple[int, ...]
    classes: Sequence[str] | None = None  # their names, in the order of the outputs
    mean: Sequence[float] | None = None  # of the pixels in [0, 1] of each channel: images are (pixel - mean) / std
    std: Sequence[float] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)  # what the run came to


def write(path: Path, cut: Cut, about: About) -> dict[str, Any]:
    """Writes the file, whole or not at all; returns its size and its hash."""
    return _written(path, packed(cut, about))


def _written(path: Path, content: bytes) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_state(path: Path, state: Tensors, about: About, trouble: str) -> dict[str, Any]:
    """Writes a file of weights alone, of a network whose recorded functions do not say everything, and why."""
    return _written(path, packed_state(state, about, trouble))


def packed_state(state: Tensors, about: About, trouble: str) -> bytes:
    """The bytes of the file of weights alone."""
    tensors: Tensors = {}
    said = {}
    for name, tensor in state.items():
        said[name], parts = coded(name, tensor)
        tensors |= parts
    return _bytes({**_head(about, said), "calls": None, "trouble": trouble, "tensors": said}, tensors)


def size(module: nn.Module, image: Tensor, about: About) -> int:
    """The bytes of the file of a module, which takes images like one, [1, *shape]."""
    try:
        return len(packed(cut(module, image), about))
    except Exception as error:  # as the file then holds weights alone
        return len(packed_state(module.state_dict(), about, reason(error)))


def packed(cut: Cut, about: About) -> bytes:
    """The bytes of the file of a compact network."""
    tensors: Tensors = {}
    said: dict[str, Any] = {}
    whole = {name: list(tensor.shape) for name, tensor in cut.whole.tensors.items()}
    for name, tensor in cut.program.tensors.items():
        said[name], parts = coded(name, tensor)
        tensors |= parts
        place = cut.places.get(name)
        if place is not None and place.name in whole:
            axes = {str(axis): _bits(index, whole[place.name][axis]) for axis, index in place.kept.items()}
            said[name] |= {key: value for key, value in (("in", place.name), ("kept", axes)) if value != name and value}
    calls = [as_data(call) for call in cut.program.calls]
    numbers = {json.dumps(call): number for number, call in enumerate(calls)}
    dense = [numbers.get(json.dumps(data := as_data(call)), data) for call in cut.whole.calls]
    network = {"calls": calls, "output": cut.program.output.number, "tensors": said}
    gone = cut.whole.tensors.keys() - {place.name for place in cut.places.values()}
    dtypes = {name: _dtype(tensor) for name, tensor in cut.whole.tensors.items() if name in gone}
    whole_network = {"calls": dense, "output": cut.whole.output.number, "sizes": whole, "dtypes": dtypes}
    return _bytes({**_head(about, said), **network, "dense": whole_network}, tensors)


def _head(about: About, said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT if any("values" in how for how in said.values()) else 1,
        "input_shape": list(about.input_shape),
        "classes": about.classes and list(about.classes),
        "mean": about.mean and list(about.mean),
        "std": about.std and list(about.std),
        "figures": dict(about.figures),
    }


def _bytes(described: Mapping[str, Any], tensors: Tensors) -> bytes:
    return safetensors.torch.save(tensors, {KEY: json.dumps(described, separators=(",", ":"), ensure_ascii=False)})


def as_data(call: Call) -> list[Any]:
    """A call as JSON can hold it."""

    def data(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return {"ref": leaf.number}
        if isinstance(leaf, Named):
            return {"tensor": leaf.name}
        if isinstance(leaf, Batch):
            return {"batch": leaf.factor}
        if isinstance(leaf, torch.dtype):
            return {"dtype": _dtype(leaf)}
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return {"number": str(leaf)}
        if isinstance(leaf, (list, tuple)):
            return [data(each) for each in leaf]
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise UnrecordableError(f"it gives {call.name} a {type(leaf).__name__}, which no file holds")

    kwargs = {name: data(value) for name, value in call.kwargs.items()}
    return [call.function, data(call.args), list(call.outs), *([kwargs] if kwargs else [])]


def _dtype(of: Tensor | torch.dtype) -> str:
    """The name of a dtype."""
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")


def _bits(index: Tensor, size: int) -> str:
    """Which of so many places an index names, as text."""
    there = np.zeros(size, dtype=bool)
    there[index.numpy()] = True
    return base64.b85encode(np.packbits(there).tobytes()).decode()


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """What a file holds."""

    program: Program | None  # None: weights alone
    tensors: Tensors
    about: About
    trouble: str | None = None  # why it holds weights alone

    def state(self, path: str | Path) -> Tensors:
        """The parameters and buffers by the names that the network's source gives them; of a dense one."""
        found = {}
        for name, tensor in self.tensors.items():
            if name.endswith(".weight.folded"):
                raise WeightsError(
                    f"path={path} holds a bias that {name.removesuffix('.weight.folded')} has none of: load it without "
                    "module, or take model.safetensors"
                )
            if not name.endswith(".folded") and "constant" not in name:
                found[name] = tensor
        return found


def read(path: str | Path, dense: bool = False, key: str = "path") -> Artifact:
    """The network of a file and what is said of it; dense: in its first shape, with zeros for what went.

    Raises a WeightsError of one line for what is damaged, cut short, of a newer format, or lies about its sizes.
    """
    path = Path(path)
    trouble = no_file(path)
    if trouble is not None:
        raise WeightsError(f"{key}={path} {trouble}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(KEY, "null"))
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{key}={path} is damaged or cut short ({reason(error)}): take another copy") from error
    if not isinstance(described, dict):
        raise WeightsError(f"{key}={path} is no compact network: give a {NAME} that a run wrote")
    version = described.get("format")
    if type(version) is int and version > FORMAT:
        raise WeightsError(
            f"{key}={path} is of format {version}, which is newer than this program's {FORMAT}: update it"
        )
    try:
        return _artifact(described, parts, path.stat().st_size, dense)
    except LIES as error:
        raise WeightsError(f"{key}={path} says what no run writes ({reason(error)}): take another copy") from error


def _artifact(described: Mapping[str, Any], parts: Mapping[str, Tensor], num_bytes: int, dense: bool) -> Artifact:
    said = described["tensors"]
    _check_sizes([how["shape"] for how in said.values()], num_bytes)
    tensors = {name: decoded(name, how, parts) for name, how in said.items()}
    about = About(
        tuple(_whole(size) for size in described["input_shape"]),
        _names(described["classes"]),
        _numbers(described["mean"]),
        _numbers(described["std"]),
        dict(described["figures"]),
    )
    if described["calls"] is None:
        return Artifact(None, tensors, about, str(described["trouble"]))
    calls = [as_call(data) for data in described["calls"]]
    output = Ref(_whole(described["output"]))
    if dense:
        sizes = {name: [_whole(size) for size in shape] for name, shape in described["dense"]["sizes"].items()}
        _check_sizes(sizes.values(), num_bytes)
        calls = [calls[data] if type(data) is int else as_call(data) for data in described["dense"]["calls"]]
        output = Ref(_whole(described["dense"]["output"]))
        places = {name: _place(name, how, sizes) for name, how in said.items()}
        dtypes = {name: DTYPES[dtype] for name, dtype in described["dense"].get("dtypes", {}).items()}
        dtypes |= {place.name: tensors[name].dtype for name, place in places.items()}
        like = {name: (shape, dtypes.get(name, torch.float32)) for name, shape in sizes.items()}
        tensors = filled(tensors, places, empty(like, calls))
    program = Program(calls, tensors, output)
    check(program)
    return Artifact(program, tensors, about)


def _names(found: Any) -> list[str] | None:
    return None if found is None else [str(name) for name in found]


def _numbers(found: Any) -> list[float] | None:
    return None if found is None else [float(number) for number in found]


def _check_sizes(shapes: Iterable[Sequence[Any]], num_bytes: int) -> None:
    """Refuses tensors of more entries than an honest file of so many bytes tells of, before any is made."""
    count = sum(math.prod(map(_whole, shape)) for shape in shapes)
    if count > MOST_ENTRIES_A_BYTE * num_bytes:
        raise DamagedError(f"its tensors have {count:,} entries, more than {num_bytes:,} bytes can tell of")


def _place(name: str, how: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> Place:
    """Where a tensor lies in the dense network."""
    whole = how.get("in", name)
    kept = {}
    for axis, text in how.get("kept", {}).items():
        bits = np.frombuffer(base64.b85decode(text), dtype=np.uint8)
        kept[int(axis)] = torch.from_numpy(np.flatnonzero(np.unpackbits(bits, count=sizes[whole][int(axis)])))
    return Place(whole, kept)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise DamagedError(f"{number!r} is no size")
    return number


def as_call(data: Any) -> Call:
    """A call of what a file says; what it names is looked up among known functions alone."""

    def read(leaf: Any, depth: int = 0) -> Any:
        if isinstance(leaf, list) and depth < DEEPEST:
            return [read(each, depth + 1) for each in leaf]
        if isinstance(leaf, dict) and len(leaf) == 1:
            (kind, value), *_ = leaf.items()
            make = {"ref": Ref, "tensor": Named, "batch": Batch, "dtype": DTYPES.__getitem__, "number": float}[kind]
            return make(value)
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise DamagedError("a call is given what no run writes")

    function, args, outs, *more = data
    kwargs = {str(name): read(value) for name, value in (more[0] if more else {}).items()}
    call = Call(str(function), tuple(read(args)), kwargs, tuple(out if out is None else _whole(out) for out in outs))
    found = function_of(call)
    if isinstance(found, OpOverload) and found._schema.is_mutable:
        raise DamagedError(f"{call.function} changes what it is given")
    return call


def check(program: Program) -> None:
    """Refuses a program that reads what is not there."""
    known = {0}
    for call in program.calls:
        for leaf in leaves(call):
            if (isinstance(leaf, Ref) and leaf.number not in known) or (
                isinstance(leaf, Named) and leaf.name not in program.tensors
            ):
                raise DamagedError(f"{call.function} reads {leaf}, which is not there")
        known |= {out for out in call.outs if out is not None}
    if program.output.number not in known:
        raise DamagedError("it has no output")


def is_compact(path: Path) -> bool:
    """Whether a file is one of these, as far as its header says."""
    if not begins_as_safetensors(path):
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False
