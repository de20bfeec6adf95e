"""Which layers a forward pass goes through, and which feeds which: read off one recorded pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Functions whose output has the input's channels, each made from the same channel alone.
# fmt: off
KEEPS_CHANNELS = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign",
    "logsigmoid", "sigmoid", "tanh", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "boolean_dispatch", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_dropout", "batch_norm", "instance_norm", "contiguous", "clone", "to", "float", "detach", "identity",
    "interpolate", "log_softmax", "softmax",
))
# fmt: on
# Functions that may flatten channels and positions into one axis, channels first.
FLATTENS = frozenset(("flatten", "view", "reshape", "squeeze", "squeeze_"))


@dataclass(frozen=True)
class Layer:
    """A weight that a linear layer or a convolution uses."""

    name: str  # the weight's
    num_positions: int  # output positions of one image, over all uses: a convolution's pixels, 1 for vectors
    source: str | None = None  # the one layer whose channels it reads, or None: the input, or where branches meet
    spread: int = 1  # its inputs for each channel of the source: the positions that a flatten put side by side
    target: str | None = None  # the one layer that reads its channels, or None: the output, or where branches part


def trace(module: nn.Module, images: Tensor) -> dict[str, Layer]:
    """The layers of a module by their weight's name, in the order of one pass over images [batch, *shape].

    A weight that is used twice is listed once, without source and target.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    recorder = _Recorder(names, len(images))
    with torch.no_grad(), recorder:
        module.eval()(images)
    return recorder.linked()


@dataclass(frozen=True)
class _Channels:
    """Where a tensor's channels come from."""

    layer: str
    count: int  # channels, as the layer made them
    spread: int = 1


class _Recorder(TorchFunctionMode):
    """Watches the torch functions of one pass and keeps, for each tensor, which layer made its channels."""

    def __init__(self, names: dict[int, str], batch: int):
        super().__init__()
        self.names = names
        self.batch = batch
        self.layers: dict[str, Layer] = {}
        self.origin: dict[int, _Channels] = {}
        self.readers: dict[str, list[str | None]] = {}  # of each layer; None is a reader that is no single layer
        self.reused: set[str] = set()
        self.alive: list[Any] = []  # ids are only good while their tensors live

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        name = getattr(function, "__name__", "")
        if isinstance(result, Tensor):
            self.alive += [result, arguments, keywords]
            self._note(name, list(arguments) + list(keywords.values()), result)
        return result

    def _note(self, function: str, arguments: list[Any], result: Tensor) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        weight = next((self.names[id(t)] for t in tensors if id(t) in self.names and t.ndim > 1), None)
        inputs = [tensor for tensor in tensors if id(tensor) not in self.names]
        if weight is not None and (function == "linear" or function.startswith("conv")):
            self._note_layer(function, weight, inputs[0], result)
        elif function in KEEPS_CHANNELS and id(inputs[0]) in self.origin:
            self.origin[id(result)] = self.origin[id(inputs[0])]
        elif function in FLATTENS and id(inputs[0]) in self.origin and result.shape[0] == inputs[0].shape[0]:
            self._note_flatten(inputs[0], result)
        elif result.is_floating_point():
            for tensor in inputs:
                self._read(tensor, None)
            self.origin.pop(id(result), None)  # changed in place, it has other channels now

    def _note_layer(self, function: str, weight: str, images: Tensor, result: Tensor) -> None:
        channels = result.shape[-1] if function == "linear" else result.shape[1]
        num_positions = result.numel() // (self.batch * channels)
        origin = self._read(images, weight)
        if weight in self.layers:
            self.reused.add(weight)
            num_positions += self.layers[weight].num_positions
        # a linear layer on a map of more than two axes reads its last axis, which is no channel axis
        follows = origin is not None and (images.ndim == 2 or function != "linear")
        self.layers[weight] = Layer(
            weight,
            num_positions,
            source=origin.layer if follows else None,
            spread=origin.spread if follows else 1,
        )
        self.origin[id(result)] = _Channels(weight, channels)

    def _note_flatten(self, images: Tensor, result: Tensor) -> None:
        origin = self.origin[id(images)]
        width = result.shape[1] if result.ndim == 2 else 0
        if result.shape == images.shape or (result.ndim == 2 and width % origin.count == 0 and images.ndim > 2):
            self.origin[id(result)] = _Channels(origin.layer, origin.count, max(1, width // origin.count))
        else:
            self._read(images, None)

    def _read(self, tensor: Tensor, reader: str | None) -> _Channels | None:
        origin = self.origin.get(id(tensor))
        if origin is not None:
            self.readers.setdefault(origin.layer, []).append(reader)
        return origin

    def linked(self) -> dict[str, Layer]:
        """The layers with their targets; those that are used twice stand alone."""

        def target(name: str) -> str | None:
            readers = self.readers.get(name, [])
            return readers[0] if len(readers) == 1 and readers[0] not in self.reused else None

        return {
            name: Layer(name, layer.num_positions)
            if name in self.reused
            else replace(
                layer,
                source=None if layer.source in self.reused else layer.source,
                target=target(name),
            )
            for name, layer in self.layers.items()
        }
