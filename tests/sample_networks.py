"""Networks of a user's own, for the tests."""

import torch
from torch import nn


class WithDropout(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.hidden = nn.Linear(input_shape[1] * input_shape[2], 20)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(20, num_classes)

    def forward(self, images):
        return self.out(self.drop(self.hidden(images.flatten(1)).relu()))


class Normalised(nn.Module):
    """Batch normalisation, a grouped and a depthwise convolution, and two branches that meet."""

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.left = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.right = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, images):
        maps = self.norm(self.first(images)).relu()
        return self.out((self.left(maps) + self.right(maps)).relu().mean((2, 3)))


class OfTheBatch(nn.Module):
    """Computes something else of two images than of more, so that a recording does not tell all of it."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(torch.Size(input_shape).numel(), num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1) * (1.0 if len(images) == 2 else 1.1))
