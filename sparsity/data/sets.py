"""A set of labelled images: held whole as tensors, or as files that are read when a batch asks for them."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.memory import free_bytes


@dataclass(frozen=True)
class Images:
    """A set held whole: images [n, *shape], uint8 or already floating point, and labels [n]."""

    images: Tensor
    labels: Tensor
    device: torch.device | None = None  # of the batches; None: where the set is

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> "Images":
        """The set on a device; one that would fill half a GPU's free memory stays, and its batches go there."""
        device = torch.device(device)
        if device.type == "cuda" and self.num_bytes > free_bytes(device) / 2:
            return replace(self, device=device)
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        """The images and labels of an index [k]."""
        index = index.to(self.images.device)
        return replace(self, images=select(self.images, index), labels=self.labels[index])

    def keep(self, pixels: Tensor) -> "Images":
        """The set with some pixels of each flattened image alone: [n, kept]."""
        return replace(self, images=self.images.flatten(1)[:, pixels.to(self.images.device)])

    def batches(self, order: Tensor, batch_size: int) -> Iterator["Images"]:
        """Batches of [members, batch] images in the members' orders [members, n]."""
        target = self.device or self.images.device
        for index in cut(order.to(self.images.device), batch_size):
            yield Images(select(self.images, index).to(target), self.labels[index].to(target))

    @property
    def num_bytes(self) -> int:
        """The memory that the set takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.images, self.labels))


@dataclass(frozen=True)
class Files:
    """A set too large for memory: each image is read from its file when a batch asks for it."""

    paths: list[str]
    labels: Tensor
    shape: tuple[int, ...]
    read: Callable[[str], Tensor]  # a path to an image of `shape`, uint8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    digests: Tensor | None = None  # of the files' content [n, bytes], uint8

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_bytes(self) -> int:
        """The memory that the set takes."""
        return self.labels.numel() * self.labels.element_size()

    def to(self, device: torch.device | str) -> "Files":
        """The set with its batches on a device."""
        return replace(self, device=torch.device(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> "Files":
        """The files and labels of an index [k]."""
        digests = None if self.digests is None else self.digests[index]
        return replace(self, paths=[self.paths[i] for i in index.tolist()], labels=self.labels[index], digests=digests)

    def join(self, other: "Files") -> "Files":
        """Both sets as one."""
        digests = None if self.digests is None or other.digests is None else torch.cat([self.digests, other.digests])
        labels = torch.cat([self.labels, other.labels])
        return replace(self, paths=self.paths + other.paths, labels=labels, digests=digests)

    def keep(self, pixels: Tensor) -> "Files":
        """The set with some pixels of each flattened image alone."""
        pixels = pixels.cpu()
        return replace(self, shape=(len(pixels),), read=lambda path: self.read(path).flatten()[pixels])

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Images]:
        """Batches of [members, batch] images in the members' orders [members, n]; the next is read meanwhile."""
        order = order.cpu()
        with ThreadPoolExecutor(max_workers=num_readers()) as readers:
            ahead = None
            for index in cut(order, batch_size):
                reading = [readers.submit(self.read, self.paths[i]) for i in index.flatten().tolist()]
                if ahead is not None:
                    yield self._collect(*ahead)
                ahead = reading, index
            if ahead is not None:
                yield self._collect(*ahead)

    def _collect(self, reading: list[Any], index: Tensor) -> Images:
        images = torch.stack([future.result() for future in reading])
        images = images.reshape(*index.shape, *self.shape).to(self.device, non_blocking=True)
        return Images(images, self.labels[index.to(self.labels.device)])


def num_readers() -> int:
    """How many threads read images: as many as there are cores for this process, and one that waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, cores)


def cut(order: Tensor, batch_size: int) -> list[Tensor]:
    """An order [..., n] in batches; a last batch of one joins the one before, as batch normalisation needs two."""
    batches = list(order.split(batch_size, dim=-1))
    if len(batches) > 1 and batches[-1].shape[-1] == 1:
        batches[-2:] = [torch.cat(batches[-2:], dim=-1)]
    return batches


def select(images: Tensor, index: Tensor) -> Tensor:
    """Images [*index, *shape] of a set [n, *shape]: whole rows are copied, which indexing does entry by entry."""
    return images.index_select(0, index.reshape(-1)).view(*index.shape, *images.shape[1:])


def lies_on(data: Images | Files, device: torch.device) -> bool:
    """Whether a set is held whole on a device."""
    return isinstance(data, Images) and data.device is None and data.images.device == device


def count_batches(num_images: int, batch_size: int) -> int:
    """The number of batches that `cut` makes."""
    return len(cut(torch.empty(num_images), batch_size))
