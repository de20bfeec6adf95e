"""Whether names of a file's can be taken for a model's: what is missing, left over, of another shape or kind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsity.tensors import Tensors
from sparsity.weights.names import Reading, readings
from sparsity.weights.reading import States

COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")  # of norms, averages, profilers
AUXILIARY = re.compile("aux", re.IGNORECASE)  # heads that only training used: aux1, AuxLogits, aux_head


class Own(NamedTuple):
    """What a module's state consists of."""

    tensors: Tensors
    tied: dict[str, str]  # each name → the first one of the same tensor
    head: frozenset[str] = frozenset()  # of the last layer that stays as drawn
    gray: str | None = None  # the first convolution, where the images have one channel and another file's may have more


@dataclass
class Judged:
    """A reading, and all that keeps it from fitting."""

    reading: Reading
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # without harm, but worth a word
    summed: list[str] = field(default_factory=list)  # over the channels of images, for gray ones

    @property
    def is_complete(self) -> bool:
        """Whether all that the model wants is there as it wants it."""
        return not (self.missing or self.shapes or self.kinds)

    @property
    def fits(self) -> bool:
        """Whether it is complete, and nothing is left over that should not be."""
        return self.is_complete and not self.unexpected

    @property
    def nearness(self) -> tuple[int, ...]:
        """How near it comes to fitting; the larger, the nearer."""
        num_found = len(self.reading.names)
        return num_found - len(self.shapes), num_found, -len(self.unexpected), -len(self.reading.place)


def own_of(module: nn.Module, head: Sequence[str], images: Tensor | None) -> Own:
    """The state of a module; head: the names of the last layer where it stays as drawn, else none."""
    tensors = {name: each for name, each in module.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(each), name) for name, each in tensors.items()}
    is_gray = bool(head) and images is not None and images.ndim == 4 and images.shape[1] == 1
    weights = [name for name, each in tensors.items() if each.ndim > 1]
    return Own(tensors, tied, frozenset(head), weights[0] if is_gray and weights else None)


def judge_all(states: Sequence[States], own: Own) -> list[Judged]:
    """Every reading of every state, judged; what one leaves is no trouble if it is all of another, an average say."""
    judged = [_judge(reading, own) for each in states for reading in readings(each, own.tensors)]
    complete = [each for each in judged if each.is_complete and each.unexpected]
    for each in complete:
        others = [other for other in judged if other.is_complete and other.reading.states is each.reading.states]
        taken = set(each.reading.names.values())
        used = {name for other in others for name in other.reading.names.values()} - taken
        each.unexpected = [name for name in each.unexpected if name not in used]
    return judged


def _judge(reading: Reading, own: Own) -> Judged:
    judged = Judged(reading)
    tensors, others = reading.states.tensors, reading.states.others
    found = {own.tied[name] for name in reading.names}
    judged.missing = [
        name
        for name, first in own.tied.items()
        if first == name and name not in found and name not in own.head and leaf(name) not in COUNTERS
    ]
    if not reading.names.keys() - own.head:
        judged.missing = judged.missing or ["all but the last layer"]
    for name, theirs in reading.names.items():
        if name in own.head or leaf(name) in COUNTERS:
            continue
        if theirs in others:
            judged.kinds[name] = f"{name} is {others[theirs]}"
        elif trouble := _kind(tensors[theirs], own.tensors[name]):
            judged.kinds[name] = f"{name} is {trouble}"
        elif name == own.gray and is_of_more_channels(tensors[theirs], own.tensors[name]):
            judged.summed.append(name)
        elif tensors[theirs].shape != own.tensors[name].shape:
            shapes = list(tensors[theirs].shape), list(own.tensors[name].shape)
            judged.shapes[name] = f"{name} is {shapes[0]} for {shapes[1]}"
    used = {place_of(tensors[name]) for name in reading.names.values() if name in tensors}
    for name in reading.left:
        inner = name.removeprefix(reading.prefix)
        is_again = name in tensors and place_of(tensors[name]) in used
        if name not in tensors or leaf(name) in COUNTERS or is_again:
            continue
        if _is_mask_that_holds(name, tensors):
            judged.left_out.append(name)
            continue
        is_elsewhere = not name.startswith(reading.prefix)
        is_head = bool(own.head) and _is_of_head(inner, name, reading, own)
        if is_elsewhere or is_head or AUXILIARY.search(inner.split(".")[0]):
            judged.left_out.append(name)
        else:
            judged.unexpected.append(name)
    return judged


def _is_mask_that_holds(name: str, tensors: Tensors) -> bool:
    """Whether a tensor is the mask beside a weight that is zero wherever the mask is, as some pruners keep it."""
    owner, _, own = name.rpartition(".")
    masked = own.removesuffix("mask").removesuffix("_") or "weight"
    weight, mask = tensors.get(f"{owner}.{masked}" if owner else masked), tensors[name]
    if not own.endswith("mask") or weight is None or weight.shape != mask.shape or mask.layout is not torch.strided:
        return False
    return not weight.detach().to_dense()[mask == 0].any()


def leaf(name: str) -> str:
    """What a tensor is called in its module: weight of fc1.weight."""
    return name.rpartition(".")[2]


def place_of(tensor: Tensor) -> tuple:
    """Where a tensor's entries lie in memory."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _kind(tensor: Tensor, own: Tensor) -> str | None:
    """What keeps a tensor's values from being one's own, or None."""
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype}): give the weights of the network before it was quantized"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "on the device meta, without values"
    if tensor.is_complex() != own.is_complex() or tensor.is_floating_point() != own.is_floating_point():
        return f"{tensor.dtype} for {own.dtype}"
    return None


def is_of_more_channels(tensor: Tensor, own: Tensor) -> bool:
    """Whether a convolution reads images of more channels, and is one's own but for that."""
    shape = tensor.shape
    return (
        len(shape) == own.ndim == 4
        and own.shape[1] == 1 < shape[1]
        and (shape[0], *shape[2:])
        == (
            own.shape[0],
            *own.shape[2:],
        )
    )


def _is_of_head(inner: str, name: str, reading: Reading, own: Own) -> bool:
    """Whether a name of the file's is of its last layer: under the name of the model's, or with the same inputs."""
    owners = {each.rpartition(".")[0] for each in own.head} - {""}
    if any(inner.startswith(f"{owner}.") for owner in owners):
        return True
    if own.head & reading.names.keys():
        return False
    tensors = reading.states.tensors
    layer = name.rpartition(".")[0]
    weights = [each for theirs, each in tensors.items() if theirs.rpartition(".")[0] == layer and each.ndim > 1]
    shapes = [own.tensors[each].shape[1:] for each in own.head if own.tensors[each].ndim > 1]
    return len(weights) == 1 and weights[0].shape[1:] in shapes
