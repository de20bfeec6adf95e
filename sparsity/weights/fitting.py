"""A file's tensors written into a module: found by name, each checked, every misfit told by what it is."""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsity.errors import WeightsError, reason
from sparsity.tensors import Tensors
from sparsity.weights.forms import plain
from sparsity.weights.head import last_layer
from sparsity.weights.names import Reading, common_prefix, readings
from sparsity.weights.reading import States

COUNTERS = (
    "num_batches_tracked",
    "n_averaged",
    "total_ops",
    "total_params",
)  # no weights; of norms, averages, profilers
AUXILIARY = re.compile("aux", re.IGNORECASE)  # heads that only training used: aux1, AuxLogits, aux_head


class Filled(NamedTuple):
    """A module with a file's tensors in it, and what the file held or lacked besides."""

    module: nn.Module
    warnings: list[str]


class _Own(NamedTuple):
    """What a module's state consists of."""

    tensors: Tensors
    tied: dict[str, str]  # each name → the first one of the same tensor
    head: frozenset[str]  # of the last layer that stays as drawn


@dataclass
class _Judged:
    """A reading, and all that keeps it from fitting."""

    reading: Reading
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # without harm, but worth a word

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.shapes or self.kinds)

    @property
    def nearness(self) -> tuple[int, ...]:
        num_found = len(self.reading.names)
        return num_found - len(self.shapes), num_found, -len(self.unexpected), -len(self.reading.place)


def fill(
    module: nn.Module,
    states: Sequence[States] | Tensors,
    source: str | Path,
    key: str = "model.weights",
    *,
    images: Tensor | None = None,
    new_head: bool = False,
) -> Filled:
    """The module with the tensors of a file in it, by name; shapes must be the module's.

    states: of `read_states`, or one dict of tensors. images: a batch, by which the last layer is found. new_head: the
    last layer stays as the module has it. Raises a WeightsError that says what does not fit.
    """
    states = [States((), dict(states))] if isinstance(states, Mapping) else states
    head = _head(module, images, key) if new_head else []
    tensors = {name: each for name, each in module.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    first: dict[int, str] = {}
    own = _Own(tensors, {name: first.setdefault(id(each), name) for name, each in tensors.items()}, frozenset(head))

    judged = [_judge(reading, own) for each in states for reading in readings(each, tensors)]
    fitting = [each for each in judged if each.fits]
    obstacles: dict[str, str] = {}
    if not fitting:
        for each in states:
            put_together, hindered = plain(each.tensors, tensors)
            obstacles |= hindered
            if put_together.keys() != each.tensors.keys():
                changed = States(each.keys, put_together, each.others)
                judged += [_judge(reading, own) for reading in readings(changed, tensors)]
        fitting = [each for each in judged if each.fits]
    if not fitting:
        nearest = max(judged, key=lambda each: each.nearness)
        last = [] if new_head or not nearest.shapes else _try_head(module, images)
        raise WeightsError(f"{key}={source} {_misfit(nearest, own, obstacles, last)}")
    chosen, others = _choose(fitting, f"{key}={source}")
    warnings = _write(module, chosen.reading, own, f"{key}={source}")
    return Filled(module, [*others, *_told(chosen, head, f"{key}={source}"), *warnings])


def _judge(reading: Reading, own: _Own) -> _Judged:
    judged = _Judged(reading)
    tensors, others = reading.states.tensors, reading.states.others
    found = {own.tied[name] for name in reading.names}
    judged.missing = [
        name
        for name, first in own.tied.items()
        if first == name and name not in found and name not in own.head and _leaf(name) not in COUNTERS
    ]
    for name, theirs in reading.names.items():
        if name in own.head or _leaf(name) in COUNTERS:
            continue
        if theirs in others:
            judged.kinds[name] = f"{name} is {others[theirs]}"
        elif trouble := _kind(tensors[theirs], own.tensors[name]):
            judged.kinds[name] = f"{name} is {trouble}"
        elif tensors[theirs].shape != own.tensors[name].shape:
            shapes = list(tensors[theirs].shape), list(own.tensors[name].shape)
            judged.shapes[name] = f"{name} is {shapes[0]} for {shapes[1]}"
    used = {_place(tensors[name]) for name in reading.names.values() if name in tensors}
    for name in reading.left:
        inner = name.removeprefix(reading.prefix)
        is_again = name in tensors and _place(tensors[name]) in used
        if name not in tensors or _leaf(name) in COUNTERS or is_again:
            continue
        is_elsewhere = not name.startswith(reading.prefix)
        is_head = bool(own.head) and not own.head & reading.names.keys() and _is_like_head(name, reading, own)
        if is_elsewhere or is_head or AUXILIARY.search(inner.split(".")[0]):
            judged.left_out.append(name)
        else:
            judged.unexpected.append(name)
    return judged


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _place(tensor: Tensor) -> tuple:
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


def _is_like_head(name: str, reading: Reading, own: _Own) -> bool:
    """Whether a name of the file's is of another last layer than the model's: the same inputs under another name."""
    tensors = reading.states.tensors
    layer = name.rpartition(".")[0]
    weights = [each for theirs, each in tensors.items() if theirs.rpartition(".")[0] == layer and each.ndim > 1]
    shapes = [own.tensors[each].shape[1:] for each in own.head if own.tensors[each].ndim > 1]
    return len(weights) == 1 and weights[0].shape[1:] in shapes


def _choose(fitting: Sequence[_Judged], source: str) -> tuple[_Judged, list[str]]:
    """The one of several readings that is of the network itself, and a line that names the others."""
    different: dict[tuple, _Judged] = {}
    for each in fitting:
        tensors, names = each.reading.states.tensors, each.reading.names
        places = tuple(_place(tensors[names[name]]) for name in sorted(names) if names[name] in tensors)
        different.setdefault(places, each)
    if len(different) == 1:
        return fitting[0], []
    usual = [each for each in different.values() if each.reading.rank is not None]
    ranked = sorted(usual, key=lambda each: each.reading.rank)
    shown = [_shown(each.reading) for each in different.values()]
    if not ranked:
        raise WeightsError(f"{source} holds several states that fit the model, {_listed(shown)}: save one alone")
    taken = _shown(ranked[0].reading)
    others = _listed([place for place in shown if place != taken])
    return ranked[0], [f"{source}: {taken} is taken, and not {others}, which fits too; to take that, save it alone"]


def _shown(reading: Reading) -> str:
    where = ".".join((*reading.states.keys, *reading.prefix.split(".")[:-1]))
    return where or "that of the names as they are"


def _told(judged: _Judged, head: Sequence[str], source: str) -> list[str]:
    lines = []
    auxiliary = [name for name in judged.left_out if name.startswith(judged.reading.prefix)]
    elsewhere = [name for name in judged.left_out if name not in auxiliary]
    if auxiliary:
        lines.append(f"{source}: the model has no {_listed(_tops(auxiliary))}: left out")
    if elsewhere:
        lines.append(f"{source}: what is not under {judged.reading.prefix} is left out: {_listed(_tops(elsewhere))}")
    if head:
        lines.append(
            f"model.head=new: the last layer, {', '.join(_tops(head))}, is drawn anew, and not read from {source}"
        )
    return lines


def _tops(names: Sequence[str]) -> list[str]:
    """The modules that names are of, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def _write(module: nn.Module, reading: Reading, own: _Own, source: str) -> list[str]:
    """Writes the tensors into the module; lines about those that its number type cannot hold."""
    before = {name: tensor.detach().clone() for name, tensor in own.tensors.items()}
    new: Tensors = {}
    for name, theirs in reading.names.items():
        if name in own.head or theirs not in reading.states.tensors:
            continue
        if _leaf(name) in COUNTERS and reading.states.tensors[theirs].shape != own.tensors[name].shape:
            continue
        tensor = reading.states.tensors[theirs]
        tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
        first = own.tied[name]
        if first in new and not torch.equal(new[first], tensor):
            raise WeightsError(f"{source}: {first} and {name} are one tensor in the model, and differ in the file")
        new[first] = tensor
    state = OrderedDict(module.state_dict())
    state |= {name: new[first] for name, first in own.tied.items() if first in new}
    state._metadata = module.state_dict()._metadata  # the versions that layers wrote it in, as torch hands them on
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:  # a module may read its state in its own way
        raise WeightsError(f"{source} is refused by the model: {reason(error)}") from error
    bad, beyond, vanished = [], [], []
    for name, tensor in new.items():
        written, is_finite = own.tensors[name].detach(), own.tensors[name].detach().isfinite()
        if not is_finite.all() and not torch.equal(is_finite, before[name].isfinite()):
            (bad if not tensor.isfinite().all() else beyond).append(name)
        elif tensor.dtype is torch.float64 and tensor.count_nonzero() != written.count_nonzero():
            vanished.append(name)
    if bad:
        raise WeightsError(f"{source} holds NaN or infinity in {_listed(bad)}: take another checkpoint")
    if beyond:
        raise WeightsError(f"{source} is too large for float32, NaN or infinity there, in {_listed(beyond)}")
    line = f"{source}: entries of {_listed(vanished)} are too small for float32, and are zero here"
    return [line] if vanished else []


def _head(module: nn.Module, images: Tensor | None, key: str) -> list[str]:
    found = _try_head(module, images)
    if not found:
        raise WeightsError(
            f"model.head=new: the last layer of {type(module).__name__} cannot be found: {key} needs all"
        )
    return found


def _try_head(module: nn.Module, images: Tensor | None) -> list[str]:
    """The names of the last layer, or none where it cannot be found."""
    try:
        return [] if images is None else last_layer(module, images)
    except Exception:  # whatever a module of the user's own may raise; that it does not take images is told elsewhere
        return []


def _misfit(judged: _Judged, own: _Own, obstacles: Mapping[str, str], last: Sequence[str]) -> str:
    """What keeps the nearest reading from fitting, by what it is."""
    theirs = {name: each.shape for name, each in judged.reading.states.tensors.items()}
    if last and not judged.missing and not judged.unexpected and not judged.kinds and judged.shapes.keys() <= set(last):
        return (
            f"is of another number of classes: {_listed(list(judged.shapes.values()))}; model.head=new draws the last "
            "layer anew and takes all others"
        )
    hindered = [f"{name} {obstacles[name]}" for name in judged.missing if name in obstacles]
    hindered += [] if hindered else [f"{name} {what}" for name, what in obstacles.items() if judged.missing]
    if hindered:
        return f"does not fit the model: {_listed(hindered)}"
    if not judged.reading.names:
        return f"does not fit the model: {_strangers(theirs, own)}"
    lists = {
        "missing": judged.missing,
        "unexpected": judged.unexpected,
        "mis-shaped": list(judged.shapes.values()),
        "of another type": list(judged.kinds.values()),
    }
    trouble = [f"{word}: {_listed(names)}" for word, names in lists.items() if names]
    return f"does not fit the model; {'; '.join([*trouble, *_facts(judged, theirs, own, last)])}"


def _strangers(theirs: Mapping[str, torch.Size], own: _Own) -> str:
    """What two sets of names that share none have in common."""
    mine = {name: tensor.shape for name, tensor in own.tensors.items()}
    if list(theirs.values()) == list(mine.values()):
        pairs = [f"{name} → {other}" for name, other in zip(theirs, mine)]
        return f"all shapes fit in their order, but the names differ; rename {_listed(pairs, 4)}"
    before, here = common_prefix(theirs), common_prefix(mine)
    begin = f", which begin with {before} and the model's do not" if before and before != here else ""
    return (
        f"no name is the model's; the file's {len(theirs)} are {_listed(list(theirs), 3)}{begin}; "
        f"the model's {len(mine)} are {_listed(list(mine), 3)}"
    )


def _facts(judged: _Judged, theirs: Mapping[str, torch.Size], own: _Own, last: Sequence[str]) -> list[str]:
    """What the differences come from, where that can be seen."""
    facts = []
    if judged.reading.prefix:
        facts.append(f"names begin with {judged.reading.prefix}, the model's do not")
    leaves = {_leaf(name) for name in judged.missing}
    if leaves and leaves <= {"running_mean", "running_var"}:
        facts.append("the file is of a network whose normalisation keeps no running statistics")
    if judged.unexpected and {_leaf(name) for name in judged.unexpected} <= {"running_mean", "running_var"}:
        facts.append("the model's normalisation keeps no running statistics")
    first = next((name for name, tensor in own.tensors.items() if tensor.ndim > 1), None)
    if first in judged.shapes:
        ours, other = own.tensors[first].shape, judged.reading.states.tensors[judged.reading.names[first]].shape
        if len(ours) == len(other) and ours[:1] + ours[2:] == other[:1] + other[2:]:
            what = "images of {} channels" if len(ours) == 4 else "{} inputs"
            facts.append(f"it is of {what.format(other[1])}, the data's have {ours[1]}")
    if judged.shapes.keys() & set(last):
        facts.append("model.head=new would draw the last layer anew")
    if (judged.missing or judged.unexpected) and len(theirs) != len(own.tensors):
        facts.append(f"the file has {len(theirs)} tensors, the model {len(own.tensors)}")
    return facts


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
