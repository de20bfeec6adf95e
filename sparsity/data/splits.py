"""The three sets of a run: what a loader returned, checked, and the validation split."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.data.picture import shown
from sparsity.data.scaling import column, scaled
from sparsity.data.sets import Files, Images
from sparsity.errors import ConfigError, DataError


class Source(NamedTuple):
    """What a loader returns; without a validation set of its own, one is split from train."""

    train: Any
    test: Any
    num_classes: int
    validation: Any = None
    classes: Sequence[str] | None = None  # their names, in the order of the outputs
    notes: Sequence[str] = ()  # what there is to say of the data
    idle: Mapping[str, str] = {}  # settings that this data makes no use of, and why
    places: Sequence[str] = ()  # the files and folders that it was read from


def as_source(given: Any) -> Source:
    """What a loader returned, by names."""
    try:
        return Source(*given)
    except TypeError as error:
        raise DataError("a loader must return (train, test, num_classes), or (…, validation, classes) too") from error


@dataclass(frozen=True)
class Splits:
    """The three sets that a run uses, and how their pixels are scaled."""

    train: Images | Files
    validation: Images | Files | None
    test: Images | Files
    num_classes: int
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None
    classes: list[str] | None = None  # their names, in the order of the outputs
    notes: Sequence[str] = ()  # what there is to say of the data
    idle: Mapping[str, str] = field(default_factory=dict)  # settings that this data makes no use of, and why

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.train.shape

    def example(self) -> Tensor:
        """Two scaled images [2, *shape], on the CPU: enough for a module to show what it does."""
        return self.scale(next(self.test.batches(torch.zeros(1, 2, dtype=torch.long), 2)).images[0].cpu())

    def to(self, device: torch.device | str) -> "Splits":
        """The splits on a device."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), validation=validation, test=self.test.to(device))

    def keep(self, pixels: Tensor) -> "Splits":
        """The splits with some pixels [kept] of each flattened image alone, each scaled as before."""

        def numbers(given: list[float] | None) -> list[float] | None:
            if given is None or len(given) == 1:
                return given
            size = torch.Size(self.input_shape[1:]).numel()
            return [given[pixel // size] for pixel in pixels.tolist()]

        train, validation, test = (part and part.keep(pixels) for part in (self.train, self.validation, self.test))
        mean, std = numbers(self.mean), numbers(self.std)
        return replace(self, train=train, validation=validation, test=test, mean=mean, std=std)

    def scale(self, images: Tensor) -> Tensor:
        """Images [..., channels, *positions] as the network takes them: uint8 to [0, 1], then (x − mean) / std."""
        if self.mean is None:
            return scaled(images, None, None)
        num_axes = len(self.input_shape)
        return scaled(images, *(_column(tuple(numbers), num_axes, images.device) for numbers in (self.mean, self.std)))


_column = functools.lru_cache(column)  # made once, not once a batch


def split(source: Any, *, validation: float, seed: int, normalize: dict[str, list[float]] | None) -> Splits:
    """The splits of a loader's source: validation is taken from train, at random by a seed of its own.

    validation: a share of train below 1, or a number of images; 0 trains on everything. A source that brings its own
    validation set keeps it unless validation is 0.
    """
    source = as_source(source)
    given = (source.train, source.test, source.validation)
    train, test, held_out = (_as_set(part, name) for part, name in zip(given, SETS))
    _check_labels(train, test, held_out, source.num_classes)
    num_classes, idle = source.num_classes, dict(source.idle)
    if held_out is None and validation:
        size = round(validation * len(train)) if validation < 1 else int(validation)
        if not 0 < size < len(train):
            raise ConfigError(
                f"data.validation must leave images on both sides, got {validation:g} of {len(train)} training images: "
                "give a share below 1, a smaller number, or 0 for none"
            )
        kept, held = hold_out(train.labels, size, seed)
        train, held_out = train.take(kept), train.take(held)
    elif held_out is not None and validation:
        idle |= dict.fromkeys(("data.validation", "data.validation_seed"), "the data brings its own validation set")
    elif held_out is not None:
        train, held_out = _joined(train, held_out), None
    mean, std = _checked_normalization(normalize, train.shape)
    classes = _checked_names(source.classes, source.num_classes)
    notes = [*source.notes, *_lacking({"train": train, "validation": held_out, "test": test}, classes, num_classes)]
    return Splits(train, held_out, test, num_classes, mean, std, classes, notes, idle)


def hold_out(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two random indexes of labels [n]: those that are kept, and `size` others; all classes are among those kept.

    Where chance leaves a class out, its first image is exchanged for one of the class that has most.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept, held = order[size:].clone(), order[:size].clone()
    for label in sorted(set(labels[held].unique().tolist()) - set(labels[kept].unique().tolist())):
        counts = labels[kept].bincount()
        most = int(counts.argmax())
        if counts[most] < 2:
            break  # fewer images are kept than there are classes
        ours, theirs = (labels[kept] == most).nonzero()[-1], (labels[held] == label).nonzero()[0]
        kept[ours], held[theirs] = held[theirs].clone(), kept[ours].clone()
    return kept, held


def split_off(part: Images | Files, share: float, remedy: str) -> tuple[Images | Files, Images | Files]:
    """Train and test of a set that has both; the split is always the same.

    remedy: what a user can do where the share leaves one of them empty, beside giving another.
    """
    size = round(share * len(part))
    if not 0 < size < len(part):
        raise ConfigError(
            f"data.loader.test={share:g} leaves {len(part) - size} images to train and {size} to test on: give a share "
            f"that leaves both, or {remedy}"
        )
    kept, held = hold_out(part.labels, size, seed=0)
    return part.take(kept), part.take(held)


SETS = ("train", "test", "validation")


def _as_set(part: Any, name: str) -> Images | Files | None:
    """A set from what a loader gave: one of ours, a pair of tensors, or None."""
    if part is None and name == "validation":
        return None
    if not isinstance(part, (Images, Files)):
        try:
            images, labels = part
            part = Images(torch.as_tensor(images), torch.as_tensor(labels))
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the {name} set of a loader must be a pair (images, labels) of tensors") from error
    if isinstance(part, Images):
        part = _checked_images(part, name)
    if len(part) == 0:
        raise DataError(f"the {name} set is empty: give it at least one image")
    if isinstance(part, Images) and len(part.images) != len(part.labels):
        raise DataError(f"the {name} set has {len(part.images)} images and {len(part.labels)} labels: they must match")
    return part


def _checked_images(part: Images, name: str) -> Images:
    """A held set whose images are uint8 or finite float32, with one label an image."""
    images, labels = part.images.detach(), part.labels
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"the {name} labels must be whole numbers [n], got {labels.dtype} {list(labels.shape)}")
    if images.is_floating_point():
        images = images.float()
        if not images.isfinite().all():
            raise DataError(f"the {name} images hold NaN or infinity: mend them")
    elif images.dtype is not torch.uint8:
        raise DataError(f"the {name} images must be uint8 or floating point, got {images.dtype}")
    return Images(images, labels.long())


def _joined(one: Images | Files, other: Images | Files) -> Images | Files:
    """Two sets as one."""
    if isinstance(one, Files):
        return one.join(other)
    labels = torch.cat([one.labels, other.labels])
    return Images(torch.cat([one.images, other.images]), labels)


def _check_labels(train: Any, test: Any, validation: Any, num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 2:
        raise DataError(f"the data has {num_classes} class(es): a classifier needs a whole number of at least 2")
    for name, part in zip(SETS, (train, test, validation)):
        if part is None:
            continue
        if part.shape != train.shape:
            raise DataError(f"the {name} images are {list(part.shape)}, the training images {list(train.shape)}")
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= num_classes:
            raise DataError(f"the {name} labels reach from {low} to {high}: they must lie in 0…{num_classes - 1}")


def _checked_names(names: Sequence[str] | None, num_classes: int) -> list[str] | None:
    if names is None:
        return None
    names = [str(name) for name in names]
    if len(set(names)) != num_classes or len(names) != num_classes:
        raise DataError(f"a loader must name each of its {num_classes} classes by another name, got {names[:8]}")
    return names


def _lacking(sets: Mapping[str, Any], classes: Sequence[str] | None, num_classes: int, most: int = 5) -> list[str]:
    """A line for each set that has no image of some class."""
    lines = []
    for name, part in sets.items():
        lacking = [] if part is None else (part.labels.bincount(minlength=num_classes) == 0).nonzero().flatten()
        if len(lacking):
            names = [str(int(label)) if classes is None else shown(classes[int(label)]) for label in lacking[:most]]
            which = "class" if len(lacking) == 1 else f"{len(lacking)} of {num_classes} classes:"
            more = f" and {len(lacking) - most} more" if len(lacking) > most else ""
            lines.append(f"{name} has no image of {which} {', '.join(names)}{more}")
    return lines


def _checked_normalization(normalize: Any, shape: tuple[int, ...]) -> tuple[list[float] | None, list[float] | None]:
    if normalize is None:
        return None, None
    for name, numbers in (("mean", normalize.mean), ("std", normalize.std)):
        if len(numbers) not in (1, shape[0]):
            raise ConfigError(
                f"data.normalize.{name} must hold 1 number or one for each of {shape[0]} channels, got {numbers}"
            )
    return list(normalize.mean), list(normalize.std)
