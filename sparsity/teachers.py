"""Teachers: trained networks whose outputs a loss asks for, on the images that members are trained on."""

import functools

import torch
from torch import Tensor, nn

from sparsity.data import Splits
from sparsity.errors import ConfigError
from sparsity.memory import free_bytes


class Teacher:
    """A network in evaluation; remembers its outputs on train."""

    def __init__(self, module: nn.Module, splits: Splits, device: torch.device, name: str = "", at_once: int = 500):
        """splits: of whole images; name: its key and value, for messages; at_once: images in a forward pass."""
        self.module, self.splits, self.device = module.to(device).eval().requires_grad_(False), splits, device
        self.name, self.at_once = name, at_once

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs [members, batch, classes], float32, of raw or augmented images [members, batch, *shape]."""
        with torch.no_grad():
            found = self.module(self.splits.scale(images.flatten(0, 1)))
        return found.float().unflatten(0, images.shape[:2])

    @functools.cached_property
    def kept(self) -> Tensor:
        """Its outputs on train in its order, float32 [images, classes]; on the device, where they fit."""
        train = self.splits.train
        order = torch.arange(len(train)).unsqueeze(0)
        num_bytes = len(train) * self.splits.num_classes * torch.float32.itemsize
        place = torch.device("cpu") if num_bytes > free_bytes(self.device) / 2 else self.device
        found = torch.cat([self(batch.images)[0].to(place) for batch in train.batches(order, self.at_once)])
        bad = int((~found.isfinite()).any(1).sum())
        if bad:
            raise ConfigError(f"{self.name} gives NaN or infinity on {bad:,} of {len(train):,} images of train")
        return found
