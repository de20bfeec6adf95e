"""A file's tensors written into a module: found by name, each checked, what is left out or changed told."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsity.errors import WeightsError, reason
from sparsity.tensors import Tensors
from sparsity.weights.forms import plain
from sparsity.weights.head import last_layer
from sparsity.weights.judging import AUXILIARY, COUNTERS, Judged, Own, judge_all, leaf, own_of, place_of
from sparsity.weights.misfits import listed, misfit
from sparsity.weights.names import Reading
from sparsity.weights.reading import States


class Filled(NamedTuple):
    """A module with a file's tensors in it, and what the file held or lacked besides."""

    module: nn.Module
    warnings: list[str]


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
    last layer stays as the module has it, and a first convolution of more channels is summed over them for gray images,
    which is what it gives where these are repeated. Raises a WeightsError that says what does not fit.
    """
    states = [States((), dict(states))] if isinstance(states, Mapping) else states
    head = _head(module, images, key) if new_head else []
    own = own_of(module, head, images)
    judged = judge_all(states, own)
    fitting = [each for each in judged if each.fits]
    obstacles: dict[str, str] = {}
    if not fitting:
        put_together = [(each, *plain(each.tensors, own.tensors)) for each in states]
        obstacles = {name: line for _, _, hindered in put_together for name, line in hindered.items()}
        changed = [
            States(old.keys, new, old.others) for old, new, _ in put_together if new.keys() != old.tensors.keys()
        ]
        judged += judge_all(changed, own)
        fitting = [each for each in judged if each.fits]
    if not fitting:
        nearest = max(judged, key=lambda each: each.nearness)
        last = [] if new_head or not nearest.shapes else _try_head(module, images)
        raise WeightsError(f"{key}={source} {misfit(nearest, own, obstacles, last)}")
    chosen, others = _choose(fitting, f"{key}={source}")
    warnings = _write(module, chosen, own, f"{key}={source}")
    return Filled(module, [*others, *_told(chosen, head, f"{key}={source}"), *warnings])


def _choose(fitting: Sequence[Judged], source: str) -> tuple[Judged, list[str]]:
    """The one of several readings that is of the network itself, and a line that names the others."""
    different: dict[tuple, Judged] = {}
    for each in fitting:
        tensors, names = each.reading.states.tensors, each.reading.names
        places = tuple(place_of(tensors[names[name]]) for name in sorted(names) if names[name] in tensors)
        different.setdefault(places, each)
    if len(different) == 1:
        return fitting[0], []
    usual = [each for each in different.values() if each.reading.rank is not None]
    ranked = sorted(usual, key=lambda each: each.reading.rank)
    shown = [_shown(each.reading) for each in different.values()]
    if not ranked:
        raise WeightsError(f"{source} holds several states that fit the model, {listed(shown)}: save one alone")
    taken = _shown(ranked[0].reading)
    others = listed([place for place in shown if place != taken])
    return ranked[0], [f"{source}: {taken} is taken, and not {others}, which fits too; to take that, save it alone"]


def _shown(reading: Reading) -> str:
    where = ".".join((*reading.states.keys, *reading.prefix.split(".")[:-1]))
    return where or "that of the names as they are"


def _told(judged: Judged, head: Sequence[str], source: str) -> list[str]:
    """What is left out, or taken in another form than it has in the file."""
    lines, prefix = [], judged.reading.prefix
    auxiliary = [name for name in judged.left_out if AUXILIARY.search(name.removeprefix(prefix).split(".")[0])]
    elsewhere = [name for name in judged.left_out if not name.startswith(prefix)]
    if auxiliary:
        lines.append(f"{source}: the model has no {listed(_tops(auxiliary))}: left out")
    if elsewhere:
        lines.append(f"{source}: what is not under {prefix} is left out: {listed(_tops(elsewhere))}")
    if head:
        shown = ", ".join(_tops(head))
        lines.append(f"model.head=new: the last layer, {shown}, is drawn anew, and not read from {source}")
    lines += [f"{source}: {name} is summed over its channels, as for gray images repeated" for name in judged.summed]
    return lines


def _tops(names: Sequence[str]) -> list[str]:
    """The modules that names are of, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def _write(module: nn.Module, judged: Judged, own: Own, source: str) -> list[str]:
    """Writes the tensors into the module; lines about those that its number type cannot hold."""
    reading = judged.reading
    before = {name: tensor.detach().clone() for name, tensor in own.tensors.items()}
    new: Tensors = {}
    for name, theirs in reading.names.items():
        if name in own.head or theirs not in reading.states.tensors:
            continue
        if leaf(name) in COUNTERS and reading.states.tensors[theirs].shape != own.tensors[name].shape:
            continue
        tensor = reading.states.tensors[theirs]
        tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
        tensor = tensor.sum(1, keepdim=True) if name in judged.summed else tensor
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
        raise WeightsError(f"{source} holds NaN or infinity in {listed(bad)}: take another checkpoint")
    if beyond:
        raise WeightsError(f"{source} is too large for float32, NaN or infinity there, in {listed(beyond)}")
    line = f"{source}: entries of {listed(vanished)} are too small for float32, and are zero here"
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
