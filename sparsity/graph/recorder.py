"""The units of a network, read off one recorded pass: every function that torch computes says what it does to slots.

A tensor of the pass has labels: the slot of each entry, kept with length 1 along the axes that slots do not depend on.
Functions that move entries about move the labels alike, so that channels are followed through any view, split,
concatenation or shuffle. What a function is not known to do freezes the slots that it is given.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from sparsity.graph.units import (
    ANYTHING,
    NOTHING,
    Entry,
    Join,
    LayerUse,
    Link,
    Matmul,
    Node,
    Product,
    Role,
    Scale,
    Units,
    one_thread,
)

# fmt: off
# Functions of each entry that make 0 of 0.
KEEP_ZERO = frozenset((
    "relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "tanh", "abs", "neg", "sqrt", "square", "sign",
    "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh", "erf", "expm1", "log1p", "floor", "ceil", "round", "trunc",
    "clone", "contiguous", "detach", "alias", "_to_copy", "softshrink", "hardshrink", "nan_to_num", "lift_fresh",
    "positive", "_prelu_kernel", "rrelu_with_noise", "lift", "copy", "frac", "sgn", "celu",
))
# Functions of each entry that make something else of 0.
FORGET_ZERO = frozenset((
    "sigmoid", "hardsigmoid", "exp", "exp2", "softplus", "log_sigmoid_forward", "cos", "cosh", "log", "log2", "log10",
    "reciprocal", "rsqrt", "erfc", "logit", "rsub", "acos", "isnan", "bernoulli",
))
SUMS = frozenset(("add", "sub", "maximum", "minimum", "fmax", "fmin"))
FACTORS = frozenset(("mul", "div"))
# Functions that move entries.
MOVES = frozenset((
    "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes",
    "unbind", "flip", "roll", "repeat", "index", "_unsafe_index", "index_select", "unfold", "diagonal", "unsafe_split",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "movedim", "narrow", "chunk",
))
VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"))
REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod",
    "var_mean", "std_mean", "nansum",
))
NORMS = frozenset((
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm",
))
CONVOLUTIONS = frozenset(("convolution", "_convolution"))
ATTENTIONS = frozenset((
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
))
ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
# Functions that tell sizes or make new tensors: they read no channels.
SILENT = frozenset((
    "empty", "empty_like", "new_empty", "ones_like", "new_ones", "full_like", "new_full", "rand_like", "randn_like",
    "_fused_sdp_choice", "is_same_size", "new_empty_strided", "empty_strided",
))
SPATIAL = ("max_pool", "avg_pool", "upsample", "reflection_pad", "replication_pad", "_adaptive", "adaptive", "mkldnn")
# fmt: on

# torch's own counter of operations knows attention's kernels for GPUs, and takes the one for CPUs to be free
if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:

    @register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    def _attention_on_cpu(queries: Any, keys: Any, values: Any, *more: Any, **shapes: Any) -> int:
        """The operations of both products."""
        return sdpa_flop_count(queries, keys, values)


def record(module: nn.Module, images: Tensor) -> Units:
    """The units of a module in evaluation, from one pass over images [batch, *shape]; MACs are those of the batch."""
    with torch.no_grad(), one_thread(), _without_fast_attention():
        recorder = _Recorder(module, images)
        with recorder:
            outputs = module.eval()(images)
        return recorder.units(outputs)


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """Attention op by op: the fast path is one function that says nothing of what it does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class _Held:
    """A parameter or buffer, or what is made of one alone: for each entry its place along each axis of it."""

    name: str
    sizes: tuple[int, ...]
    places: tuple[Tensor, ...]  # one for each axis, of length 1 along the axes that it does not depend on
    exact: bool = True  # whether entries are those of the parameter itself


_Value = Tensor | _Held | None  # labels; a parameter; or what no unit is known for


class _Recorder(TorchDispatchMode):
    """Watches the functions that torch computes in one pass, and keeps the labels of every tensor."""

    def __init__(self, module: nn.Module, images: Tensor):
        super().__init__()
        self.num_slots = 2
        self.nodes: list[Node] = []
        self.matmuls: list[Matmul] = []
        self.links: dict[tuple[str, int], tuple[Tensor, Role]] = {}
        self.same: list[tuple[Tensor, Tensor]] = []  # slots that can only be removed together
        self.heard: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.unknown: dict[str, None] = {}
        self.values: dict[Any, _Value] = {}
        self.by_storage: dict[int, set[Any]] = {}
        self.alive: list[Any] = [module, images]  # storages are only told apart while they live
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            sizes = tuple(tensor.shape)
            self._put(tensor, _Held(name, sizes, tuple(_along(a, n, len(sizes)) for a, n in enumerate(sizes))))
        pixels = self.pixels = self._new(images[0].numel())
        labels = pixels.view(1, *images.shape[1:])
        self._put(images, labels)
        self.nodes.append(Join(pixels, pixels[:0], pixels[:0], always=True))

    # --- what is known of tensors ------------------------------------------------------------------------------------

    def _put(self, tensor: Tensor, value: _Value) -> None:
        key = _key(tensor)
        self.values[key] = value
        self.by_storage.setdefault(key[0], set()).add(key)

    def _of(self, tensor: Any) -> _Value:
        return self.values.get(_key(tensor)) if isinstance(tensor, Tensor) else None

    def _new(self, count: int) -> Tensor:
        first, self.num_slots = self.num_slots, self.num_slots + count
        return torch.arange(first, self.num_slots)

    def _tie(self, ones: Tensor, others: Tensor) -> None:
        """Slots that can only be removed together; what is tied to what is never removed is not either."""
        ones, others = torch.broadcast_tensors(ones, others)
        ones, others = ones.flatten(), others.flatten()
        told = (ones > ANYTHING) & (others > ANYTHING)
        self.same.append((ones[told], others[told]))
        self._pin(ones[others == ANYTHING])
        self._pin(others[ones == ANYTHING])

    def _pin(self, labels: Tensor) -> None:
        """Slots that are heard whatever the weights are."""
        found = labels.unique()
        self.heard.append(found[found > ANYTHING])

    def _freeze(self, labels: Tensor, function: str) -> None:
        """Slots of which it is not known what a function does with them."""
        found = labels.unique()
        found = found[found > ANYTHING]
        if len(found):
            self.frozen.append(found)
            self.heard.append(found)
            self.unknown[function] = None

    def _link(self, entry: Entry, slots: Tensor, role: Role) -> None:
        """Notes which slots the entries of a parameter are of; those of one entry are tied."""
        key = entry.name, entry.axis
        slots = torch.where(slots > ANYTHING, slots, NOTHING)
        if key not in self.links:
            self.links[key] = torch.zeros(entry.size, dtype=torch.long), role
        known = self.links[key][0]
        before = known[entry.index]
        known[entry.index] = torch.where(slots > ANYTHING, slots, before)
        for others in (before, known[entry.index]):
            self.same.append((slots[(slots > 1) & (others > 1)], others[(slots > 1) & (others > 1)]))

    def units(self, outputs: Any) -> Units:
        """What the pass came to."""
        found = [self._of(tensor) for tensor in tree_leaves(outputs)]
        labels = [each.unique() for each in found if isinstance(each, Tensor)]
        ends = _cat(labels)
        ends = ends[ends > ANYTHING]
        of = self._numbered()
        return Units(
            of=of,
            nodes=self.nodes,
            links=[Link(name, axis, of[slots], role) for (name, axis), (slots, role) in self.links.items()],
            matmuls=self.matmuls,
            heard=_cat([*self.heard, ends]).unique(),
            outputs=ends,
            inputs=self.pixels,
            frozen=_cat(self.frozen).unique(),
            unknown=tuple(self.unknown),
        )

    def _numbered(self) -> Tensor:
        """The unit of each slot: the parts that ties connect, numbered from 1."""
        root = _connected(self.num_slots, self.same)
        found = torch.zeros(self.num_slots, dtype=torch.long)
        found[2:] = root[2:].unique(return_inverse=True)[1] + 1
        return found

    # --- functions ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.ops.prim.device.default:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = function._schema.name.rpartition("::")[2]
        changed = args[0] if name.endswith("_") and not name.endswith("__") and args else None
        before = self._of(changed)
        result = function(*args, **kwargs)
        self.alive.append((args, kwargs, result))
        name = name.removesuffix("_") if changed is not None else name
        self._note(name, function, args, kwargs, result, changed, before)
        return result

    def _note(
        self, name: str, function: Any, args: Any, kwargs: Any, result: Any, changed: Tensor | None, before: _Value
    ) -> None:
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        values = [self._of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not results or name in SILENT:
            if results:
                self._put(results[0], None)
            return
        if not any(value is not None for value in values) and name not in ZEROS:
            found: Any = self._untracked(name, args, results)
        else:
            found = self._made(name, function, args, kwargs, results)
        each = found if isinstance(found, (list, tuple)) else [found] + [None] * (len(results) - 1)
        if changed is not None:
            self._forget_views(changed, before, each[0], name)
        for tensor, value in zip(results, each):
            self._put(tensor, value)

    def _forget_views(self, changed: Tensor, before: _Value, after: _Value, name: str) -> None:
        """What is changed in place is changed under all of its views: what they were is not known any more."""
        if before is after or (isinstance(before, Tensor) and isinstance(after, Tensor) and torch.equal(before, after)):
            return
        own = _key(changed)
        for key in self.by_storage.get(own[0], set()) - {own}:
            value = self.values.get(key)
            if isinstance(value, Tensor):
                self._freeze(value, name)
            self.values[key] = None
        if changed.untyped_storage().nbytes() != changed.numel() * changed.element_size() and isinstance(after, Tensor):
            self._freeze(after, name)  # a part of a tensor, of which the rest is told nothing

    def _untracked(self, name: str, args: Any, results: list[Tensor]) -> _Value:
        """Products of constants cost what they cost."""
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left = args[-2] if name in ("mm", "bmm") else args[1]
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), results[0].numel() * left.shape[-1]))
        elif name in CONVOLUTIONS:
            self._convolution(args, results[0])
        elif name in ATTENTIONS:
            self._attention(args, results[0])
        return None

    def _made(self, name: str, function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Any:
        result, first = results[0], self._of(args[0]) if args else None
        if name == "as_strided" and result is args[0]:
            return first
        if name in VIEWS:
            return self._viewed(first, args[0], result)
        if name in MOVES:
            return self._moved(name, function, args, kwargs, first)
        if name in ("cat", "stack"):
            return self._joined(args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0), name, result)
        if name in ZEROS:
            return torch.full((1,) * result.ndim, NOTHING)
        if name in ("copy", "fill", "zero", "set_data"):
            return (
                self._of(args[1])
                if name == "copy" and len(args) > 1 and args[1].shape == result.shape
                else (torch.full((1,) * result.ndim, NOTHING) if name == "zero" else None)
            )
        if name == "constant_pad_nd":
            return self._padded(first, args, result)
        if name == "embedding":
            return self._embedded(args, result)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            return self._multiplied(name, args, result)
        if name in CONVOLUTIONS:
            return self._convolution(args, result)
        if name in ATTENTIONS:
            return self._attention(args, result)
        if isinstance(first, _Held) and not any(isinstance(self._of(t), Tensor) for t in tree_leaves((args, kwargs))):
            return self._of_parameters(name, args, result)
        if name in SUMS | FACTORS | {"pow", "clamp", "clamp_min", "clamp_max", "hardtanh", "where", "masked_fill"}:
            return self._elementwise(name, args, kwargs, result)
        if not isinstance(first, Tensor):
            return self._give_up(name, args, kwargs)
        if name == "_prelu_kernel":
            slopes = self._of(args[1])
            return self._scaled(first, args[0].shape, belongs=slopes if isinstance(slopes, _Held) else None)
        if name in KEEP_ZERO:
            return [first] + [None] * (len(results) - 1)
        if name == "native_dropout":
            return [first, None]
        if name in FORGET_ZERO:
            return self._constant(first)
        if name in REDUCTIONS:
            return self._reduced(name, first, args, kwargs, results)
        if name in ("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum"):
            return self._constant(self._mixed(first, args[0], (args[1] % args[0].ndim,), name))
        if name in NORMS:
            return self._batch_norm(first, args, results)
        if name == "native_layer_norm" or name == "_fused_rms_norm" or name == "rms_norm":
            return self._layer_norm(first, args, results)
        if name == "native_group_norm":
            return self._group_norm(first, args, results)
        if name.startswith(SPATIAL):
            return self._pooled(name, first, results)
        return self._give_up(name, args, kwargs)

    def _give_up(self, name: str, args: Any, kwargs: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            value = self._of(leaf)
            if isinstance(value, Tensor):
                self._freeze(value, name)

    # --- moving entries ----------------------------------------------------------------------------------------------

    def _moved(self, name: str, function: Any, args: Any, kwargs: Any, first: _Value) -> Any:
        """The same done to the labels."""

        def move(labels: Tensor) -> Any:
            found = function(labels.expand(args[0].shape), *args[1:], **kwargs)
            return tree_map(_compressed, found)

        if isinstance(first, Tensor):
            if name == "pixel_shuffle":  # a pixel's parts go together
                parts = first.expand(1, args[0].shape[1], *first.shape[2:]).unflatten(1, (-1, args[1] ** 2))
                self._tie(parts, parts[:, :, :1])
            return move(first)
        if not isinstance(first, _Held):
            return None
        places = [move(place) for place in first.places]
        if places and isinstance(places[0], (list, tuple)):
            return [_Held(first.name, first.sizes, each, first.exact) for each in zip(*places)]
        return _Held(first.name, first.sizes, tuple(places), first.exact)

    def _viewed(self, value: _Value, tensor: Tensor, result: Tensor) -> _Value:
        if isinstance(value, _Held):
            places = tuple(_reshaped(place, tensor.shape, result.shape) for place in value.places)
            return _Held(value.name, value.sizes, places, value.exact)
        if value is None:
            return None
        found = _reshaped(value, tensor.shape, result.shape)
        if 1 < len(_varying(value)) > len(_varying(found)) and int(value.max()) > int(self.pixels[-1]):
            self._square(value)
        return found

    def _square(self, labels: Tensor) -> None:
        """Where axes of slots become one, only whole rows or whole columns can go: ties what is not tied so yet."""
        axes = _varying(labels)
        rows = labels.movedim(axes, tuple(range(len(axes)))).reshape(labels.shape[axes[0]], -1)
        for axis in range(len(axes)):
            lines = labels.squeeze().movedim(axis, 0).flatten(1)
            root = _connected(self.num_slots, self.same)[lines]
            if bool((root == root[:, :1]).all()):
                return
        shorter = min((0, 1), key=lambda axis: rows.shape[axis])
        rows = rows if shorter == 0 else rows.T
        self._tie(rows, rows[:1])

    def _joined(self, tensors: Sequence[Tensor], dim: int, name: str, result: Tensor) -> _Value:
        """Concatenated slots; where they lie along another axis, the pieces are of the same channels."""
        dim %= result.ndim
        pieces = []
        for tensor in tensors:
            if name == "stack":
                tensor = tensor.unsqueeze(dim)
            if tensor.numel() == 0:
                continue
            value = self._of(tensors[len(pieces)]) if name == "stack" else self._of(tensor)
            if isinstance(value, _Held):
                value = self._activated(value)
            if value is None:
                value = torch.full((1,) * tensor.ndim, ANYTHING)
            elif name == "stack":
                value = value.unsqueeze(dim)
            pieces.append(value.expand(tensor.shape))
        found = _compressed(torch.cat(pieces, dim))
        if found.shape[dim] > 1 and len(_varying(found)) > 1:
            return self._merged(found, (dim,))
        return found

    def _padded(self, value: _Value, args: Any, result: Tensor) -> _Value:
        if not isinstance(value, Tensor):
            return None
        filling = args[2] if len(args) > 2 else 0
        pairs = [args[1][index : index + 2] for index in range(0, len(args[1]), 2)]
        padded = [value.ndim - 1 - index for index, pair in enumerate(pairs) if any(pair)]
        if all(value.shape[axis] == 1 for axis in padded):
            return value if filling == 0 else self._constant(value)
        whole = value.expand(args[0].shape)
        return _compressed(torch.constant_pad_nd(whole, args[1], NOTHING if filling == 0 else ANYTHING))

    def _embedded(self, args: Any, result: Tensor) -> _Value:
        table = self._of(args[0])
        if not isinstance(table, _Held) or len(table.sizes) != 2:
            return None
        rows = args[1].cpu().unsqueeze(-1)
        return _Held(table.name, table.sizes, (rows, _along(result.ndim - 1, table.sizes[1], result.ndim)), table.exact)

    # --- entry by entry ----------------------------------------------------------------------------------------------

    def _of_parameters(self, name: str, args: Any, result: Tensor) -> _Value:
        """What is computed of parameters alone keeps its places where it is computed entry by entry of one."""
        held = [value for value in map(self._of, args) if isinstance(value, _Held)]
        if len(held) != 1 or held[0] is not self._of(args[0]) or result.shape != args[0].shape:
            return None
        if name in KEEP_ZERO | FORGET_ZERO | SUMS | FACTORS | {"clamp", "clamp_min", "clamp_max", "pow"}:
            same = name in ("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh")
            return _Held(held[0].name, held[0].sizes, held[0].places, held[0].exact and same)
        return None

    def _elementwise(self, name: str, args: Any, kwargs: Any, result: Tensor) -> _Value:
        """A function of one or two tensors, entry by entry."""
        operands = [arg for arg in args if isinstance(arg, Tensor)]
        if name in ("where", "masked_fill"):
            operands = [t for t in operands if t.dtype is not torch.bool or isinstance(self._of(t), Tensor)]
        values = [self._of(tensor) for tensor in operands]
        labelled = [(v, t) for v, t in zip(values, operands) if isinstance(v, Tensor)]
        if not labelled or any(tensor.dtype is torch.bool for _, tensor in labelled):
            return self._give_up(name, args, kwargs)
        labels = _wide(labelled[0][0], result.ndim)
        for other in (t for t in args if isinstance(t, Tensor) and not isinstance(self._of(t), (Tensor, _Held))):
            labels = self._beside_constant(labels, other, name)
        if len(labelled) == 2:
            return self._both(labels, _wide(labelled[1][0], result.ndim), name in FACTORS and name != "div")
        held = [value for value in values if isinstance(value, _Held)]
        if held:
            place = _Held(
                held[0].name, held[0].sizes, tuple(_wide(p, result.ndim) for p in held[0].places), held[0].exact
            )
            if name == "div" and values[0] is held[0]:
                return self._constant(self._scaled(labels, result.shape, belongs=place))
            kind = {"mul": "factor", "div": "belongs"}.get(name, "shift")
            return self._scaled(labels, result.shape, **{kind: place})
        first = isinstance(self._of(args[0]), Tensor)
        numbers = [
            arg for arg in (*args[1:], *kwargs.values()) if isinstance(arg, (int, float)) and not isinstance(arg, bool)
        ]
        if _keeps_zero(name, first, args, kwargs, numbers):
            return labels
        return self._constant(labels)

    def _beside_constant(self, labels: Tensor, other: Tensor, name: str) -> Tensor:
        """Labels beside a constant tensor, which cannot be cut along the axes of slots."""
        shape = (1,) * (labels.ndim - other.ndim) + tuple(other.shape)
        if any(shape[axis] > 1 for axis in _varying(labels)):
            self._freeze(labels, name)
        return labels

    def _both(self, left: Tensor, right: Tensor, is_product: bool) -> Tensor:
        """The slots of a sum or a product of two; those that meet are tied."""
        left, right = torch.broadcast_tensors(left, right)
        if torch.equal(left, right):
            return left.clone()
        codes, inverse = (left * self.num_slots + right).unique(return_inverse=True)
        ones, others = codes // self.num_slots, codes % self.num_slots
        outs = self._new(len(codes))
        self._tie(ones, others)
        self._tie(outs, torch.where(ones > ANYTHING, ones, others))
        if is_product:
            self.nodes.append(Product(outs, ones, others))
        else:
            targets = torch.arange(len(outs))
            self.nodes.append(Join(outs, torch.cat([ones, others]), torch.cat([targets, targets])))
        return outs[inverse]

    def _constant(self, labels: Tensor) -> Tensor:
        """Slots that speak whatever they are made of."""
        return self._each(labels, always=True)

    def _each(self, labels: Tensor, always: bool = False) -> Tensor:
        """A slot behind each slot."""
        slots, inverse = labels.unique(return_inverse=True)
        outs = self._new(len(slots))
        self._tie(outs, slots)
        self.nodes.append(Join(outs, slots, torch.arange(len(slots)), always=always))
        return outs[inverse]

    def _scaled(
        self,
        labels: Tensor,
        shape: Sequence[int],
        factor: _Held | None = None,
        shift: _Held | None = None,
        offset: _Held | None = None,
        belongs: _Held | None = None,
        always: bool = False,
    ) -> Tensor:
        """Slots that a parameter scales or shifts, and the parameter's entries with them."""
        given = {"factor": factor, "shift": shift, "offset": offset, "belongs": belongs}
        axes = {key: self._beside(labels, held) for key, held in given.items() if held is not None}
        columns = [labels] + [held.places[axes[key]] for key, held in given.items() if axes.get(key) is not None]
        columns = torch.broadcast_tensors(*columns)
        codes = columns[0]
        for column in columns[1:]:
            codes = codes * (int(column.max()) + 1) + column
        codes, inverse = codes.unique(return_inverse=True)
        first = torch.zeros(len(codes), dtype=torch.long)
        first[inverse.flatten()] = torch.arange(inverse.numel())
        ins = columns[0].flatten()[first]
        outs = self._new(len(codes))
        self._tie(outs, ins)
        entries: dict[str, Entry] = {}
        loud = always
        place = 1
        for key, held in given.items():
            if held is None:
                continue
            if axes[key] is None:
                loud = loud or key in ("shift", "offset")
                continue
            entry = Entry(held.name, axes[key], columns[place].flatten()[first], held.sizes[axes[key]])
            place += 1
            self._link(entry, outs, "writes" if key == "shift" and factor is None and not always else "scales")
            if held.exact:
                entries[key] = entry
            else:
                loud = loud or key in ("shift", "offset")
        self.nodes.append(Scale(ins, outs, always=loud, **entries))
        return outs[inverse]

    def _beside(self, labels: Tensor, held: _Held) -> int | None:
        """The axis of a parameter whose entries each lie beside the slots of one unit; None: it has none."""
        varying = [axis for axis, size in enumerate(held.sizes) if size > 1 and held.places[axis].numel() > 1]
        crossing = []
        for axis in varying:
            place = held.places[axis]
            if not set(_varying(place)) & set(_varying(labels)):
                continue
            pairs = torch.broadcast_tensors(labels, place)
            codes = (pairs[1] * self.num_slots + pairs[0]).unique()
            if len(codes) == len((codes // self.num_slots).unique()):
                return axis
            crossing.append(axis)
        if len(crossing) == 1 and len(_varying(labels)) > 1:
            place, labels = torch.broadcast_tensors(held.places[crossing[0]], labels)
            first = torch.zeros(held.sizes[crossing[0]], dtype=torch.long)
            first[place.flatten()] = labels.flatten()
            self._tie(first[place], labels)
            return crossing[0]
        if crossing:
            self._freeze(labels, held.name)
        elif len(held.sizes) and not varying and _varying(labels):
            return None
        return None

    def _activated(self, held: _Held) -> Tensor:
        """A parameter that stands in the place of an activation, such as a class token: its entries are slots."""
        varying = [axis for axis, size in enumerate(held.sizes) if size > 1 and held.places[axis].numel() > 1]
        if not varying:
            return torch.full((1,) * (held.places[0].ndim if held.places else 0), ANYTHING)
        place = held.places[varying[-1]]
        labels = torch.full((1,) * place.ndim, NOTHING)
        index, inverse = place.unique(return_inverse=True)
        outs = self._new(len(index))
        entry = Entry(held.name, varying[-1], index, held.sizes[varying[-1]])
        self._link(entry, outs, "writes")
        self.nodes.append(
            Scale(torch.full_like(outs, NOTHING), outs, shift=entry if held.exact else None, always=not held.exact)
        )
        return outs[inverse].expand(torch.broadcast_shapes(labels.shape, place.shape))

    # --- along axes --------------------------------------------------------------------------------------------------

    def _merged(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """Labels of length 1 along axes: the slots there are of one channel, and are tied."""
        axes = [axis for axis in axes if labels.shape[axis] > 1]
        if not axes:
            return labels
        moved = labels.movedim(axes, list(range(-len(axes), 0)))
        rows = moved.flatten(-len(axes))
        shape, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
        outs = self._new(len(rows))
        targets = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
        pairs = torch.stack([targets.flatten(), rows.flatten()], 1).unique(dim=0)
        self._tie(outs[pairs[:, 0]], pairs[:, 1])
        self.nodes.append(Join(outs, pairs[:, 1], pairs[:, 0]))
        found = outs.view(shape)
        for axis in sorted(axes):
            found = found.unsqueeze(axis)
        return found

    def _mixed(self, labels: Tensor, tensor: Tensor, axes: Iterable[int], name: str) -> Tensor:
        """Labels along whose axes every entry depends on all: tied where others are apart, else heard."""
        axes = tuple(axis for axis in axes if labels.shape[axis] > 1)
        if not axes:
            return labels
        if len(_varying(labels)) > len(axes):
            return self._merged(labels, axes)
        self._pin(labels)
        return labels

    def _reduced(self, name: str, labels: Tensor, args: Any, kwargs: Any, results: list[Tensor]) -> Any:
        tensor, result = args[0], results[0]
        dims = kwargs.get("dim", None)
        if name in ("linalg_vector_norm", "norm"):
            dims = args[2] if len(args) > 2 else dims
        elif len(args) > 1 and not isinstance(args[1], (bool, torch.dtype)):
            dims = args[1]
        if dims is None or dims == []:
            dims = range(tensor.ndim)
        dims = [dims] if isinstance(dims, int) else list(dims)
        axes = sorted({dim % tensor.ndim for dim in dims})
        labels = self._mixed(labels, tensor, axes, name)
        if any(labels.shape[axis] > 1 for axis in axes):  # heard: what is left is of no channel
            return None
        if result.ndim < tensor.ndim:
            for axis in reversed(axes):
                labels = labels.squeeze(axis)
        labels = self._constant(labels) if name == "logsumexp" else labels
        return [labels] + [None] * (len(results) - 1)

    def _pooled(self, name: str, labels: Tensor, results: list[Tensor]) -> Any:
        digits = [int(before) for before, after in pairwise(name) if before.isdigit() and after == "d"]
        count = digits[-1] if digits else 2
        axes = range(labels.ndim - count, labels.ndim)
        return [self._merged(labels, axes)] + [None] * (len(results) - 1)

    def _batch_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        labels = self._merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        held = [self._of(arg) if isinstance(arg, Tensor) else None for arg in args[1:4]]
        names = ("factor", "shift", "offset")
        parts = {
            name: self._on_axis(value, 1, labels.ndim) for name, value in zip(names, held) if isinstance(value, _Held)
        }
        variance = self._of(args[4]) if len(args) > 4 and isinstance(args[4], Tensor) else None
        if isinstance(variance, _Held):
            parts["belongs"] = self._on_axis(variance, 1, labels.ndim)
        found = self._scaled(labels, results[0].shape, **parts)
        return [found] + [None] * (len(results) - 1)

    def _on_axis(self, held: _Held, axis: int, ndim: int) -> _Held:
        """A vector laid along an axis."""
        shape = [-1 if each == axis else 1 for each in range(ndim)]
        return _Held(held.name, held.sizes, tuple(place.view(shape) for place in held.places), held.exact)

    def _layer_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        tensor, count = args[0], len(args[1])
        axes = range(tensor.ndim - count, tensor.ndim)
        spread = any(labels.shape[axis] > 1 for axis in axes)
        labels = self._mixed(labels, tensor, axes, "layer_norm")
        if not spread or all(labels.shape[axis] == 1 for axis in axes):
            return [self._constant(labels)] + [None] * (len(results) - 1)
        parts = {}
        for key, arg in zip(("factor", "shift"), args[2:4]):
            value = self._of(arg) if isinstance(arg, Tensor) else None
            if isinstance(value, _Held):
                wide = tuple(_wide(place, tensor.ndim) for place in value.places)
                parts[key] = _Held(value.name, value.sizes, wide, value.exact)
        return [self._scaled(labels, tensor.shape, always=True, **parts)] + [None] * (len(results) - 1)

    def _group_norm(self, labels: Tensor, args: Any, results: list[Tensor]) -> Any:
        tensor, groups = args[0], args[6]
        labels = self._merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        parts = {}
        for key, arg in zip(("factor", "shift"), args[1:3]):
            value = self._of(arg) if isinstance(arg, Tensor) else None
            if isinstance(value, _Held):
                parts[key] = self._on_axis(value, 1, tensor.ndim)
        alone = groups == tensor.shape[1]
        if not alone:
            self._pin(labels)
        return [self._scaled(labels, tensor.shape, always=not alone, **parts)] + [None] * (len(results) - 1)

    # --- products ----------------------------------------------------------------------------------------------------

    def _convolution(self, args: Any, result: Tensor) -> _Value:
        tensor, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        held, labels = self._of(weight), self._of(tensor)
        positions = (tensor if transposed else result).shape[2:].numel() * len(tensor)
        size = weight.shape[2:].numel() * positions
        if isinstance(labels, _Held):
            labels = self._activated(labels)
        if not isinstance(held, _Held) or not held.exact or len(held.sizes) != weight.ndim:
            if isinstance(labels, Tensor):
                self._freeze(labels, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), weight.numel() * positions))
            return None
        labels = torch.full((1,) * tensor.ndim, ANYTHING) if labels is None else labels
        labels = self._merged(labels, [axis for axis in range(labels.ndim) if axis != 1])
        ins = labels.expand(1, tensor.shape[1], *[1] * (tensor.ndim - 2)).flatten()
        outs = self._new(result.shape[1])
        rows, columns = (int(transposed), int(not transposed))
        entries = [Entry(held.name, axis, torch.arange(held.sizes[axis]), held.sizes[axis]) for axis in (rows, columns)]
        shift = self._shift(bias, outs)
        self.nodes.append(LayerUse(held.name, *entries, ins, outs, shift, groups, size))
        self._link_layer(self.nodes[-1])
        return outs.view(1, -1, *[1] * (result.ndim - 2))

    def _shift(self, bias: Any, outs: Tensor) -> Entry | None:
        """The bias of a layer's outputs."""
        held = self._of(bias) if isinstance(bias, Tensor) else None
        if not isinstance(held, _Held):
            return None
        axis = next((a for a, place in enumerate(held.places) if place.numel() == len(outs)), None)
        if axis is None or not held.exact:
            return None
        return Entry(held.name, axis, held.places[axis].flatten(), held.sizes[axis])

    def _link_layer(self, layer: LayerUse) -> None:
        if layer.groups == 1:
            self._link(layer.rows, layer.outs, "writes")
            self._link(layer.columns, layer.ins, "reads")
        else:
            whole, slots = (layer.rows, layer.outs) if layer.rows.axis == 0 else (layer.columns, layer.ins)
            self._link(whole, slots, "scales" if layer.is_depthwise else "writes")
            ins, outs = layer.ins.view(layer.groups, -1), layer.outs.view(layer.groups, -1)
            self._tie(ins, ins[:, :1])
            self._tie(outs, ins[:, :1])
        if layer.bias is not None:
            self._link(layer.bias, layer.outs, "scales" if layer.is_depthwise else "writes")

    def _multiplied(self, name: str, args: Any, result: Tensor) -> _Value:
        """A product of matrices: a layer where one of them is a parameter."""
        added, (left, right) = (None, args[:2]) if name in ("mm", "bmm") else (args[0], args[1:3])
        if name == "bmm" or name == "baddbmm":
            found = self._batch_multiplied(left, right, result)
        else:
            found = self._layer(left, right, added, result)
            if found is not NotImplemented:
                return found
            found = self._batch_multiplied(
                left.unsqueeze(0), right.unsqueeze(0), result.unsqueeze(0), self._of(left), self._of(right)
            )
            found = found.squeeze(0) if isinstance(found, Tensor) else found
        if added is not None and isinstance(found, Tensor):
            value = self._of(added)
            if isinstance(value, _Held):
                wide = tuple(_wide(place, result.ndim) for place in value.places)
                return self._scaled(found, result.shape, shift=_Held(value.name, value.sizes, wide, value.exact))
            if isinstance(value, Tensor):
                return self._both(found, _wide(value, result.ndim), False)
            return self._constant(self._beside_constant(found, added, name))
        return found

    def _layer(self, left: Tensor, right: Tensor, added: Any, result: Tensor) -> Any:
        """left · right + added, of matrices, as a layer; NotImplemented where neither or both are parameters."""
        one, other = self._of(left), self._of(right)
        if isinstance(one, _Held) == isinstance(other, _Held):
            return NotImplemented
        if isinstance(one, _Held):  # the same, transposed
            one, other = other, _Held(one.name, one.sizes, tuple(p.T for p in one.places), one.exact)
            labels = one if one is None else one.T
            (count, num_ins), num_outs, swapped = right.T.shape, left.shape[0], True
        else:
            labels, (count, num_ins), num_outs, swapped = one, left.shape, right.shape[1], False
        axes = _matrix_axes(other, num_ins, num_outs)
        if axes is None or not other.exact:
            if isinstance(labels, Tensor):
                self._freeze(labels, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), count * num_ins * num_outs))
            return None
        labels = torch.full((1, 1), ANYTHING) if labels is None else labels
        repeats = None
        if labels.shape[0] > 1 and labels.shape[1] == 1:  # the product is along another axis than that of the channels
            return self._along_positions(labels, other, axes, (count, num_ins, num_outs), added, swapped)
        ins = self._merged(labels, (0,)).expand(1, num_ins).flatten()
        outs = self._new(num_outs)
        column, row = axes
        entries = [
            Entry(other.name, axis, other.places[axis].flatten().expand(length), other.sizes[axis])
            for axis, length in ((row, num_outs), (column, num_ins))
        ]
        bias = self._shift(added, outs)
        self.nodes.append(LayerUse(other.name, *entries, ins, outs, bias, 1, count, repeats))
        self._link_layer(self.nodes[-1])
        found = outs.view(1, -1)
        if added is not None and bias is None:
            value = self._of(added)
            found = self._both(found, _wide(value, 2), False) if isinstance(value, Tensor) else self._constant(found)
        return found.T if swapped else found

    def _along_positions(
        self, labels: Tensor, held: _Held, axes: tuple[int, int], sizes: tuple[int, int, int], added: Any, swapped: bool
    ) -> Tensor:
        """A product over positions, channel by channel, such as of a mixer's tokens: its cost goes with channels."""
        _, num_ins, num_outs = sizes
        column, row = axes
        anything = torch.tensor([ANYTHING])
        entries = [
            Entry(held.name, axis, held.places[axis].flatten().expand(length), held.sizes[axis])
            for axis, length in ((row, num_outs), (column, num_ins))
        ]
        slots = labels.flatten()
        # positions are no units: the layer's own ins and outs are never removed, its repeats are
        self.nodes.append(
            LayerUse(held.name, *entries, anything.expand(num_ins), self._unheard(num_outs), None, 1, 1, slots)
        )
        found = self._each(labels, always=added is not None)
        return found.T if swapped else found

    def _unheard(self, count: int) -> Tensor:
        """Slots of positions, which are heard and of no unit that could go."""
        slots = self._new(count)
        self._pin(slots)
        return slots

    def _batch_multiplied(self, left: Tensor, right: Tensor, result: Tensor, *values: _Value) -> _Value:
        """left [n, m, k] · right [n, k, p]: the slots of one n are tied, such as a head's queries, keys and values."""
        one, other = values or (self._of(left), self._of(right))
        count, _, inner = left.shape
        if isinstance(one, _Held) or isinstance(other, _Held):
            if count == 1:
                flat = [_squeezed(value) for value in (one, other)]
                found = self._flat_layer(left[0], right[0], flat, result[0])
                if found is not NotImplemented:
                    return found.unsqueeze(0) if isinstance(found, Tensor) else found
            one, other = (None if isinstance(value, _Held) else value for value in (one, other))
            if isinstance(one, Tensor) or isinstance(other, Tensor):
                self._freeze(one if isinstance(one, Tensor) else other, "a weight that is computed")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        if one is None or other is None:
            for value in (one, other):
                if isinstance(value, Tensor):
                    self._freeze(value, "a product with a constant")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        blocks = max(one.shape[0], other.shape[0])
        one = one.expand(blocks, *one.shape[1:])
        other = other.expand(blocks, *other.shape[1:])
        own, alike = _alike(torch.cat([one.flatten(1), other.flatten(1)], 1))
        one, other = one[own], other[own]
        wide, tall = other.shape[2] > 1, one.shape[1] > 1
        if wide and tall:
            self._freeze(one, "a product of channels with channels")
            self._freeze(other, "a product of channels with channels")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), result.numel() * inner))
            return None
        together = torch.cat([one.flatten(1), other.flatten(1)], 1)
        self._tie(together, together[:, :1])
        telling = (one if tall else other).movedim(1 if tall else 2, 1)  # [n, outs, sources]
        outs = self._new(telling.shape[0] * telling.shape[1]).view(telling.shape[:2])
        self._heads(outs, telling, (other if tall else one).flatten(1))
        size = result.numel() * inner // blocks
        self.matmuls.append(Matmul(together[alike, 0], size))
        outs = outs[alike]
        return _compressed(outs.unsqueeze(2) if tall else outs.unsqueeze(1))

    def _flat_layer(self, left: Tensor, right: Tensor, values: list[_Value], result: Tensor) -> Any:
        for tensor, value in zip((left, right), values):
            self._put(tensor, value)
        return self._layer(left, right, None, result)

    def _heads(self, outs: Tensor, telling: Tensor, listening: Tensor) -> None:
        """outs [n, outs] made of telling [n, outs, sources], and of listening [n, sources], which never silences."""
        number = torch.arange(outs.numel()).view_as(outs)
        targets = [number.unsqueeze(2).expand_as(telling).flatten()]
        targets.append(number.unsqueeze(2).expand(*outs.shape, listening.shape[1]).flatten())
        sources = [telling.flatten(), listening.unsqueeze(1).expand(*outs.shape, listening.shape[1]).flatten()]
        pairs = torch.cat([torch.stack([torch.cat(sources), torch.cat(targets)])])
        told = torch.arange(pairs.shape[1]) < telling.numel()
        self._tie(outs, listening[:, :1])
        self.nodes.append(Join(outs.flatten(), pairs[0], pairs[1], told))

    def _attention(self, args: Any, result: Tensor) -> _Value:
        """softmax(queries · keys) · values of [batch, heads, positions, depth]: a head is tied whole."""
        queries, keys, values = args[:3]
        batch, heads, rows, depth = queries.shape
        length, wide = values.shape[2:]
        size = rows * length * (depth + wide)
        labels = [self._of(tensor) for tensor in (queries, keys, values)]
        if not all(isinstance(each, Tensor) for each in labels):
            for each in labels:
                if isinstance(each, Tensor):
                    self._freeze(each, "attention")
            self.matmuls.append(Matmul(torch.tensor([NOTHING]), batch * heads * size))
            return None
        flat = []
        for each, tensor in zip(labels, (queries, keys, values)):
            each = each.expand(batch if each.shape[0] > 1 else 1, tensor.shape[1], *each.shape[2:])
            flat.append(each.repeat_interleave(heads // tensor.shape[1], 1))  # grouped queries share keys and values
        blocks = max(each.shape[0] for each in flat)
        flat = [each.expand(blocks, *each.shape[1:]).flatten(0, 1) for each in flat]
        together = torch.cat([each.flatten(1) for each in flat], 1)
        own, alike = _alike(together)
        together, flat = together[own], [each[own] for each in flat]
        self._tie(together, together[:, :1])
        telling = flat[2].transpose(1, 2)
        outs = self._new(telling.shape[0] * telling.shape[1]).view(telling.shape[:2])
        self._heads(outs, telling, torch.cat([each.flatten(1) for each in flat[:2]], 1))
        self.matmuls.append(Matmul(together[alike, 0], size * batch // blocks))
        return _compressed(outs[alike].view(blocks, heads, 1, -1))


def _keeps_zero(name: str, first: bool, args: Any, kwargs: Any, numbers: list[float]) -> bool:
    """Whether a function of slots and numbers, or constants, makes 0 of 0."""
    has_constant = any(isinstance(arg, Tensor) for arg in args[1:]) or (not first and isinstance(args[0], Tensor))
    if name == "mul" or (name == "div" and first):
        return True
    if name in ("add", "sub"):
        return not has_constant and all(number == 0 for number in numbers[:1])
    if name == "pow":
        return first and bool(numbers) and numbers[0] > 0
    if name in ("clamp", "hardtanh", "clamp_min", "clamp_max"):
        low, high = _bounds(name, args, kwargs)
        return low <= 0 <= high
    if name == "masked_fill":
        return bool(numbers) and numbers[-1] == 0
    return False


def _bounds(name: str, args: Any, kwargs: Any) -> tuple[float, float]:
    """Where clamp and its like cut off."""
    given = {"clamp": ("min", "max"), "hardtanh": ("min_val", "max_val"), "clamp_min": ("min",), "clamp_max": ("max",)}
    found = {"min": -math.inf, "max": math.inf}
    for position, key in enumerate(given[name], 1):
        value = args[position] if len(args) > position else kwargs.get(key)
        if name == "hardtanh" and value is None:
            value = -1.0 if key == "min_val" else 1.0
        if isinstance(value, (int, float)):
            found[key[:3]] = value
        elif isinstance(value, Tensor):
            return 1, 0
    return found["min"], found["max"]


def _key(tensor: Tensor) -> Any:
    """What tells tensors apart, and is the same for all views of the same entries."""
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))
    storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), strides, tensor.dtype


def _along(axis: int, size: int, ndim: int) -> Tensor:
    """0, 1, 2, … along one of some axes."""
    return torch.arange(size).view([size if each == axis else 1 for each in range(ndim)])


def _alike(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of rows that differ, and for each row which of them it is like."""
    _, inverse = rows[:, 0].unique(return_inverse=True)
    first = torch.zeros(int(inverse.max()) + 1, dtype=torch.long)
    first[inverse] = torch.arange(len(rows))
    if torch.equal(rows[first][inverse], rows):
        return first, inverse
    return torch.arange(len(rows)), torch.arange(len(rows))


def _wide(labels: Tensor, ndim: int) -> Tensor:
    """Labels with as many axes as what they are broadcast with."""
    return labels.view((1,) * (ndim - labels.ndim) + tuple(labels.shape))


def _varying(labels: Tensor) -> tuple[int, ...]:
    """The axes that labels depend on."""
    return tuple(axis for axis, size in enumerate(labels.shape) if size > 1)


def _compressed(labels: Any) -> Any:
    """Labels of length 1 along the axes that they do not depend on."""
    if not isinstance(labels, Tensor):
        return labels
    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    for axis, size in enumerate(labels.shape):
        if size > 1 and torch.equal(labels, (first := labels.narrow(axis, 0, 1)).expand_as(labels)):
            labels = first
    return labels


def _reshaped(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels as a view of a tensor of the shape `before` in the shape `after`."""
    axes = _varying(labels)
    if not axes:
        return labels.reshape((1,) * len(after))
    if len(axes) == 1:  # along one axis that stays: nothing need be laid out
        (axis,) = axes
        outer = math.prod(before[:axis])
        for place, size in enumerate(after):
            if size == before[axis] and math.prod(after[:place]) == outer:
                return labels.reshape([size if each == place else 1 for each in range(len(after))])
    return _compressed(labels.expand(tuple(before)).reshape(tuple(after)))


def _squeezed(value: _Value) -> _Value:
    """A value without its first axis, of length 1."""
    if isinstance(value, _Held):
        return _Held(value.name, value.sizes, tuple(place.squeeze(0) for place in value.places), value.exact)
    return value if value is None else value.squeeze(0)


def _matrix_axes(held: _Held, num_ins: int, num_outs: int) -> tuple[int, int] | None:
    """The axes of a parameter that lie along the rows and along the columns of a matrix; None if it has no such."""
    found: list[int | None] = [None, None]
    spare = []
    for axis, place in enumerate(held.places):
        varying = _varying(place)
        if len(varying) > 1:
            return None
        if varying:
            if found[varying[0]] is not None:
                return None
            found[varying[0]] = axis
        else:
            spare.append(axis)
    for side, size in enumerate((num_ins, num_outs)):
        if found[side] is None:
            if size != 1 or not spare:
                return None
            found[side] = spare.pop()
    return found[0], found[1]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *tensors])


def _connected(count: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of `count` numbers the smallest that the pairs connect it with."""
    ones, others = _cat([pair[0] for pair in pairs]), _cat([pair[1] for pair in pairs])
    root = torch.arange(count)
    while True:
        low = torch.minimum(root[ones], root[others])
        found = root.scatter_reduce(0, root[ones], low, "amin").scatter_reduce(0, root[others], low, "amin")
        while not torch.equal(found, jumped := found[found]):
            found = jumped
        if torch.equal(found, root):
            return root
        root = found
