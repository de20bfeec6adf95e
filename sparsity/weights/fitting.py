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
    taken = _values(chosen, own, f"{key}={source}")
    warnings = _check_numbers(taken, own, f"{key}={source}")
    _write(module, taken, own, f"{key}={source}")
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
    masks = [name for name in judged.left_out if name.endswith("mask") and name not in (*auxiliary, *elsewhere)]
    if masks:
        lines.append(f"{source}: the weights are zero where {listed(masks)} are: these are left out")
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


def _values(judged: Judged, own: Own, source: str) -> Tensors:
    """The tensors that a reading takes, under the model's names, a tied one under its first."""
    taken: Tensors = {}
    tensors = judged.reading.states.tensors
    for name, theirs in judged.reading.names.items():
        first, mine = own.tied[name], own.tensors[name]
        is_other_counter = leaf(name) in COUNTERS and tensors[theirs].shape != mine.shape
        if name in own.head or theirs not in tensors or is_other_counter:
            continue
        tensor = tensors[theirs] if tensors[theirs].layout is torch.strided else tensors[theirs].to_dense()
        tensor = tensor.sum(1, keepdim=True) if name in judged.summed else tensor
        if first in taken and not torch.equal(taken[first], tensor):
            raise WeightsError(f"{source}: {first} and {name} are one tensor in the model, and differ in the file")
        taken[first] = tensor
    return taken


def _check_numbers(taken: Tensors, own: Own, source: str) -> list[str]:
    """Refuses what is no number, or none in the model's number type; a line about what becomes zero in it."""
    bad, beyond, vanished = [], [], []
    for name, tensor in taken.items():
        mine, written = own.tensors[name].detach(), tensor.to(own.tensors[name].dtype)
        is_finite = written.isfinite()
        if not is_finite.all() and (isinstance(mine, nn.Parameter) or not torch.equal(is_finite, mine.isfinite())):
            (beyond if tensor.isfinite().all() else bad).append(name)
        elif tensor.dtype is torch.float64 and tensor.count_nonzero() != written.count_nonzero():
            vanished.append(name)
    if bad:
        raise WeightsError(f"{source} holds NaN or infinity in {listed(bad)}: take another checkpoint")
    if beyond:
        raise WeightsError(f"{source} is too large for float32, NaN or infinity there, in {listed(beyond)}")
    line = f"{source}: entries of {listed(vanished)} are too small for float32, and are zero here"
    return [line] if vanished else []


def _write(module: nn.Module, taken: Tensors, own: Own, source: str) -> None:
    state = OrderedDict(module.state_dict())
    state |= {name: taken[first] for name, first in own.tied.items() if first in taken}
    state._metadata = module.state_dict()._metadata  # the versions that layers wrote it in, as torch hands them on
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:  # a module may read its state in its own way
        raise WeightsError(f"{source} is refused by the model: {reason(error)}") from error


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
    except Exception:  # whatever a custom module may raise; that it does not take images is told elsewhere
        return []
