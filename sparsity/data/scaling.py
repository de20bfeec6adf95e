"""Images as networks take them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def scaled(images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Uint8 to [0, 1], then (x − mean) / std of each channel, as of `column`; None: the former alone."""
    if not images.is_floating_point():
        images = images.float().mul_(1 / 255)
    return images if mean is None else (images - mean) / std


def column(numbers: Sequence[float], num_axes: int, device: torch.device | None = None) -> Tensor:
    """Numbers [channels] with an axis of 1 for each further axis of an image."""
    return torch.tensor(numbers, device=device).view(-1, *[1] * (num_axes - 1))
