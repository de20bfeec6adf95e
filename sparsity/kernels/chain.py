"""A network whose recorded functions are a chain of layers, as the C++ types that compute it; what is none is told."""

import copy
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.data import Images, Splits
from sparsity.errors import reason
from sparsity.graph.functions import VIEWS
from sparsity.graph.tape import Call, Named, Ref, Tape, UnrecordableError, tape
from sparsity.losses import cross_entropy
from sparsity.population import Population

OPTIMIZERS = ("Adam", "AdamW", "SGD")


class UnsupportedError(Exception):
    """What keeps a network, or what it is trained by, from being kernels; in words for users."""


@dataclass(frozen=True)
class Chain:
    """The layers of a network in order, as C++ types, and their parameters in the order in which they ask for them."""

    layers: Sequence[str]
    parameters: Sequence[str]

    @property
    def source(self) -> str:
        """The program of the network."""
        layers = ",\n    ".join(f"kernels::{layer}" for layer in self.layers)
        return f'#include "library.hpp"\n\nLIBRARY(\n    {layers})\n'


def chain_of(module: nn.Module, image: Tensor, *, training: bool = True) -> Chain:
    """The chain of a module that is given images like one, [1, *shape], in training or not. Raises UnsupportedError."""
    module = copy.deepcopy(module)  # in training it may change what it keeps
    if any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules()):
        raise UnsupportedError("it draws random numbers")
    try:
        with torch.random.fork_rng(devices=[]):
            recorded = tape(module, image, training=training)
    except UnrecordableError as error:
        raise UnsupportedError(str(error)) from error
    except Exception as error:  # whatever a custom module may raise on images that it was not written for
        raise UnsupportedError(reason(error)) from error
    return _Reader(module, recorded).chain()


def check_supported(
    population: Population,
    splits: Splits,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[..., Any] = cross_entropy,
    augments: bool = False,
    shrinks: bool = False,
    straight_through: bool = False,
) -> Chain:
    """The chain of a population's network. Raises UnsupportedError where it, or how it is trained, is none of ours."""
    told = {
        f"the device is {population.device.type}": population.device.type != "cpu",
        "images are read from files": not isinstance(splits.train, Images),
        "the loss is not cross-entropy": loss is not cross_entropy,
        "images are augmented": augments,
        "weights are shrunk after each step": shrinks,
        "gradients go straight through masks": straight_through,
        f"the optimizer is {type(optimizer).__name__}, with settings of its own": not _is_plain(optimizer),
        "parameters are frozen": len(population.trainable) < len(population.parameters),
        "parameters are not float32": any(p.dtype is not torch.float32 for p in population.parameters.values()),
    }
    for words, is_so in told.items():
        if is_so:
            raise UnsupportedError(words)
    if splits.train.images.dtype not in (torch.uint8, torch.float32):
        raise UnsupportedError(f"images are {splits.train.images.dtype}")
    chain = chain_of(population.module, splits.example()[:1])
    if unused := population.parameters.keys() - set(chain.parameters):
        raise UnsupportedError(f"{min(unused)} is used otherwise than by one layer")
    return chain


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one that there is a kernel for, with settings that it knows."""
    kind = type(optimizer)
    (group,) = optimizer.param_groups
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in OPTIMIZERS
    return known and not any(group.get(name) for name in ("amsgrad", "maximize", "differentiable"))


class _Reader:
    """Turns recorded functions, each of what the one before gave, into layers."""

    def __init__(self, module: nn.Module, recorded: Tape):
        self.tape, self.layers, self.parameters = recorded, [], []
        self.names = {(p.data_ptr(), p.numel()): name for name, p in module.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}

    def chain(self) -> Chain:
        """The chain. The last function may be a log-softmax, which cross-entropy computes again."""
        last = 0
        for index, call in enumerate(self.tape.calls):
            if call.name in ("_log_softmax", "log_softmax"):
                is_last = call.outs[0] == self.tape.output and call.args[1] in (1, -1)
                if not is_last or index + 1 < len(self.tape.calls):
                    raise UnsupportedError("it computes log_softmax before its end")
            else:
                self.read(call, last)
            last = call.outs[0]
        if last != self.tape.output or len(self.tape.shapes[last]) != 2 or not self.parameters:
            raise UnsupportedError("it is no chain of layers with outputs [batch, classes]")
        return Chain(self.layers, self.parameters)

    def read(self, call: Call, last: int) -> None:
        """Adds the layers of a function."""
        given = [arg for arg in call.args if isinstance(arg, Ref)]
        if given != [Ref(last)]:
            raise UnsupportedError(f"{call.name} is not given what the layer before it gives, and nothing else")
        kinds = {"convolution": self.convolution, "max_pool2d_with_indices": self.pooling, "avg_pool2d": self.pooling}
        kinds |= {"addmm": self.linear, "mm": self.linear, "relu": self.rectifier, "leaky_relu": self.rectifier}
        shape = self.tape.shapes[last][1:]
        if call.name in VIEWS:
            self.flatten(call)
        elif call.name in kinds:
            kinds[call.name](call, shape)
        elif call.name not in ("clone", "contiguous", "alias", "detach"):
            raise UnsupportedError(f"it computes {call.name}")

    def flatten(self, call: Call) -> None:
        """Views that keep images apart: each lies in memory as before."""
        shape = self.tape.shapes[call.outs[0]]
        if shape[0] != self.tape.shapes[0][0]:
            raise UnsupportedError("it views images as something else than images")

    def linear(self, call: Call, shape: Sequence[int]) -> None:
        """bias + x · weightᵀ."""
        bias = call.args[0] if call.name == "addmm" else None
        name = self.name_of(call.args[-1], transposed=True)
        outputs, inputs = self.shapes[name]
        if (
            list(shape) != [inputs]
            or call.kwargs
            or (bias is not None and self.shapes[self.name_of(bias)] != (outputs,))
        ):
            raise UnsupportedError(f"{name} multiplies something else than the units of images")
        self.add(f"Linear<{inputs}, {outputs}, {_truth(bias is not None)}>", name, bias)

    def convolution(self, call: Call, shape: Sequence[int]) -> None:
        """A 2-d convolution in one group, its padding as a layer of its own."""
        _, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
        name = self.name_of(weight)
        if transposed or groups > 1 or len(shape) != 3:
            kind = "transposed" if transposed else "grouped" if groups > 1 else f"{len(shape) - 1}-dimensional"
            raise UnsupportedError(f"{name} is of a {kind} convolution")
        (channels, height, width), (filters, _, *kernel) = shape, self.shapes[name]
        if any(padding):
            self.add(f"Padding<{channels}, {height}, {width}, {padding[0]}, {padding[1]}>")
        height, width = height + 2 * padding[0], width + 2 * padding[1]
        numbers = (channels, height, width, filters, *kernel, *stride, *dilation, _truth(bias is not None))
        self.add(f"Convolution<{', '.join(map(str, numbers))}>", name, bias)

    def pooling(self, call: Call, shape: Sequence[int]) -> None:
        """Pooling of windows that lie within the maps."""
        is_max = call.name.startswith("max")
        names = ("stride", "padding", "dilation", "ceil_mode") if is_max else ("stride", "padding", "ceil_mode")
        numbers = dict(zip(names, call.args[2:])) | call.kwargs
        kernel = _pair(call.args[1])
        stride = _pair(numbers.get("stride") or kernel)
        bound = [(size - k) // s + 1 for size, k, s in zip(shape[1:], kernel, stride)]
        is_plain = not any(_pair(numbers.get("padding", 0))) and set(_pair(numbers.get("dilation", 1))) == {1}
        found = list(self.tape.shapes[call.outs[0]][2:])
        if (
            len(shape) != 3
            or not is_plain
            or found != bound
            or numbers.get("divisor_override")
            or kernel[0] * kernel[1] > 256
        ):
            raise UnsupportedError(f"it computes {call.name} of windows that go beyond the maps, or are apart")
        self.add(f"Pooling<{', '.join(map(str, (*shape, *kernel, *stride, _truth(is_max))))}>")

    def rectifier(self, call: Call, shape: Sequence[int]) -> None:
        """ReLU, or leaky."""
        slope = 0.0 if call.name == "relu" else call.args[1] if len(call.args) > 1 else 0.01
        if not 0 <= slope < 1:
            raise UnsupportedError(f"it computes {call.name} with a slope of {slope}")
        (bits,) = struct.unpack("I", struct.pack("f", slope))
        self.add(f"Rectifier<{torch.Size(shape).numel()}, {bits}u>")

    def add(self, layer: str, weight: str | None = None, bias: Named | None = None) -> None:
        """One more layer."""
        names = ([] if weight is None else [weight]) + ([] if bias is None else [self.name_of(bias)])
        if repeated := set(names) & set(self.parameters):
            raise UnsupportedError(f"{min(repeated)} is used by more than one layer")
        self.layers.append(layer)
        self.parameters += names

    def name_of(self, named: Any, transposed: bool = False) -> str:
        """The parameter that a constant is, whole and as it lies in memory, or transposed."""
        tensor = self.tape.constants[named.name] if isinstance(named, Named) else None
        name = None if tensor is None else self.names.get((tensor.data_ptr(), tensor.numel()))
        own = tensor.t() if transposed and tensor is not None else tensor
        if name is None or tuple(own.shape) != self.shapes[name] or not own.is_contiguous():
            raise UnsupportedError("it computes something of its parameters before it uses them")
        return name


def _pair(number: int | Sequence[int]) -> list[int]:
    """Height and width of what may be given once."""
    found = [number] if isinstance(number, int) else list(number)
    return found * 2 if len(found) == 1 else found


def _truth(value: bool) -> str:
    return "true" if value else "false"
