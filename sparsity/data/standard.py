"""Loaders of the standard data sets."""

import contextlib
import os
from pathlib import Path

import torch

from sparsity.data.sets import Images
from sparsity.data.splits import Source
from sparsity.errors import DataError
from sparsity.files import obstacle


def mnist(*, root: str) -> Source:
    """MNIST: 60,000 + 10,000 handwritten digits, 1×28×28; LeCun et al., 1998."""
    return _torchvision("MNIST", root, "MNIST/raw", "train-images-idx3-ubyte, …")


def fashion_mnist(*, root: str) -> Source:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 1×28×28; Xiao et al., 2017."""
    return _torchvision("FashionMNIST", root, "FashionMNIST/raw", "train-images-idx3-ubyte, …")


def cifar10(*, root: str) -> Source:
    """CIFAR-10: 50,000 + 10,000 photographs of 10 classes, 3×32×32; Krizhevsky, 2009."""
    return _torchvision("CIFAR10", root, "cifar-10-batches-py", "data_batch_1, …")


def _torchvision(name: str, root: str, folder: str, files: str) -> Source:
    """Both parts of a data set of torchvision's, downloaded where they are missing."""
    from torchvision import datasets

    base = Path(os.path.expanduser(root)).absolute()
    place = base / folder
    found = sorted(place.iterdir()) if place.is_dir() else []
    there, sets = bool(found), []
    missing = [each for each in (place, *place.parents) if not each.exists()]
    for file in found:
        other = None if file.is_file() or file.is_dir() else obstacle(file)
        if other is not None:  # a pipe would be waited for
            raise DataError(_loader_trouble(name, root, place, files, True, ValueError(f"{file.name} is {other}")))
    for train in (True, False):
        try:
            part = getattr(datasets, name)(str(base), train=train, download=True)
        except Exception as error:  # the readers raise whatever their file makes them trip over
            for each in missing:  # torchvision makes them before it downloads
                with contextlib.suppress(OSError):  # something was downloaded
                    each.rmdir()
            raise DataError(_loader_trouble(name, root, place, files, there, error)) from error
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        if len(images) != len(labels):
            which = "training" if train else "test"
            mismatch = ValueError(f"{len(images)} {which} images and {len(labels)} labels")
            raise DataError(_loader_trouble(name, root, place, files, True, mismatch))
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        sets.append(Images(images, labels.long()))
    if [len(part) for part in sets] == SWAPPED:
        swapped = ValueError("training and test files are swapped")
        raise DataError(_loader_trouble(name, root, place, files, True, swapped))
    return Source(*sets, num_classes=len(part.classes), classes=part.classes, places=[str(place)])


SWAPPED = [10_000, 60_000]  # images of MNIST and its like whose files bear each other's names


def _loader_trouble(name: str, root: str, place: Path, files: str, there: bool, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if there:
        return f"data.root={root}: the {name} files in {place} are damaged or incomplete ({reason}): replace them"
    return (
        f"data.root={root} holds no {name}, and downloading it failed ({reason}): put the files ({files}) "
        f"into {place}, set data.root or SPARSITY_DATA to a folder that has them, or take data=digits, which needs none"
    )


def digits() -> Source:
    """The 1,797 handwritten digits inside scikit-learn, brought from 8×8 to 1×28×28; every fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    # 24×24 in a frame of 2, as MNIST frames its own
    large = torch.nn.functional.interpolate(small, size=(24, 24), mode="bilinear", align_corners=False)
    images = torch.nn.functional.pad(large.mul(255).round().byte(), (2, 2, 2, 2))
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(labels)) % 5 == 4
    sets = (Images(images[part], labels[part]) for part in (~is_test, is_test))
    return Source(*sets, num_classes=10, classes=[str(name) for name in bunch.target_names])
