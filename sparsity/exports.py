"""The compact network of a run in forms for other programs, each run there on every test image before it is written.

An export is a function of the network, the test set as the loader gave it, and the folder to write into. What it writes
takes images as the data set has them: scaling and normalisation are inside.
"""

import contextlib
import copy
import io
import json
import logging
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsity import csr as matrices
from sparsity import files
from sparsity.artifact import About, Network, Program, is_quantized, with_integers
from sparsity.artifact.program import function_of, leaves
from sparsity.artifact.quantizing import DEQUANTIZED, ROUNDED
from sparsity.data import Files, Images
from sparsity.data.scaling import column, scaled
from sparsity.errors import ExportError, reason
from sparsity.graph.tape import Call, Ref
from sparsity.kinds import PositiveCount, Range

AT_ONCE = 100  # images
LATENCIES = (1, 256)  # images whose latency is measured
SECONDS, ROUNDS = 0.1, 5  # of measuring each, at least
TOLERANCE = 1e-3  # of the largest output: what another program's order of sums may make of it, and no other network
IN_STEPS = (
    0.05  # the same of a network in whole numbers: sums near a half are rounded by one step, which layers pass on
)
INPUT, OUTPUT, BATCH = "images", "outputs", "batch"
ABOUT = "about.json"  # within a file of torch.export


@dataclass(frozen=True)
class Exported:
    """What an export has written, and how it compares with PyTorch over all test images."""

    files: dict[str, int]  # their names, and bytes
    difference: float  # the largest of any output
    accuracy: float  # of what was written, in [0, 1]
    notes: Sequence[str] = ()  # what there is to say of it
    latency: dict[str, float] = field(default_factory=dict)  # seconds of a batch, by its size, where they were measured


def onnx(network: Network, test: Images | Files, folder: Path, *, opset: Annotated[int, Range(18, 23)]) -> Exported:
    """`compact.onnx`, for any runtime of ONNX: one file with its weights, of images in batches of any size.

    opset: the version of ONNX's operators; newer ones need newer runtimes. The file's metadata holds the names of the
    classes and the shape of an image as JSON. Of a network in whole numbers it has int8 weights, and says by
    QuantizeLinear and DequantizeLinear where runtimes may compute in integers.
    """
    with _exporting("onnx", folder):
        raw = Raw(network, test)
        content = _onnx(raw, opset)
        run = _onnxruntime(content)
        written = _written(folder, "compact.onnx", content, _checked(raw, test, run))
        return replace(written, latency=_latency(run, test))


def torch_export(network: Network, test: Images | Files, folder: Path) -> Exported:
    """`compact.pt2`, for PyTorch without this program: `torch.export.load(FILE).module()(images)`.

    `about.json` in it, an extra file, holds the names of the classes and the shape of an image.
    """
    with _exporting("torch_export", folder):
        raw = Raw(network, test)
        file, extra = io.BytesIO(), {ABOUT: json.dumps(_said(raw.about))}
        torch.export.save(_without_traces(_traced(raw)), file, extra_files=extra)
        content = file.getvalue()
        module = torch.export.load(io.BytesIO(content)).module()
        written = _written(folder, "compact.pt2", content, _checked(raw, test, module))
        return replace(written, latency=_latency(module, test))


def csr(
    network: Network,
    test: Images | Files,
    folder: Path,
    *,
    batch_sizes: list[PositiveCount],
    repeats: PositiveCount,
) -> Exported:
    """`compact_csr.npz`, for NumPy and SciPy: linear layers as sparse matrices where these are faster.

    batch_sizes: those at which the sparse product must be faster than the dense one; repeats: measurements of each, in
    turns, of which the median counts. `sparsity.csr.load` runs the file; of a network that computes more than linear
    layers, activations and reshapes it holds the linear layers alone.
    """
    with _exporting("csr", folder):
        raw = Raw(network, test)
        program = raw.program()
        if not matrices.matrices(program):
            raise ExportError("export=csr is for linear layers, of which this network has none: take export=onnx")
        sparse, speeds = matrices.measured(program, batch_sizes, repeats)
        content = matrices.packed(program, sparse, speeds, raw.about)
        held, others = matrices.read(content), matrices.unknown(program)
        notes = [f"compact_csr.npz: {matrices.said(speeds)}"]
        if others:
            notes.append(f"compact_csr.npz holds linear layers alone: the network computes {', '.join(others)} too")

        def run(images: Tensor) -> Tensor:
            if held.is_whole:
                return torch.from_numpy(np.ascontiguousarray(held.outputs(images.numpy())))
            return matrices.mixed_outputs(program, held.program, raw.scaled(images))

        written = _written(folder, "compact_csr.npz", content, _checked(raw, test, run), notes)
        return replace(written, latency=_latency(run, test) if held.is_whole else {})


# --- what all of them do ---------------------------------------------------------------------------------------------


class Raw(nn.Module):
    """A network that takes images as the data set has them, on the CPU."""

    def __init__(self, network: Network, test: Images | Files):
        super().__init__()
        self.network = copy.deepcopy(network).cpu().eval()
        self.about: About = network.about or About(tuple(test.shape))
        self.dtype = next(_batches(test))[0].dtype
        for name in ("mean", "std"):
            numbers = getattr(self.about, name)
            self.register_buffer(name, numbers and column(numbers, len(self.about.input_shape)))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """The outputs of images [n, *shape], uint8 or floating point as the test set has them."""
        return self.network(self.scaled(images))

    def scaled(self, images: Tensor) -> Tensor:
        """Images as the network takes them."""
        return scaled(images, self.mean, self.std)

    def program(self) -> Program:
        """The network's program with its tensors as they are here."""
        tensors = {name: getattr(self.network, place) for name, place in self.network.places.items()}
        return replace(self.network.program, tensors=tensors)

    def example(self) -> Tensor:
        """Two images of zeros: of a single one, the size of the batch would be taken for a constant."""
        return torch.zeros(2, *self.about.input_shape, dtype=self.dtype)


@contextlib.contextmanager
def _exporting(name: str, folder: Path) -> Iterator[None]:
    """Says in one line what another program refuses, and none of its warnings."""
    refusal = files.why_not_writable(folder)
    if refusal is not None:
        raise ExportError(f"export={name} cannot write into {folder} ({refusal.strerror or refusal}): make it writable")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(
            f"export={name} cannot write into {folder} ({error.strerror or error}): free space"
        ) from error
    except Exception as error:  # whatever these programs may raise
        raise ExportError(f"export={name} cannot take this network ({reason(error)}): take another export") from error


def _batches(test: Images | Files) -> Iterator[tuple[Tensor, Tensor]]:
    """The first image alone, then all images, each with their labels."""
    for order, size in ((torch.zeros(1, 1, dtype=torch.long), 1), (torch.arange(len(test)).unsqueeze(0), AT_ONCE)):
        for batch in test.batches(order, size):
            yield batch.images[0].cpu(), batch.labels[0].cpu()


def _checked(raw: Raw, test: Images | Files, run: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The largest difference of another program's outputs from PyTorch's, and its accuracy; refuses other outputs."""
    difference, largest, correct = torch.zeros(()), torch.zeros(()), 0
    for number, (images, labels) in enumerate(_batches(test)):
        expected, found = raw(images), run(images)
        if found.shape != expected.shape:
            raise ValueError(f"its outputs are {list(found.shape)}, PyTorch's {list(expected.shape)}")
        difference = torch.maximum(difference, (found - expected).abs().max())  # NaN where any is
        largest = torch.maximum(largest, expected.abs().max())
        correct += int((found.argmax(1) == labels).sum()) if number else 0
    if not difference <= (IN_STEPS if is_quantized(raw.network.program) else TOLERANCE) * largest:
        raise ValueError(f"its outputs of up to {largest:.2g} differ from PyTorch's by {difference:.2g}")
    return difference.item(), correct / len(test)


def _latency(run: Callable[[Tensor], Tensor], test: Images | Files) -> dict[str, float]:
    """The seconds that a batch of 1 and of 256 takes: the median of many."""
    found = {}
    for size in LATENCIES:
        (batch, *_) = test.batches(torch.arange(size).remainder(len(test)).unsqueeze(0), size)
        images, taken = batch.images[0].cpu(), []
        while len(taken) <= ROUNDS or sum(taken) < SECONDS:
            start = time.perf_counter()
            run(images)
            taken.append(time.perf_counter() - start)
        found[str(size)] = statistics.median(taken[1:])  # the first warms up
    return found


def _written(
    folder: Path, name: str, content: bytes, checked: tuple[float, float], notes: Sequence[str] = ()
) -> Exported:
    files.write_bytes(folder / name, content)
    return Exported({name: len(content)}, *checked, notes)


def _said(about: About) -> dict[str, Any]:
    """What a file says beside its network."""
    classes = {} if about.classes is None else {"classes": list(about.classes)}
    return {**classes, "input_shape": list(about.input_shape)}


# --- PyTorch and ONNX ------------------------------------------------------------------------------------------------


def _traced(raw: Raw) -> torch.export.ExportedProgram:
    """The network as PyTorch's own graph, for batches of any size."""
    return torch.export.export(raw, (raw.example(),), dynamic_shapes=({0: torch.export.Dim(BATCH)},))


def _without_traces(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A graph that does not say in which lines of which files its functions stood."""
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)
    return traced


def _onnx(raw: Raw, opset: int) -> bytes:
    """The bytes of a checked ONNX file; of a network in integers, with the operators that quantize for runtimes."""
    from onnx import checker, helper

    if is_quantized(raw.network.program):
        raw = copy.deepcopy(raw)
        raw.network = Network(with_integers(raw.program()), functions=partial(_in_onnx, opset=opset)).eval()

    else:
        raw = copy.deepcopy(raw)
        raw.network = _spread(raw)

    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    model = torch.onnx.export(_traced(raw), dynamo=True, opset_version=opset, verbose=False, **names).model_proto
    properties = {name: json.dumps(value, ensure_ascii=False) for name, value in _said(raw.about).items()}
    helper.set_model_props(model, properties)
    _rename(model.graph, raw.network)
    model.producer_name = "sparsity"
    content = model.SerializeToString(deterministic=True)
    checker.check_model(content, full_check=True)
    return content


PRICE = 100  # products that a runtime computes in the time of selecting one number; onnxruntime about twice as many


def _spread(raw: Raw) -> Network:
    """The network whose linear layers take all inputs, with zeros for the dead ones, where selecting takes longer.

    Of each image a selection of k inputs costs PRICE · k products, and saves m for each other input of a layer of m
    outputs.
    """
    program, sizes = raw.program(), _sizes(raw)
    uses = Counter(leaf for call in program.calls for leaf in (*leaves(call), program.output))
    selections = {Ref(call.outs[0]): call for call in program.calls if call.name == "gather"}
    calls, tensors = [], dict(program.tensors)
    for call in program.calls:
        selection = selections.get(call.args[0]) if call.name == "linear" else None
        if (
            selection is not None
            and len(sizes[selection.args[0]]) == 2
            and uses[call.args[0]] == uses[call.args[1]] == 1
        ):
            (inputs, _, index), name = selection.args, call.args[1].name
            weight, kept, width = tensors[name], program.tensors[index.name], sizes[inputs][1]
            if (width - len(kept)) * len(weight) < PRICE * len(kept):
                tensors[name] = weight.new_zeros(len(weight), width).index_copy(1, kept, weight)
                call = replace(call, args=(inputs, *call.args[1:]))
        calls.append(call)
    found = Network(Program(calls, tensors, program.output).pruned()).eval()
    found.about = raw.network.about
    return found


def _sizes(raw: Raw) -> dict[Ref, torch.Size]:
    """The shape of what each selection of a network is of."""
    network, images = Network(raw.program()).eval(), raw.scaled(raw.example())
    network.watched = {call.args[0].number: None for call in network.program.calls if call.name == "gather"}
    with torch.no_grad():
        network(images)
    network.watched[0] = images
    return {Ref(number): tensor.shape for number, tensor in network.watched.items()}


def _in_onnx(call: Call, opset: int) -> Callable[..., Any]:
    """What writes a call down for ONNX, where it has an operator that PyTorch has none for."""

    def operator(name: str, given: Sequence[Tensor], dtype: torch.dtype, **attributes: int) -> Tensor:
        shape = given[0].shape
        return torch.onnx.ops.symbolic(name, given, attributes, dtype=dtype, shape=shape, version=opset)

    def rounded(inputs: Tensor, step: float, zero: float) -> Tensor:
        by = torch.tensor(step), torch.tensor(zero, dtype=torch.uint8)
        whole = operator("QuantizeLinear", (inputs, *by), torch.uint8)
        return operator("DequantizeLinear", (whole, *by), torch.float32)

    def dequantized(codes: Tensor, scales: Tensor, axis: int) -> Tensor:
        zeros = torch.zeros(scales.shape, dtype=codes.dtype)  # which runtimes look for before they take integers
        return operator("DequantizeLinear", (codes, scales, zeros), torch.float32, axis=axis)

    return {ROUNDED: rounded, DEQUANTIZED: dequantized}.get(call.name) or function_of(call)


def _rename(graph: Any, network: Network) -> None:
    """Gives tensors and the batch the names that users know, and takes out where each node was written."""
    taken = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    names = {f"network.{place}": name for name, place in network.places.items() if name not in taken}
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == batch:
                size.dim_param = BATCH
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        del tensor.metadata_props[:]
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        del node.metadata_props[:]
    del graph.metadata_props[:]


def _onnxruntime(content: bytes) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX file on the CPU, in as many threads as PyTorch."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
