"""Which layers a forward pass goes through, and which feeds which: read off one recorded pass."""

from collections import Counter
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
# Functions that may put channels and positions into one axis, channels first, or average the positions.
FLATTENS = frozenset(("flatten", "view", "reshape", "squeeze", "squeeze_", "mean"))


@dataclass(frozen=True)
class Layer:
    """A weight that a linear layer or a convolution uses."""

    name: str  # the weight's
    num_positions: int  # of one image, over all uses: output pixels of a convolution, 1 for vectors
    source: str | None = None  # the one layer whose channels it reads, or None: the input, or where branches meet
    spread: int = 1  # its inputs for each channel of the source: the positions that a flatten put side by side
    target: str | None = None  # the one layer that reads its channels, or None: the output, or where branches part
    bias: str | None = None  # the parameter that it adds
    passed: tuple[str, ...] = ()  # the functions that the source's channels, or the images, went through to get here
    vectors: tuple[str, ...] = ()  # the parameters and buffers of those functions, entries beside the channels
    exclusive: bool = True  # no other function takes its weight, its bias or those vectors
    reads_images: bool = False  # nothing else reads the images, and it reads nothing else


def trace_layers(module: nn.Module, images: Tensor) -> dict[str, Layer]:
    """The layers of a module by their weight's name, in the order of one pass over images [batch, *shape].

    A weight that is used twice is listed once, without source and target.
    """
    recorder = _Recorder(module, images)
    with torch.no_grad(), recorder:
        outputs = module.eval()(images)
    recorder.close(outputs)
    return recorder.linked()


@dataclass(frozen=True)
class _Channels:
    """Where a tensor's channels come from."""

    layer: str | None
    axis: int  # where they lie
    spread: int = 1
    passed: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()


IMAGES = ""  # stands for the layer that the images' channels come from


class _Recorder(TorchFunctionMode):
    """Watches the torch functions of one pass and keeps, for each tensor, which layer made its channels."""

    def __init__(self, module: nn.Module, images: Tensor):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.own = {id(buffer): name for name, buffer in module.named_buffers()} | self.names
        self.batch = len(images)
        self.layers: dict[str, Layer] = {}
        self.origin: dict[int, _Channels] = {id(images): _Channels(IMAGES, 1)}
        self.readers: dict[str, list[str | None]] = {}  # of each layer; None is a reader that is no single layer
        self.reused: set[str] = set()
        self.uses: Counter[str] = Counter()  # of parameters and buffers, by functions
        self.alive: list[Any] = [images]  # ids are only good while their tensors live

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        results = _tensors(result)
        if results:  # a size or a flag reads no channels
            self.alive += [result, arguments, keywords]
            self._note(getattr(function, "__name__", ""), _tensors((arguments, keywords)), results)
        return result

    def _note(self, function: str, arguments: list[Tensor], results: list[Tensor]) -> None:
        self.uses.update(self.own[id(tensor)] for tensor in arguments if id(tensor) in self.own)
        weight = next((self.names[id(t)] for t in arguments if id(t) in self.names and t.ndim > 1), None)
        inputs = [tensor for tensor in arguments if id(tensor) not in self.names]
        if inputs and weight is not None and (function == "linear" or function.startswith("conv")):
            self._note_layer(function, weight, arguments, inputs, results[0])
        elif inputs and len(results) == 1 and (found := self._followed(function, inputs[0], arguments, results[0])):
            self.origin[id(results[0])] = found
        else:
            self.close(inputs)
            for result in results:
                self.origin.pop(id(result), None)  # changed in place, it has other channels now

    def _followed(self, function: str, images: Tensor, arguments: list[Tensor], result: Tensor) -> _Channels | None:
        """The channels after a function of one tensor that leaves them apart; None after any other."""
        origin, others = self.origin.get(id(images)), [tensor for tensor in arguments if tensor is not images]
        if origin is None or any(id(other) not in self.own for other in others):
            return None
        found = None
        if function in KEEPS_CHANNELS:
            found = origin if _size(result, origin.axis) == _size(images, origin.axis) else None
        elif function in FLATTENS:
            found = _flat(origin, images, result)
        vectors = [self.own[id(other)] for other in others]
        return found and replace(found, passed=(*found.passed, function), vectors=(*found.vectors, *vectors))

    def _note_layer(
        self, function: str, weight: str, arguments: list[Tensor], inputs: list[Tensor], result: Tensor
    ) -> None:
        images, *others = inputs
        axis = result.ndim - 1 if function == "linear" else 1
        channels = result.shape[axis]
        # each input position of a transposed convolution meets the whole kernel, each output position of the others
        positions = images.numel() // images.shape[1] if "transpose" in function else result.numel() // channels
        num_positions = positions // self.batch
        if weight in self.layers:
            self.reused.add(weight)
            num_positions += self.layers[weight].num_positions
        origin = self.origin.get(id(images))
        follows = origin is not None and origin.axis == (images.ndim - 1 if function == "linear" else 1)
        self._read(images, weight if follows else None)
        origin = origin if follows else _Channels(None, 0)
        bias = next((self.names[id(t)] for t in arguments if id(t) in self.names and t.ndim == 1), None)
        self.layers[weight] = Layer(
            weight,
            num_positions,
            origin.layer,
            origin.spread,
            bias=bias,
            passed=origin.passed,
            vectors=origin.vectors,
            exclusive=not others,
        )
        self.origin[id(result)] = _Channels(weight, axis)

    def _read(self, tensor: Tensor, reader: str | None) -> None:
        if id(tensor) in self.origin:
            self.readers.setdefault(self.origin[id(tensor)].layer, []).append(reader)

    def close(self, outputs: Any) -> None:
        """Notes that something other than a layer reads these tensors."""
        for tensor in _tensors(outputs):
            self._read(tensor, None)

    def linked(self) -> dict[str, Layer]:
        """The layers with their targets; those that are used twice stand alone."""

        def target(name: str) -> str | None:
            readers = self.readers.get(name, [])
            return readers[0] if len(readers) == 1 and readers[0] not in self.reused else None

        def link(layer: Layer) -> Layer:
            used = [name for name in (layer.name, layer.bias, *layer.vectors) if name is not None]
            exclusive = layer.exclusive and all(self.uses[name] == 1 for name in used)
            if layer.name in self.reused:
                return Layer(layer.name, layer.num_positions, exclusive=False)
            return replace(
                layer,
                source=None if layer.source == IMAGES or layer.source in self.reused else layer.source,
                target=target(layer.name),
                exclusive=exclusive,
                reads_images=layer.source == IMAGES and target(IMAGES) == layer.name,
            )

        return {name: link(layer) for name, layer in self.layers.items()}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor, axis: int) -> tuple[int, int | None]:
    """How many axes a tensor has, and how long one of them is."""
    return tensor.ndim, tensor.shape[axis] if axis < tensor.ndim else None


def _flat(origin: _Channels, images: Tensor, result: Tensor) -> _Channels | None:
    """The channels after a reshape: the same, or with their positions beside them; None for any other."""
    if result.shape == images.shape:
        return origin
    if origin.axis != 1 or images.ndim < 3 or result.shape[:1] != images.shape[:1]:
        return None
    if result.shape[:2] == images.shape[:2]:  # positions alone were flattened or averaged
        return origin
    is_flat = result.ndim == 2 and result.numel() == images.numel()
    return replace(origin, spread=origin.spread * result.shape[1] // images.shape[1]) if is_flat else None
