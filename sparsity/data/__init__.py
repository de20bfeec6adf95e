"""Data sets as whole tensors: loaders, the validation split, and batches.

A loader returns a `Source`: (train, test, num_classes[, validation]), each set an `Images`, a `Files` or a pair of
tensors (images [n, *shape], labels [n]).
"""

from sparsity.data.folder import image_folder
from sparsity.data.sets import Files, Images, count_batches, cut, lies_on, select
from sparsity.data.splits import Source, Splits, split
from sparsity.data.standard import cifar10, digits, fashion_mnist, mnist

__all__ = [
    "Files",
    "Images",
    "Source",
    "Splits",
    "cifar10",
    "count_batches",
    "cut",
    "digits",
    "fashion_mnist",
    "image_folder",
    "lies_on",
    "mnist",
    "select",
    "split",
]
