"""Network factories: given the data's `input_shape` and `num_classes`, a module that takes a batch."""

import copy
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsity.errors import ConfigError, reason
from sparsity.kinds import PositiveCount


class MLP(nn.Module):
    """A fully connected network with ReLU between its layers `fc1`, `fc2`, … and log-softmax at its end."""

    def __init__(self, widths: list[int]):
        """widths: the units of the input, of each hidden layer and of the output."""
        super().__init__()
        self.num_layers = len(widths) - 1
        for layer in range(self.num_layers):
            self.add_module(f"fc{layer + 1}", nn.Linear(widths[layer], widths[layer + 1]))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities [batch, classes] of images [batch, *shape]."""
        units = images.flatten(1)
        for layer in range(1, self.num_layers):
            units = F.relu(self.get_submodule(f"fc{layer}")(units))
        return F.log_softmax(self.get_submodule(f"fc{self.num_layers}")(units), dim=1)


class LeNet5(nn.Module):
    """Caffe's LeNet-5: `conv1` 20@5×5, pool, `conv2` 50@5×5, pool, `fc1` 500, `fc2`, log-softmax."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int):
        super().__init__()
        channels, height, width = input_shape
        positions = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(50 * positions, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities [batch, classes] of images [batch, channels, height, width]."""
        # ReLU after the pool gives what ReLU before it gives, at a quarter of the cost
        maps = F.relu(F.max_pool2d(self.conv1(images), 2))
        maps = F.relu(F.max_pool2d(self.conv2(maps), 2))
        units = F.relu(self.fc1(maps.flatten(1)))
        return F.log_softmax(self.fc2(units), dim=1)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and the input added: subsampled, with channels of zeros (A)."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.stride, self.added = stride, filters - channels

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, filters, height, width] of maps [batch, channels, height, width]."""
        found = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(maps)))))
        if self.stride > 1 or self.added:
            maps = F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(found + maps)


class ResNet(nn.Module):
    """The residual network for small images: three stages of blocks, with 16, 32 and 64 filters; He et al., 2016."""

    def __init__(self, blocks: int, channels: int, num_classes: int):
        """blocks: in each stage; the network has 6 · blocks + 2 layers."""
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [16, *(width for width in (16, 32, 64) for _ in range(blocks))]
        blocks_of = (ResidualBlock(one, two, 1 if one == two else 2) for one, two in pairwise(widths))
        self.blocks = nn.Sequential(*blocks_of)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities [batch, classes] of images [batch, channels, height, width]."""
        maps = self.blocks(F.relu(self.norm(self.conv(images))))
        return F.log_softmax(self.fc(maps.mean((2, 3))), dim=1)


def resnet20(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet-20 for small images such as CIFAR-10's; 268,336 weights on these; He et al., 2016."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 8:
        raise ConfigError(f"model=resnet20 takes images of 8×8 or more, the data's are {list(input_shape)}")
    return ResNet(3, input_shape[0], num_classes)


def lenet300(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-300-100: inputs-300-100-classes; 266,200 weights on MNIST; LeCun et al., 1998."""
    return mlp(hidden=[300, 100], input_shape=input_shape, num_classes=num_classes)


def lenet5(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 as Caffe has it; 430,500 weights on MNIST; LeCun et al., 1998."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 16:
        raise ConfigError(f"model=lenet5 takes images of 16×16 or more, the data's are {list(input_shape)}")
    return LeNet5(input_shape, num_classes)


def mlp(*, hidden: list[PositiveCount], input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A fully connected network with the hidden widths given."""
    return MLP([int(torch.Size(input_shape).numel()), *hidden, num_classes])


def torchvision(
    *, name: str, input_shape: Annotated[tuple[int, ...], "channels, height, width"], num_classes: int
) -> nn.Module:
    """A classification network of torchvision by its factory's name, untrained, first and last layer fitted."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        close = ", ".join(get_close_matches(name, names)) or ", ".join(names[:3])
        raise ConfigError(f"model.factory.name={name} is no classification network of torchvision's: try {close}, …")
    sizes = {"image_size": input_shape[-1]} if name.startswith("vit_") else {}
    heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if heads:
        heads["init_weights"] = True
    network = models.get_model(name, weights=None, num_classes=num_classes, **sizes, **heads)
    _fit_first_layer(network, input_shape[0])
    return network


def _fit_first_layer(network: nn.Module, channels: int) -> None:
    """Replaces the first convolution by one that takes the data's channels, drawn as the network draws its own."""
    name, first = next((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return
    fitted = copy.deepcopy(first)
    fitted.in_channels = channels
    fitted.weight = nn.Parameter(first.weight.detach()[:, torch.arange(channels) % first.in_channels].clone())
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, fitted)


def build(factory: Callable[..., nn.Module], input_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """The factory's module under a random state of its own, given the data's shape where its signature takes it."""
    given = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    taken = {name: value for name, value in given.items() if name in inspect.signature(factory).parameters}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory(**taken)
        if not isinstance(module, nn.Module):
            raise TypeError(f"the factory gave a {type(module).__name__}, not a torch.nn.Module")
        if any(is_lazy(parameter) for parameter in module.parameters()):
            module(torch.zeros(2, *input_shape))  # now they have their shapes, and are drawn
        return module


def check_fits(module: nn.Module, images: Tensor, num_classes: int, name: str) -> None:
    """Refuses a module that does not map images [batch, *shape] to [batch, num_classes]."""
    shape = list(images.shape[1:])
    try:
        with torch.no_grad():
            outputs = module.eval()(images)
    except Exception as error:  # whatever a custom module may raise
        raise ConfigError(f"model={name} does not fit the data, whose images are {shape}: {reason(error)}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (len(images), num_classes):
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(
            f"model={name} does not fit the data: a batch of {len(images)} images {shape} must give outputs "
            f"{[len(images), num_classes]}, got {got}"
        )
