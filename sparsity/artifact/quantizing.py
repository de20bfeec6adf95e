"""A program whose layers multiply whole numbers, as float32 computes it: what its file in ONNX computes in integers."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsity.artifact.coding import scales_of
from sparsity.artifact.cutting import Cut
from sparsity.artifact.program import Program, leaves
from sparsity.graph.tape import Call, Named, Ref
from sparsity.quantizing import steps
from sparsity.tensors import Tensors

Ranges = Mapping[str, tuple[float, float]]  # of the inputs of a weight, by its name: the lowest and the highest
ROUNDED, DEQUANTIZED = "rounded", "dequantized"  # calls: numbers in steps, and whole numbers times scales

CHOOSE = (
    "relu",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "reshape",
    "gather",
)  # rounded after them or before is equal


def quantized(cut: Cut, ranges: Ranges) -> Program:
    """The compact program, normalisations in its weights, with the inputs of layers in uint8 where there are ranges.

    Weights that are whole numbers times a scale of each output are so after the normalisation too, which scales them;
    biases are rounded to the steps of sums, those of the inputs times the scales, as runtimes have them in int32.
    """
    program = cut.program.fused()
    tensors, calls, free = dict(program.tensors), [], _free(program)
    for call in program.calls:
        weight = _weight(call)
        if weight is not None and (scales := _scales(call, cut.program.tensors[weight])) is not None:
            tensors[weight] = _rounded(tensors[weight], cut.program.tensors[weight], scales)
        place = cut.places.get(weight)
        if place is not None and place.name in ranges and isinstance(call.args[0], Ref):
            step, zero = (each.item() for each in steps(*torch.tensor(ranges[place.name], dtype=torch.float32)))
            given = Ref(next(free))
            calls.append(Call(ROUNDED, (call.args[0], step, zero), {}, (given.number,)))
            call = replace(call, args=(given, *call.args[1:]))
            if (sums := _sums(call, tensors, step)) is not None:
                tensors[call.args[2].name] = sums[0] * sums[1]
        calls.append(call)
    return Program(calls, tensors, program.output)


def with_integers(program: Program) -> Program:
    """The same with int8 in place of the weights, and int32 of the biases, that are whole numbers times scales.

    What is rounded behind a maximum or the like is so before it too, which changes nothing: then layers give integers.
    """
    tensors, calls, free, early = dict(program.tensors), [], _free(program), _early(program)
    steps_of = {call.outs[0]: call.args[1] for call in program.calls if call.name == ROUNDED}

    def dequantized(name: str, whole: Tensor, scales: Tensor, axis: int) -> Ref:
        found = Ref(next(free))
        tensors.update({name: whole, f"{name}.scale": scales})
        calls.append(Call(DEQUANTIZED, (Named(name), Named(f"{name}.scale"), axis), {}, (found.number,)))
        return found

    uses = Counter(leaf.name for call in program.calls for leaf in leaves(call) if isinstance(leaf, Named))
    for call in program.calls:
        weight = _weight(call)
        scales = _scales(call, program.tensors[weight]) if weight is not None and uses[weight] == 1 else None
        if scales is not None:
            images, _, bias, *how = call.args
            axis, scales = int(_is_transposed(call)), _divisor(scales)
            whole = program.tensors[weight] / scales.view(-1, *[1] * (program.tensors[weight].ndim - 1 - axis))
            kernel = dequantized(weight, whole.round().to(torch.int8), scales, axis)
            step = steps_of.get(images.number) if isinstance(images, Ref) else None
            sums = None if step is None else _sums(call, program.tensors, step)
            if sums is not None and uses[bias.name] == 1:
                bias = dequantized(bias.name, sums[0].to(torch.int32), sums[1], 0)
            call = replace(call, args=(images, kernel, bias, *how))
        calls.append(call)
        if call.outs[0] in early:
            calls[-1] = replace(call, outs=(number := next(free),))
            calls.append(Call(ROUNDED, (Ref(number), *early[call.outs[0]]), {}, call.outs))
    return Program(calls, tensors, program.output)


def _early(program: Program) -> dict[int, tuple[float, float]]:
    """By what a layer gives, the step and zero that it is rounded by after functions that only choose entries."""
    made = {call.outs[0]: call for call in program.calls}
    uses = Counter(leaf for call in program.calls for leaf in leaves(call) if isinstance(leaf, Ref))
    found = {}
    for call in program.calls:
        given = call.args[0] if call.name == ROUNDED else None
        while isinstance(given, Ref) and given.number in made and uses[given] == 1:
            before = made[given.number]
            if _weight(before) is not None:
                found[given.number] = call.args[1:]
            given = before.args[0] if before.name in CHOOSE else None
    return found


def _sums(call: Call, tensors: Tensors, step: float) -> tuple[Tensor, Tensor] | None:
    """A layer's bias as whole numbers, and their scales: a step of its inputs times its weight's scales."""
    scales = _scales(call, tensors[call.args[1].name])
    if scales is None or not isinstance(call.args[2], Named):
        return None
    scales = step * _divisor(scales)
    whole = (tensors[call.args[2].name] / scales).round()
    fits = whole.abs().max() < 2**31 and bool((scales >= torch.finfo(scales.dtype).tiny).all())
    return (whole, scales) if fits else None


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1)


def is_quantized(program: Program) -> bool:
    """Whether inputs of layers are in uint8."""
    return any(call.name == ROUNDED for call in program.calls)


def _free(program: Program) -> Iterator[int]:
    """Numbers that no call of a program gives."""
    return itertools.count(1 + max((out for call in program.calls for out in call.outs if out is not None), default=0))


def _weight(call: Call) -> str | None:
    """The name of the constant that a linear layer or a convolution multiplies by."""
    is_layer = call.name in ("linear", "convolution") and isinstance(call.args[1], Named)
    return call.args[1].name if is_layer else None


def _is_transposed(call: Call) -> bool:
    return call.name == "convolution" and bool(call.args[6])


def _scales(call: Call, weight: Tensor) -> Tensor | None:
    """A scale of each of a layer's outputs; None where its weight has other numbers, or more scales than ONNX takes."""
    if _is_transposed(call) and call.args[8] != 1:
        return None
    return scales_of(weight, 1 if _is_transposed(call) else 0)


def _rounded(weight: Tensor, before: Tensor, scales: Tensor) -> Tensor:
    """The weight as whole numbers times scales, which are those that it had before its outputs were scaled, scaled."""
    if weight is before:
        return weight
    scales = scales.view(-1, *[1] * (weight.ndim - 1))
    largest, most = (each.abs().flatten(1).amax(1).view_as(scales) for each in (before, weight))
    after = scales * (most / _divisor(largest))
    return (weight / _divisor(after)).round() * after
