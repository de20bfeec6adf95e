"""The units of a network, read off one recorded pass: every function that torch computes says what it does to slots.

Functions that move entries about move the labels alike, so that channels are followed through any view, split,
concatenation or shuffle. What a function is not known to do freezes the slots that it is given.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from sparsity.graph.functions import (
    ATTENTIONS,
    COMPARISONS,
    CONVOLUTIONS,
    FACTORS,
    FORGET_ZERO,
    KEEP_ZERO,
    MATRIX_PRODUCTS,
    MOVES,
    NORMS,
    OF_ENTRIES,
    REDUCTIONS,
    SILENT,
    SPATIAL,
    SUMS,
    VIEWS,
    ZEROS,
)
from sparsity.graph.products import Products
from sparsity.graph.slots import Held, Value, anything, key_of
from sparsity.graph.units import NOTHING, Matmul, Units, one_thread

# torch's own counter of operations knows attention's kernels for GPUs, and takes the one for CPUs to be free
if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:

    @register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    def _attention_on_cpu(queries: Any, keys: Any, values: Any, *more: Any, **shapes: Any) -> int:
        """The operations of both products."""
        return sdpa_flop_count(queries, keys, values)


def record(module: nn.Module, images: Tensor) -> Units:
    """The units of a module in evaluation, from one pass over images [batch, *shape]; MACs are those of the batch."""
    return recorded(module, images).units


def recorded(module: nn.Module, images: Tensor) -> "Recorder":
    """The same, with what each tensor of the pass is."""
    with torch.no_grad(), one_thread(), op_by_op():
        recorder = Recorder(module, images)
        with recorder:
            outputs = module.eval()(images)
        recorder.units = recorder.slots.units(outputs)
        return recorder


@contextlib.contextmanager
def op_by_op() -> Iterator[None]:
    """Attention, recurrent layers and circular padding op by op: as one function each says nothing of what it does."""
    libraries = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]  # their flags() sets, and warns of, more than this
    for library in libraries:
        library.enabled = False
    try:
        with attention_in_parts(), _PadsInParts():
            yield
    finally:
        for library, enabled in zip(libraries, before):
            library.enabled = enabled


class _PadsInParts(TorchFunctionMode):
    """Circular padding as a concatenation: torch writes it into slices of a new tensor, which hides its source."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant") if function is F.pad else None
        if mode != "circular":
            return function(*args, **kwargs)
        images, widths = args[0], kwargs.get("pad", args[1] if len(args) > 1 else ())
        for axis in range(len(widths) // 2):
            dim, (before, after) = images.ndim - 1 - axis, widths[2 * axis : 2 * axis + 2]
            size = images.shape[dim]
            if not (0 <= before <= size and 0 <= after <= size):  # torch's own words on what it does not pad
                return function(*args, **kwargs)
            parts = [images.narrow(dim, size - before, before), images, images.narrow(dim, 0, after)]
            images = torch.cat([part for part in parts if part.shape[dim]], dim)
        return images


@contextlib.contextmanager
def attention_in_parts() -> Iterator[None]:
    """Attention in evaluation as in training, so that gradients come back through it where members are mapped too."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def taken_apart(function: Any, args: Any, kwargs: Any) -> Any:
    """What a function of several gives, computed by these; NotImplemented for one that stands alone."""
    if function is torch.ops.aten.glu.default:
        first, second = args[0].chunk(2, args[1] if len(args) > 1 else -1)
        return first * second.sigmoid()
    return function.decompose(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Watches the functions that torch computes in one pass, each taken apart as far as it can be."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.ops.prim.device.default:
            with self:
                result = taken_apart(function, args, kwargs)
            if result is not NotImplemented:
                return result
        return self.compute(function, args, kwargs)

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives that is not made of others."""
        return function(*args, **kwargs)


class Recorder(Watch):
    """Watches the functions that torch computes in one pass, and keeps what they say of slots."""

    def __init__(self, module: nn.Module, images: Tensor):
        super().__init__()
        self.slots = Products(module, images)
        self.units = Units.none()  # until the pass is over

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives, once its results have their slots."""
        name = function._schema.name.rpartition("::")[2]
        changed = args[0] if name.endswith("_") and not name.endswith("__") and args else None
        before = self.slots.value_of(changed)
        result = function(*args, **kwargs)
        self.slots.alive.append((args, kwargs, result))
        name = name.removesuffix("_") if changed is not None else name
        self._note(name, function, args, kwargs, result, changed, before)
        self.saw(function, args, kwargs, result)
        return result

    def saw(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """What else there is to do with a function, once its results have their slots."""

    def _note(
        self, name: str, function: Any, args: Any, kwargs: Any, result: Any, changed: Tensor | None, before: Value
    ) -> None:
        """Keeps what a function's results are."""
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        values = [self.slots.value_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not results or name in SILENT:
            if results:
                self.slots.put(results[0], None)
            return
        if not any(value is not None for value in values) and name not in ZEROS:
            found: Any = self._untracked(name, args, results)
        else:
            found = self._made(name, function, args, kwargs, results)
        each = found if isinstance(found, (list, tuple)) else [found] + [None] * (len(results) - 1)
        if any(isinstance(value, Tensor) for value in values):  # what is made of slots is no constant
            each = [anything(tensor) if value is None else value for tensor, value in zip(results, each)]
        if changed is not None:
            self._forget_views(changed, before, each[0], name)
        for tensor, value in zip(results, each):
            self.slots.put(tensor, value)

    def _forget_views(self, changed: Tensor, before: Value, after: Value, name: str) -> None:
        """What is changed in place is changed under all of its views: what they were is not known any more."""
        if before is after or (isinstance(before, Tensor) and isinstance(after, Tensor) and torch.equal(before, after)):
            return
        own = key_of(changed)
        for key in self.slots.by_storage.get(own[0], set()) - {own}:
            value = self.slots.values.get(key)
            if isinstance(value, Tensor):
                self.slots.freeze(value, name)
            self.slots.values[key] = None
        if changed.untyped_storage().nbytes() != changed.numel() * changed.element_size() and isinstance(after, Tensor):
            self.slots.freeze(after, name)  # a part of a tensor, of which the rest is told nothing

    def _untracked(self, name: str, args: Any, results: list[Tensor]) -> Value:
        """Products of constants cost what they cost."""
        if name in MATRIX_PRODUCTS:
            left = args[-2] if name in ("mm", "bmm") else args[1]
            self.slots.matmuls.append(Matmul(torch.tensor([NOTHING]), results[0].numel() * left.shape[-1]))
        elif name in CONVOLUTIONS:
            self.slots.convolution(args, results[0])
        elif name in ATTENTIONS:
            self.slots.attention(args, results[0])
        return None

    def _made(self, name: str, function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Any:
        """The values of a function's results: of each, or of the first."""
        result, first = results[0], self.slots.value_of(args[0]) if args else None
        if name == "as_strided" and result is args[0]:
            return first
        if name in VIEWS:
            return self.slots.viewed(first, args[0], result)
        if name in MOVES:
            return self.slots.moved(name, function, args, kwargs, first)
        if name in ("cat", "stack"):
            return self.slots.joined(args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0), name, result)
        if name in ZEROS:
            return torch.full((1,) * result.ndim, NOTHING)
        if name == "zero":
            return torch.full((1,) * result.ndim, NOTHING)
        if name in ("copy", "fill"):
            return self.slots.value_of(args[1]) if args[1:] and args[1].shape == result.shape else None
        if name == "constant_pad_nd":
            return self.slots.padded(first, args, result)
        if name == "embedding":
            return self.slots.embedded(args, result)
        if name in MATRIX_PRODUCTS:
            return self.slots.multiplied(name, args, result)
        if name in CONVOLUTIONS:
            return self.slots.convolution(args, result)
        if name in ATTENTIONS:
            return self.slots.attention(args, result)
        if not any(isinstance(self.slots.value_of(leaf), Tensor) for leaf in tree_leaves((args, kwargs))):
            return self.slots.of_parameters(name, args, result)
        if name in ("where", "masked_fill"):
            return self.slots.chosen(name, args, kwargs, result)
        if name in SUMS | FACTORS | OF_ENTRIES | COMPARISONS:
            return self.slots.elementwise(name, args, kwargs, result)
        if not isinstance(first, Tensor):
            return self.slots.give_up(name, args, kwargs)
        if name == "_prelu_kernel":
            slopes = self.slots.value_of(args[1])
            return self.slots.scaled(first, args[0].shape, belongs=slopes if isinstance(slopes, Held) else None)
        if name in KEEP_ZERO:
            return [first] + [None] * (len(results) - 1)
        if name == "native_dropout":
            return [first, None]
        if name in FORGET_ZERO:
            return self.slots.constant(first)
        if name in REDUCTIONS:
            return self.slots.reduced(name, first, args, kwargs, results)
        if name in ("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum"):
            return self.slots.accumulated(first, args[1] % args[0].ndim)
        if name in NORMS:
            return self.slots.batch_norm(first, args, results)
        if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
            return self.slots.layer_norm(first, args, results)
        if name == "native_group_norm":
            return self.slots.group_norm(first, args, results)
        if name.startswith(SPATIAL):
            return self.slots.pooled(name, first, args, results)
        return self.slots.give_up(name, args, kwargs)
