"""What a network's library is called with: the tensors of one member, and a set's images as they lie."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsity.data import Images, Splits

Result = TypeVar("Result")
MOST_THREADS = 16  # of a member: the library's PARTS


class Parameter(ctypes.Structure):
    """A parameter of one member, as the library takes it."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("value", "first", "second", "mask", "added")]
    _fields_ += [("is_penalised", ctypes.c_int64)]


NUMBERS = ("beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")


class Rule(ctypes.Structure):
    """The numbers of the penalty and the optimizer."""

    _fields_ = [("penalty", ctypes.c_int64), ("kind", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_double) for name in NUMBERS]
    _fields_ += [("nesterov", ctypes.c_int64), ("rate", ctypes.c_double), ("decay", ctypes.c_double)]
    _fields_ += [("number", ctypes.c_int64)]


class Arguments(ctypes.Structure):
    """What a call is given."""

    _fields_ = [("images", ctypes.c_void_p), ("is_float", ctypes.c_int64), ("mean", ctypes.c_void_p)]
    _fields_ += [("deviation", ctypes.c_void_p), ("channels", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("labels", "order", "sizes", "rates", "decays")]
    _fields_ += [("steps", ctypes.c_int64), ("threads", ctypes.c_int64), ("tensors", ctypes.c_void_p)]
    _fields_ += [("rule", Rule), ("sums", ctypes.c_void_p)]


class Source:
    """Remembers a set's tensors, and how their pixels are scaled, where the library can read them."""

    def __init__(self, images: Images, splits: Splits):
        self.images, self.labels = images.images.contiguous(), images.labels.contiguous()
        # what lies flat has pixels' own numbers
        self.channels = self.images.shape[1] if splits.mean is not None and len(splits.mean) > 1 else 1
        self.scaling = [torch.tensor(each or [], dtype=torch.float32) for each in (splits.mean, splits.std)]

    def arguments(self, parameters: ctypes.Array, threads: int, **tensors: Tensor) -> Arguments:
        """A call on images of the set; what it is given must live as long as the call."""
        mean, deviation = (each.data_ptr() if len(each) else None for each in self.scaling)
        return Arguments(
            images=self.images.data_ptr(),
            is_float=int(self.images.is_floating_point()),
            mean=mean,
            deviation=deviation,
            channels=self.channels,
            labels=self.labels.data_ptr(),
            steps=len(tensors["sizes"]),
            threads=threads,
            tensors=ctypes.cast(parameters, ctypes.c_void_p),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )


def is_readable(images: Any) -> bool:
    """Whether there are kernels for a set: held whole, its pixels bytes or float32."""
    return isinstance(images, Images) and images.images.dtype in (torch.uint8, torch.float32)


def parameters_of(
    names: Sequence[str], member: int, penalised: Sequence[str] = (), **tensors: Mapping[str, Tensor]
) -> ctypes.Array:
    """The parameters of a member in the library's order, from tensors [members, *shape] by kind and name."""

    def parameter(name: str) -> Parameter:
        places = {kind: found[name][member].data_ptr() for kind, found in tensors.items() if name in found}
        return Parameter(**places, is_penalised=int(name in penalised))

    return (Parameter * len(names))(*map(parameter, names))


def side_by_side(function: Callable[[int, int], Result], num_members: int) -> list[Result]:
    """What a function of a member and its number of threads gives for each: one a core, the last ones on all of them.

    How many threads there are changes no bit.
    """
    most = min(MOST_THREADS, torch.get_num_threads())
    alone = num_members // most * most if num_members > 1 else 0
    with ThreadPoolExecutor(most) as cores:
        found = list(cores.map(function, range(alone), [1] * alone))
    return found + [function(member, most) for member in range(alone, num_members)]
