"""Augmentations: images as they are stored, and numbers drawn evenly from [0, 1) for each, to other images.

They act on all images of all members at once, on their device; what an image becomes follows from its own numbers, so
that members together are members alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity.errors import ConfigError, reason
from sparsity.kinds import Count, NonNegative

FIELD = 4  # points along each side of an elastic field


def digits(
    images: Tensor,
    draws: Tensor,
    *,
    shift: NonNegative,
    rotation: NonNegative,
    scale: NonNegative,
    elastic: NonNegative,
) -> Tensor:
    """Images moved, turned, resized and bent by a smooth field; Simard et al., 2003.

    shift: up to so many pixels along each axis; rotation: degrees; scale: a share; elastic: pixels. images: float [n,
    channels, height, width]; draws: [n, 36]. What comes from outside is 0.
    """
    height, width = images.shape[2:]
    even = 2 * draws - 1
    angle, factor = even[:, 0] * (rotation * math.pi / 180), 1 + even[:, 1] * scale
    cosine, sine = angle.cos() / factor, angle.sin() / factor
    fields = even[:, 4:].view(-1, 2, FIELD * FIELD) * elastic
    # a turn in pixels, of coordinates that go from -1 to 1 along either axis; then shift and field, in pixels
    along = [cosine, -sine * height / width, even[:, 2] * (2 * shift / width)]
    down = [sine * width / height, cosine, even[:, 3] * (2 * shift / height)]
    numbers = [torch.stack(along, 1), fields[:, 0] * (2 / width), torch.stack(down, 1), fields[:, 1] * (2 / height)]
    grid = torch.cat(numbers, 1) @ _places(height, width, images)
    return F.grid_sample(images, grid.view(-1, height, width, 2), align_corners=False)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Where pixels are taken from, as a linear function of numbers: [2 · (3 + points of a field), height · width · 2].

    Half of the numbers say where along each axis: by both coordinates, by 1, and by the points of a field between which
    it is smooth. One product is several times faster than building each image's field.
    """
    points = torch.eye(FIELD * FIELD, dtype=like.dtype, device=like.device).view(-1, 1, FIELD, FIELD)
    fields = F.interpolate(points, (height, width), mode="bilinear", align_corners=True).squeeze(1)
    across, down = (
        (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1 for size in (width, height)
    )
    plain = [across.expand(height, width), down.unsqueeze(1).expand(height, width), torch.ones_like(fields[0])]
    one = torch.cat([torch.stack(plain), fields])
    nothing = torch.zeros_like(one)
    both = torch.cat([torch.stack([one, nothing], 3), torch.stack([nothing, one], 3)])
    return both.flatten(1)


def flip_crop(images: Tensor, draws: Tensor, *, padding: Count) -> Tensor:
    """Images mirrored, one of two by chance, and cut out of itself with `padding` pixels of 0 around; He et al., 2016.

    images: float [n, channels, height, width]; draws: [n, 3].
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    down, right = ((draws[:, place] * (2 * padding + 1)).long().unsqueeze(1) for place in (1, 2))
    rows, columns = (
        start + torch.arange(size, device=images.device) for start, size in ((down, height), (right, width))
    )
    columns = torch.where(draws[:, :1] < 0.5, columns.flip(1), columns)
    each = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[each, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def check_augmentation(
    function: Callable[[Tensor, Tensor], Tensor], draws: int, shape: Sequence[int], name: str
) -> None:
    """Refuses data that is no images, and an augmentation that does not give images of the same shape."""
    shape = list(shape)
    if len(shape) != 3:
        raise ConfigError(f"augment={name} needs images [channels, height, width], and the data's shape is {shape}")
    try:
        found = function(torch.zeros(2, *shape), torch.zeros(2, draws))
    except Exception as error:  # whatever a function of the user's own may raise
        raise ConfigError(
            f"augment={name} fails on images {shape} with augment.draws={draws}: {reason(error)}"
        ) from error
    if list(found.shape) != [2, *shape]:
        raise ConfigError(f"augment={name} must give images {[2, *shape]} of such images, got {list(found.shape)}")
