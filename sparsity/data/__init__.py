"""Data sets as whole tensors: loaders, the validation split, and batches.

A loader returns a `Source`: (train, test, num_classes[, validation[, classes]]), each set an `Images`, a `Files` or a
pair of tensors (images [n, *shape], labels [n]).
"""

from sparsity.data.arrays import arrays
from sparsity.data.disk import file_state, state_of
from sparsity.data.folder import image_folder
from sparsity.data.sets import Files, Images, count_batches, cut, lies_on, select
from sparsity.data.splits import Source, Splits, as_source, hold_out, split
from sparsity.data.standard import cifar10, digits, fashion_mnist, mnist

__all__ = [
    "Files",
    "Images",
    "Source",
    "Splits",
    "arrays",
    "as_source",
    "cifar10",
    "count_batches",
    "cut",
    "digits",
    "fashion_mnist",
    "file_state",
    "hold_out",
    "image_folder",
    "lies_on",
    "mnist",
    "select",
    "split",
    "state_of",
]
