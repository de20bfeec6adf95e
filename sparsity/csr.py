"""A network in one file for NumPy and SciPy: linear layers as sparse matrices where these are faster, and the program.

The file is an .npz. A sparse matrix NAME lies there in compressed sparse rows: `NAME.data`, `NAME.indices`,
`NAME.indptr`, `NAME.shape`; every other tensor is an array under its name. `program.json` holds, as bytes in UTF-8, the
calls in order, each as [function, arguments, numbers of its results], where {"ref": 0} is the images.
"""

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsity.artifact import About, Program
from sparsity.artifact.file import as_call, as_data, check
from sparsity.artifact.program import LEAVES, function_of, last_uses, leaves
from sparsity.errors import ExportError, reason
from sparsity.graph.tape import Call, Named, Ref
from sparsity.quantizing import LEVELS

FORMAT = 1
PROGRAM = "program.json"
PARTS = ("data", "indices", "indptr", "shape")  # of a sparse matrix
SHOWN = 5  # layers in a line
LEAST = 1e-3  # seconds that one measurement of a product takes, by calling it often enough

Arrays = dict[str, Any]  # by name: arrays, and sparse matrices


# --- what runs it ----------------------------------------------------------------------------------------------------


def linear(inputs: np.ndarray, weight: Any, bias: np.ndarray | None = None) -> np.ndarray:
    """Inputs [..., in] times a dense or sparse matrix [out, in], and a bias [out]: [..., out]."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    product = flat @ weight.T if isinstance(weight, np.ndarray) else (weight @ flat.T).T
    outputs = product if bias is None else product + bias
    return outputs.reshape(*inputs.shape[:-1], weight.shape[0])


def _sigmoid(inputs: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(inputs)


def _log_softmax(inputs: np.ndarray, axis: int, *_: Any) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(inputs, axis=axis)


def _expand(inputs: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    own = (1,) * (len(sizes) - inputs.ndim) + inputs.shape
    return np.broadcast_to(inputs, [old if size == -1 else size for size, old in zip(sizes, own)])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "add": np.add,
    "relu": lambda inputs: np.maximum(inputs, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "log_softmax": _log_softmax,
    "softmax": lambda inputs, axis, *_: np.exp(_log_softmax(inputs, axis)),
    "reshape": np.reshape,
    "expand": _expand,
    "gather": lambda inputs, axis, index: np.take(inputs, index, axis),
    "clone": lambda inputs: inputs,
    "rounded": lambda inputs, step, zero: (np.clip(np.round(inputs / step) + zero, 0, LEVELS) - zero) * step,
}


def unknown(program: Program) -> list[str]:
    """The functions of a program that NumPy is not told how to compute."""
    return sorted({call.name for call in program.calls if call.name not in FUNCTIONS or call.kwargs})


def load(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """What a file of a whole network computes: outputs [n, classes] of images [n, *shape] as the data set has them.

    Images of uint8 are brought to [0, 1]; all are normalised where the run normalised. Raises an ExportError of one
    line for a file that is damaged, or that holds linear layers alone.
    """
    try:
        held = read(Path(path).read_bytes())
    except OSError as error:
        raise ExportError(f"path={path} cannot be read ({error.strerror}): give the file of export=csr") from error
    except Exception as error:  # numpy, zipfile and zlib refuse in many ways
        raise ExportError(f"path={path} is damaged, or no file of export=csr ({reason(error)})") from error
    if not held.is_whole:
        raise ExportError(f"path={path} holds linear layers alone, as their network computes more: take export=onnx")
    return held.outputs


@dataclass(frozen=True)
class Held:
    """What a file holds."""

    program: Program  # its tensors are arrays and sparse matrices
    is_whole: bool  # False: the calls are linear layers alone
    mean: list[float] | None
    std: list[float] | None

    def outputs(self, images: np.ndarray) -> np.ndarray:
        """The outputs [n, …] of images [n, *shape] as the data set has them."""
        return run(self.program, self._scaled(images), lambda call: FUNCTIONS[call.name])

    def _scaled(self, images: np.ndarray) -> np.ndarray:
        if images.dtype == np.uint8:
            images = images.astype(np.float32) * np.float32(1 / 255)
        if self.mean is None:
            return images
        axes = [-1, *[1] * (images.ndim - 2)]
        mean, std = (np.array(numbers, dtype=np.float32).reshape(axes) for numbers in (self.mean, self.std))
        return (images - mean) / std


def run(program: Program, images: Any, function_of: Callable[[Call], Callable[..., Any]]) -> Any:
    """The outputs of a program whose functions and tensors may be of any library."""
    values = {0: images}

    def resolved(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.number]
        if isinstance(leaf, Named):
            return program.tensors[leaf.name]
        return leaf.factor * len(images) if isinstance(leaf, LEAVES) else leaf

    for call, done in zip(program.calls, last_uses(program)):
        args, kwargs = tree_map(resolved, (call.args, call.kwargs), is_leaf=lambda leaf: isinstance(leaf, LEAVES))
        results = function_of(call)(*args, **kwargs)
        for out, result in zip(call.outs, results if isinstance(results, (tuple, list)) else (results,)):
            if out is not None:
                values[out] = result
        for number in done:
            values.pop(number, None)
    return values[program.output.number]


def mixed_outputs(program: Program, layers: Program, images: Tensor) -> Tensor:
    """The outputs of a program in PyTorch, but for its linear layers, which are taken from a file's."""

    def functions(call: Call) -> Callable[..., Any]:
        return through_numpy if call.name == "linear" else function_of(call)

    def through_numpy(inputs: Tensor, weight: Any, bias: Any = None) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(linear(inputs.numpy(), weight, bias)))

    weights = {leaf.name for call in layers.calls for leaf in leaves(call) if isinstance(leaf, Named)}
    tensors = {name: layers.tensors[name] if name in weights else tensor for name, tensor in program.tensors.items()}
    return run(Program(program.calls, tensors, program.output), images, functions)


# --- what is faster --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How many times as fast the sparse product of a layer is as the dense one, by batch size."""

    name: str
    density: float
    times: dict[int, float]

    @property
    def is_faster(self) -> bool:
        """Whether it is the faster one at every batch size."""
        return all(factor > 1 for factor in self.times.values())


def said(speeds: Sequence[Speed]) -> str:
    """Which layers are sparse, and how fast, in one line."""
    kept = [speed for speed in speeds if speed.is_faster]
    factors = {size: [speed.times[size] for speed in kept or speeds] for size in speeds[0].times}
    each = ", ".join(f"{_span(some)} in batches of {size}" for size, some in factors.items())
    ending = f": speed, where a dense one has 1: {each}" if each else ""
    if not kept:
        return f"none of {len(speeds)} linear layers is faster as a sparse matrix{ending}"
    names = ", ".join(speed.name.removesuffix(".weight") for speed in kept[:SHOWN])
    more = f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
    return f"{len(kept)} of {len(speeds)} linear layers are sparse matrices ({names}{more}){ending}"


def _span(numbers: Sequence[float]) -> str:
    """The smallest and the largest of some numbers."""
    return " to ".join(dict.fromkeys(f"{number:.2g}" for number in (min(numbers), max(numbers))))


def measured(program: Program, batch_sizes: Sequence[int], repeats: int) -> tuple[Arrays, list[Speed]]:
    """The matrices of linear layers as sparse ones where these are faster, and the speeds of all."""
    from scipy.sparse import csr_array

    found, speeds = {}, []
    for name in matrices(program):
        dense = array(program.tensors[name])
        sparse = csr_array(dense)
        density = sparse.nnz / max(1, math.prod(sparse.shape))
        times = {size: _factor(dense, sparse, size, repeats) for size in batch_sizes}
        speeds.append(Speed(name, density, times))
        if speeds[-1].is_faster:
            found[name] = sparse
    return found, speeds


def matrices(program: Program) -> list[str]:
    """The tensors that linear layers alone multiply."""
    layers = [call for call in program.calls if call.name == "linear"]
    others = [leaf for call in program.calls if call.name != "linear" for leaf in leaves(call)]
    others += [leaf for call in layers for leaf in call.args[2:]]
    return list(dict.fromkeys(call.args[1].name for call in layers if call.args[1] not in others))


def _factor(dense: np.ndarray, sparse: Any, batch_size: int, repeats: int) -> float:
    """How many times as fast the sparse product is: the ratio of medians over measurements in turns."""
    inputs = np.random.default_rng(0).standard_normal((batch_size, dense.shape[1]), dtype=np.float32)
    inputs = inputs.astype(dense.dtype)
    products = [lambda: linear(inputs, dense), lambda: linear(inputs, sparse)]
    often = [max(1, math.ceil(LEAST / max(_seconds(product, 1), 1e-7))) for product in products for _ in range(2)][1::2]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for product, count, each in zip(products, often, seconds):
            each.append(_seconds(product, count))
    return median(seconds[0]) / median(seconds[1])


def _seconds(product: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        product()
    return (time.perf_counter() - start) / count


# --- the file --------------------------------------------------------------------------------------------------------


def packed(program: Program, sparse: Mapping[str, Any], speeds: Sequence[Speed], about: About) -> bytes:
    """The bytes of a file: of a whole program, or of its linear layers where NumPy cannot compute the rest.

    sparse: the matrices that are kept as such, by name; speeds: of all.
    """
    is_whole = not unknown(program)
    calls = [call for call in program.calls if is_whole or call.name == "linear"]
    names = dict.fromkeys(leaf.name for call in calls for leaf in leaves(call) if isinstance(leaf, Named))
    said = {
        "format": FORMAT,
        "is_whole": is_whole,
        "input_shape": list(about.input_shape),
        "classes": about.classes and list(about.classes),
        "mean": about.mean and list(about.mean),
        "std": about.std and list(about.std),
        "sparse": [name for name in names if name in sparse],
        "dense": [name for name in names if name not in sparse],
        "speeds": {speed.name: {"density": speed.density, "times": speed.times} for speed in speeds},
        "calls": [as_data(call) for call in calls],
        "output": program.output.number if is_whole else calls[-1].outs[0],
    }
    arrays = {PROGRAM: np.frombuffer(json.dumps(said, ensure_ascii=False).encode(), dtype=np.uint8)}
    for name in names:
        if name in sparse:
            arrays |= {f"{name}.{part}": np.asarray(getattr(sparse[name], part)) for part in PARTS}
        else:
            arrays[name] = array(program.tensors[name])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as NumPy has it."""
    return tensor.detach().cpu().numpy()


def read(content: bytes) -> Held:
    """What the bytes of a file hold."""
    from scipy.sparse import csr_array

    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        said = json.loads(file[PROGRAM].tobytes())
        if said["format"] > FORMAT:
            raise ValueError(f"it is of format {said['format']}, newer than {FORMAT}")
        tensors: Arrays = {name: file[name] for name in said["dense"]}
        for name in said["sparse"]:
            data, indices, indptr, shape = (file[f"{name}.{part}"] for part in PARTS)
            tensors[name] = csr_array((data, indices, indptr), shape=tuple(shape.tolist()))
            tensors[name].check_format(full_check=True)
    calls = [as_call(data) for data in said["calls"]]
    program = Program(calls, tensors, Ref(said["output"]))
    if said["is_whole"]:
        check(program)
        if others := unknown(program):
            raise ValueError(f"it computes {', '.join(others)}")
    return Held(program, said["is_whole"], said["mean"], said["std"])
