"""What layers multiply: seen, and changed, as a network runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TAKES = ("input", "weight")  # what these take first
MULTIPLIES = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MULTIPLIES += (torch.conv1d, torch.conv2d, torch.conv3d)
MULTIPLIES += (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)

Given = Callable[[str, Tensor, Tensor], Tensor]  # a weight's name, its inputs and itself, to what it multiplies instead


class Inputs(TorchFunctionMode):
    """Gives linear layers and convolutions by named weights what a function makes of their inputs."""

    def __init__(self, weights: Mapping[str, Tensor], given: Given):
        super().__init__()
        self.names, self.given = {id(weight): name for name, weight in weights.items()}, given

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in MULTIPLIES:
            found = dict(zip(TAKES, args)) | {name: kwargs[name] for name in TAKES if name in kwargs}
            name = self.names.get(id(found["weight"]))
            if name is not None:
                found["input"] = self.given(name, found["input"], found["weight"])
                rest = {key: value for key, value in kwargs.items() if key not in TAKES}
                return function(*(found[key] for key in TAKES), *args[len(TAKES) :], **rest)
        return function(*args, **kwargs)


class Between(nn.Module):
    """A network whose layers' inputs are put between a low and a high, its buffers, by a function of the three."""

    def __init__(self, network: nn.Module, ranges: Mapping[str, Tensor], function: Callable[..., Tensor]):
        """ranges: by the names of weights, [2]."""
        super().__init__()
        self.network, self.function = network, function
        self.places = {name: f"range{place}" for place, name in enumerate(ranges)}
        for name, place in self.places.items():
            self.register_buffer(place, ranges[name])

    def forward(self, images: Tensor) -> Tensor:
        """The network's outputs."""
        weights = {name: weight for name, weight in self.network.named_parameters() if name in self.places}

        def given(name: str, inputs: Tensor, _: Tensor) -> Tensor:
            return self.function(inputs, *getattr(self, self.places[name]))

        with Inputs(weights, given):
            return self.network(images)
