"""A finished stage as the store keeps it: computed, written down member by member, checked and taken back."""

import math
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsity.experiment.plan import Planned
from sparsity.population import PARTS, Population
from sparsity.stages.context import DEEDS, Context, Outcome
from sparsity.store import Damaged, Kept
from sparsity.training import Epoch

PER_MEMBER = ("loss", "penalty", "objective", "validation", "test")  # the numbers of an epoch that are each member's


def notes_of(outcome: Outcome) -> list[dict[str, Any]]:
    """What there is to say of each member after a stage, as JSON takes it."""
    members = range(outcome.population.num_members)
    epochs, diverged, own = outcome.selected_epoch, outcome.diverged, outcome.notes
    return [
        {
            "did": list(outcome.did),
            "history": [_row(epoch, member) for epoch in outcome.history],
            "selected_epoch": epochs[member] if epochs else None,
            "diverged": diverged[member] if diverged else None,
            **(own[member] if own else {}),
        }
        for member in members
    ]


def circumstances(stage: Planned, population: Population, context: Context) -> dict[str, Any]:
    """What a stage was computed with that its key leaves out, and its numbers may depend on in their last bits."""
    device, loop = population.device, stage.loop(population, context)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "members": len(context.seeds),
        "step": loop.way if loop else None,
    }


def _row(epoch: Epoch, member: int) -> dict[str, Any]:
    """One member's numbers of an epoch."""
    return {
        name: value[member] if name in PER_MEMBER and value is not None else value
        for name, value in epoch._asdict().items()
    }


def epoch_of(row: Mapping[str, Any]) -> Epoch:
    """An epoch of one member from its numbers."""
    return Epoch(
        **{name: [value] if name in PER_MEMBER and value is not None else value for name, value in row.items()}
    )


def tensors_of(population: Population, index: int) -> dict[str, Tensor]:
    """One member's tensors under the names that the store keeps them by, such as `masks.fc1.weight`."""
    return {
        f"{part}.{name}": tensor[index].detach().to("cpu", copy=True).contiguous()
        for part in PARTS
        for name, tensor in getattr(population, part).items()
    }


def population_of(tensors: Mapping[str, Tensor], like: Population, device: torch.device) -> Population:
    """A population of one from the tensors that the store keeps, in the order that the module has them in."""
    names = {**dict.fromkeys(like.parameters), **dict.fromkeys(like.buffers)}
    parts = {
        part: {name: tensors[f"{part}.{name}"].to(device).unsqueeze(0) for name in names if f"{part}.{name}" in tensors}
        for part in PARTS
    }
    return replace(like, **parts)


# --- checks ----------------------------------------------------------------------------------------------------------


def check(kept: Kept, like: Population) -> None:
    """Refuses a stage that is none of this network: other tensors, or a note that lacks what a result takes from it.

    like: the member before the stage.
    """
    _check_tensors(kept.tensors, like)
    note = kept.note
    numbers = [note["seconds"], note["accuracy"]["test"], note["accuracy"]["validation"]]
    numbers += [number for name in ("stds", "thresholds") for number in note.get(name, {}).values()]
    numbers.append(note.get("decay"))
    numbers += [number for ends in (note.get("quantized") or {"inputs": {}})["inputs"].values() for number in ends]
    course = note.get("course", {"steps": [], "densities": {}})
    places = [course["steps"], *course["densities"].values()]
    numbers += [number for each in places for number in each]
    rows = [epoch_of(row) for row in note["history"]]
    numbers += [number for row in note["history"] for number in row.values()]
    if note["selected_epoch"] is not None:
        rows[note["selected_epoch"]]
    if note["diverged"] is not None:
        raise Damaged("it is of a loss that diverged")
    if any(isinstance(number, bool) or not isinstance(number, int | float | None) for number in numbers):
        raise Damaged("its note holds other things than numbers")
    if any(len(each) != len(course["steps"]) for each in places):
        raise Damaged("its densities are not those of its steps")
    if not math.isfinite(note["seconds"]) or not isinstance(note["computed_with"], dict):
        raise Damaged("its note does not say how it was computed")
    if not set(note["did"]) <= set(DEEDS):
        raise Damaged("its note does not say what it did")


def _check_tensors(tensors: Mapping[str, Tensor], like: Population) -> None:
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    wanted = {
        f"{part}.{name}": (tensor.dtype, tensor.shape[1:])
        for part in ("parameters", "buffers")
        for name, tensor in getattr(like, part).items()
    }
    masks = {f"masks.{name}": (torch.bool, tensor.shape[1:]) for name, tensor in like.parameters.items()}
    if wanted.items() - found.items() or found.items() - wanted.items() - masks.items():
        raise Damaged("its tensors are not the network's")
