"""A network as a list of functions and the tensors that they take: it runs, trains, and is written down as data."""

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from sparsity.graph.functions import is_known
from sparsity.graph.slots import Held, squeezed, varying
from sparsity.graph.tape import Batch, Call, Named, Ref, Tape
from sparsity.quantizing import in_steps
from sparsity.tensors import Tensors

ATTENTION = "scaled_dot_product_attention"
LEAVES = (Ref, Named, Batch)

# What runs a function that is kept under another name than torch's library has it.
RUNS: dict[str, Callable[..., Any]] = {
    "linear": F.linear,
    "convolution": torch.convolution,
    "batch_norm": lambda x, mean, variance, scale, shift, eps: F.batch_norm(x, mean, variance, scale, shift, eps=eps),
    "layer_norm": F.layer_norm,
    "group_norm": F.group_norm,
    "max_pool1d": F.max_pool1d,
    "max_pool2d": F.max_pool2d,
    "max_pool3d": F.max_pool3d,
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "reshape": torch.reshape,
    "expand": lambda x, sizes: x.expand(sizes),
    "gather": torch.index_select,
    "rounded": in_steps,
    "dequantized": lambda codes, scales, axis: codes * scales.view(-1, *[1] * (codes.ndim - 1 - axis)),
    ATTENTION: lambda q, k, v, mask, causal, scale: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """The functions of a network, in order, and its tensors; Ref(0) is the images, a batch of them."""

    calls: list[Call]
    tensors: Tensors
    output: Ref

    @staticmethod
    def of(tape: Tape) -> "Program":
        """The program of a tape: layers and the like under their usual names, and nothing that no output needs."""
        tensors = dict(tape.constants)
        calls = [_plain(call, tape, tensors) for call in tape.calls]
        return Program(calls, tensors, Ref(tape.output)).pruned()

    def pruned(self) -> "Program":
        """Without calls and tensors that the output does not need."""
        needed, calls = {self.output.number}, []
        for call in reversed(self.calls):
            if needed.isdisjoint(out for out in call.outs if out is not None):
                continue
            needed |= {leaf.number for leaf in leaves(call) if isinstance(leaf, Ref)}
            outs = tuple(out if out in needed else None for out in call.outs)
            calls.append(replace(call, outs=outs))
        calls.reverse()
        named = {leaf.name: None for call in calls for leaf in leaves(call) if isinstance(leaf, Named)}
        return Program(calls, {name: self.tensors[name] for name in named}, self.output)

    def fused(self) -> "Program":
        """With each batch normalisation in the weight and bias of the convolution that it alone reads.

        scale · (W x + b − mean) / √(variance + eps) + shift: the same up to rounding, without a pass over memory.
        """
        uses = Counter(leaf for call in self.calls for leaf in leaves(call) if isinstance(leaf, (Ref, Named)))
        uses[self.output] += 1
        tensors, calls = dict(self.tensors), {}
        for call in self.calls:
            images = call.args[0] if call.name == "batch_norm" else None
            layer = calls.get(images) if images is not None and uses[images] == 1 else None
            if layer is not None and _may_hold_scale(layer) and uses[layer.args[1]] == 1:
                calls[images] = _scaled_layer(layer, call, tensors)
            else:
                calls[Ref(call.outs[0] if call.outs[0] is not None else -1 - len(calls))] = call
        return Program(list(calls.values()), tensors, self.output).pruned()


def _may_hold_scale(layer: Call) -> bool:
    """Whether a call is a convolution whose weight has its outputs first."""
    return layer.name == "convolution" and isinstance(layer.args[1], Named) and not layer.args[6]


def _scaled_layer(layer: Call, norm: Call, tensors: Tensors) -> Call:
    """A convolution that gives what the normalisation behind it gave; its tensors are replaced."""
    images, weight, bias, *how = layer.args
    mean, variance, scale, shift = (None if each is None else tensors[each.name].double() for each in norm.args[1:5])
    kernel = tensors[weight.name]
    factor = (variance + norm.args[5]).rsqrt() * (1 if scale is None else scale)
    added = (0 if shift is None else shift) - mean * factor
    if bias is not None:
        added = added + tensors[bias.name].double() * factor
    name = f"{weight.name}.norm"
    tensors[weight.name] = (kernel.double() * factor.view(-1, *[1] * (kernel.ndim - 1))).to(kernel.dtype)
    tensors[name] = added.to(kernel.dtype)
    return replace(layer, args=(images, weight, Named(name), *how), outs=norm.outs)


class Network(nn.Module):
    """Runs a program: a module like any other, whose parameters are the program's floating-point tensors."""

    def __init__(
        self,
        program: Program,
        buffers: Iterable[str] = (),
        functions: Callable[[Call], Callable[..., Any]] | None = None,
    ):
        """buffers: names of tensors that are not trained. functions: what computes each call; None: as in PyTorch."""
        super().__init__()
        self.program = program
        self.places = {name: f"tensor{place}" for place, name in enumerate(program.tensors)}
        untrained = set(buffers) | running(program)
        for name, place in self.places.items():
            tensor = program.tensors[name].detach()
            if tensor.is_floating_point() and name not in untrained:
                self.register_parameter(place, nn.Parameter(tensor))
            else:
                self.register_buffer(place, tensor)
        self.about: Any = None  # what its file says beside it
        self.watched: dict[int, Tensor | None] = {}  # tensors of a pass to keep, by their number
        self.steps = [
            ((functions or function_of)(call), _filler((*call.args, call.kwargs)), call.outs, done)
            for call, done in zip(program.calls, last_uses(program))
        ]

    def forward(self, images: Tensor) -> Tensor:
        """The outputs [batch, …] of images [batch, *shape]."""
        values: dict[Any, Any] = {0: images, BATCH_SIZE: images.shape[0]}
        values.update((name, getattr(self, place)) for name, place in self.places.items())
        for function, fill, outs, done in self.steps:
            *args, kwargs = fill(values)
            result = function(*args, **kwargs)
            for out, tensor in zip(outs, result if isinstance(result, (tuple, list)) else (result,)):
                if out is not None:
                    values[out] = tensor
            if self.watched:
                self.watched.update({out: values[out] for out in outs if out in self.watched})
            for number in done:
                del values[number]
        return values[self.program.output.number]


BATCH_SIZE = -1  # stands for the number of images among the values


def _filler(given: Any) -> Callable[[Mapping[Any, Any]], Any]:
    """A function of the values of a pass that gives what a call is given, its lists rebuilt only where they must be."""
    if isinstance(given, Ref):
        return operator.itemgetter(given.number)
    if isinstance(given, Named):
        return operator.itemgetter(given.name)
    if isinstance(given, Batch):
        return lambda values: given.factor * values[BATCH_SIZE]
    if isinstance(given, dict):
        fillers = {key: _filler(each) for key, each in given.items()}
        return lambda values: {key: fill(values) for key, fill in fillers.items()}
    if isinstance(given, (list, tuple)) and any(isinstance(leaf, (*LEAVES, dict)) for leaf in _flat(given)):
        parts = [_filler(each) for each in given]
        return lambda values: [fill(values) for fill in parts]
    return lambda values: given


def _flat(given: Any) -> Iterable[Any]:
    return tree_iter(given, is_leaf=lambda leaf: isinstance(leaf, (*LEAVES, dict)))


def last_uses(program: Program) -> list[list[int]]:
    """For each call the tensors that nothing needs after it."""
    seen, found = {program.output.number}, []
    for call in reversed(program.calls):
        used = {leaf.number for leaf in leaves(call) if isinstance(leaf, Ref)} - {0}
        used |= {out for out in call.outs if out is not None}
        found.append(sorted(used - seen))
        seen |= used
    return found[::-1]


def running(program: Program) -> set[str]:
    """The names of statistics, which no gradient reaches, also where they are laid out anew for a normalisation."""
    found: set[Ref | Named] = set()
    for call in reversed(program.calls):
        if call.name == "batch_norm":
            found |= {each for each in call.args[1:3] if each is not None}
        elif any(Ref(out) in found for out in call.outs if out is not None):
            found |= {leaf for leaf in leaves(call) if isinstance(leaf, (Ref, Named))}
    return {each.name for each in found if isinstance(each, Named)}


def leaves(call: Call) -> Iterable[Any]:
    """What a call is given, out of all lists."""
    return tree_iter((call.args, call.kwargs), is_leaf=lambda leaf: isinstance(leaf, LEAVES))


def function_of(call: Call) -> Callable[..., Any]:
    """What computes a call; KeyError for a function that is not known."""
    if call.name in RUNS and "." not in call.function:
        return RUNS[call.name]
    name, _, overload = call.function.partition(".")
    packet = getattr(torch.ops.aten, name, None) if is_known(name) else None
    if packet is None or (overload or "default") not in packet.overloads():
        raise KeyError(call.function)
    return getattr(packet, overload or "default")


def _plain(call: Call, tape: Tape, tensors: Tensors) -> Call:
    """A call under the name that users know, without what evaluation does not need."""
    found = None
    if call.name in RENAMED:
        found = RENAMED[call.name](*call.args)
    elif call.name in UNDERSTOOD:
        found = UNDERSTOOD[call.name](call, tape, tensors)
    if found is not None:
        return Call(found[0], tuple(found[1:]), {}, call.outs[:1])
    kwargs = {key: value for key, value in call.kwargs.items() if key not in UNNEEDED and value is not None}
    return replace(call, args=tuple(call.args), kwargs=kwargs)


UNNEEDED = ("device", "layout", "pin_memory", "memory_format")
VIEWS = ("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy", "reshape")
COPIES = ("clone", "contiguous", "detach", "alias", "lift_fresh")
Plain = tuple[Any, ...] | None  # a name and what is given there; None: the call stays as it is

# The functions of torch's library that are kept under another name, by what they are given.
RENAMED: dict[str, Callable[..., Plain]] = {
    "_native_batch_norm_legit_no_training": lambda x, scale, shift, mean, variance, _, eps: (
        "batch_norm", x, mean, variance, scale, shift, eps
    ),
    "native_batch_norm": lambda x, scale, shift, mean, variance, is_training, _, eps: (
        None if is_training else ("batch_norm", x, mean, variance, scale, shift, eps)
    ),
    "native_layer_norm": lambda *args: ("layer_norm", *args),
    "native_group_norm": lambda x, scale, shift, _n, _c, _p, groups, eps: ("group_norm", x, groups, scale, shift, eps),
    "_softmax": lambda x, axis, *_: ("softmax", x, axis),
    "_log_softmax": lambda x, axis, *_: ("log_softmax", x, axis),
    "expand": lambda x, sizes, *_: ("expand", x, list(sizes)),
    "convolution": lambda *args: ("convolution", *args),
    **dict.fromkeys(VIEWS, lambda x, sizes, *_: ("reshape", x, list(sizes))),
    **dict.fromkeys(COPIES, lambda x, *_: ("clone.default", x)),
}  # fmt: skip


def _product(call: Call, tape: Tape, tensors: Tensors) -> Plain:
    """A product with a constant matrix as a linear layer."""
    shift, (left, right) = (call.args[0], call.args[1:3]) if call.name == "addmm" else (None, call.args)
    weight = None if call.kwargs else _transposed(right, tape, tensors)
    is_linear = weight is not None and isinstance(left, Ref) and (shift is None or _is_vector(shift, tensors))
    return ("linear", left, weight, shift) if is_linear else None


def _maximum(call: Call, tape: Tape, _: Tensors) -> Plain:
    """A maximum without the places of it, where nothing reads them."""
    is_read = call.outs[1:] not in ((), (None,)) and _is_read(call.outs[1], tape)
    return None if is_read else (call.name.removesuffix("_with_indices"), *call.args)


def _attention(call: Call, tape: Tape, _: Tensors) -> Plain:
    queries, keys, values, *more = call.args
    causal = more[1] if len(more) > 1 else False
    scale = call.kwargs.get("scale") or 1 / math.sqrt(tape.shapes[queries.number][-1])
    return ATTENTION, queries, keys, values, call.kwargs.get("attn_mask"), causal, scale


# The same, where that takes a look at the rest of the tape.
UNDERSTOOD: dict[str, Callable[[Call, Tape, Tensors], Plain]] = {
    **dict.fromkeys(("addmm", "mm", "bmm"), _product),
    **{f"max_pool{axes}d_with_indices": _maximum for axes in (1, 2, 3)},
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
}


def _is_read(number: int | None, tape: Tape) -> bool:
    return any(isinstance(leaf, Ref) and leaf.number == number for call in tape.calls for leaf in leaves(call))


def _is_vector(shift: Any, tensors: Tensors) -> bool:
    return isinstance(shift, Named) and tensors[shift.name].ndim == 1


def _transposed(given: Any, tape: Tape, tensors: Tensors) -> Named | None:
    """The matrix [outputs, inputs] that a constant [inputs, outputs] is the transpose of, by its parameter's name.

    The constant may have an axis of length 1 before these.
    """
    if not isinstance(given, Named):
        return None
    held, constant = tape.values[given.name], tensors[given.name]
    if constant.ndim == 3 and len(constant) == 1:
        held, constant = squeezed(held), constant.squeeze(0)
    if constant.ndim != 2:
        return None
    matrix = constant.T
    if isinstance(held, Held) and held.exact and held.sizes == tuple(matrix.shape) and varying(held.places[0]) == (1,):
        tape.values[held.name] = Held(held.name, held.sizes, tuple(place.T for place in held.places))
        tensors[held.name] = matrix
        return Named(held.name)
    name = f"{given.name}.transposed"
    tensors[name] = matrix.contiguous()
    tape.values[name] = (
        Held(held.name, held.sizes, tuple(p.T for p in held.places), held.exact) if isinstance(held, Held) else held
    )
    return Named(name)
