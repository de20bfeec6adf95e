"""What keeps a file from fitting a model, told by what it is."""

from collections.abc import Mapping, Sequence

import torch

from sparsity.weights.judging import Judged, Own, is_of_more_channels, leaf
from sparsity.weights.names import common_prefix


def misfit(judged: Judged, own: Own, obstacles: Mapping[str, str], last: Sequence[str]) -> str:
    """What keeps the nearest reading from fitting, by what it is."""
    theirs = {name: each.shape for name, each in judged.reading.states.tensors.items()}
    if last and not judged.missing and not judged.unexpected and not judged.kinds and judged.shapes.keys() <= set(last):
        return (
            f"is of another number of classes: {listed(list(judged.shapes.values()))}; model.head=new draws the last "
            "layer anew and takes all others"
        )
    hindered = [f"{name} {obstacles[name]}" for name in judged.missing if name in obstacles]
    hindered += [] if hindered else [f"{name} {what}" for name, what in obstacles.items() if judged.missing]
    if hindered:
        return f"does not fit the model: {listed(hindered)}"
    if not judged.reading.names:
        return f"does not fit the model: {_strangers(theirs, own)}"
    lists = {
        "missing": judged.missing,
        "unexpected": judged.unexpected,
        "mis-shaped": list(judged.shapes.values()),
        "of another type": list(judged.kinds.values()),
    }
    trouble = [f"{word}: {listed(names)}" for word, names in lists.items() if names]
    return f"does not fit the model; {'; '.join([*trouble, *_facts(judged, theirs, own, last)])}"


def _strangers(theirs: Mapping[str, torch.Size], own: Own) -> str:
    """What two sets of names that share none have in common."""
    mine = {name: tensor.shape for name, tensor in own.tensors.items()}
    if list(theirs.values()) == list(mine.values()):
        pairs = [f"{name} → {other}" for name, other in zip(theirs, mine)]
        return f"all shapes fit in their order, but the names differ; rename {listed(pairs, 4)}"
    before, here = common_prefix(theirs), common_prefix(mine)
    begin = f", which begin with {before} and the model's do not" if before and before != here else ""
    return (
        f"no name is the model's; the file's {len(theirs)} are {listed(list(theirs), 3)}{begin}; "
        f"the model's {len(mine)} are {listed(list(mine), 3)}"
    )


def _facts(judged: Judged, theirs: Mapping[str, torch.Size], own: Own, last: Sequence[str]) -> list[str]:
    """What the differences come from, where that can be seen."""
    facts = []
    if judged.reading.prefix:
        facts.append(f"names begin with {judged.reading.prefix}, the model's do not")
    leaves = {leaf(name) for name in judged.missing}
    if leaves and leaves <= {"running_mean", "running_var"}:
        facts.append("the file is of a network whose normalisation keeps no running statistics")
    if judged.unexpected and {leaf(name) for name in judged.unexpected} <= {"running_mean", "running_var"}:
        facts.append("the model's normalisation keeps no running statistics")
    first = next((name for name, tensor in own.tensors.items() if tensor.ndim > 1), None)
    if first in judged.shapes:
        both = judged.reading.states.tensors[judged.reading.names[first]], own.tensors[first]
        other, ours = both[0].shape, both[1].shape
        if len(ours) == len(other) and ours[:1] + ours[2:] == other[:1] + other[2:]:
            what = "images of {} channels" if len(ours) == 4 else "{} inputs"
            summed = ", for which model.head=new would sum over them" if is_of_more_channels(*both) else ""
            facts.append(f"it is of {what.format(other[1])}, the data's have {ours[1]}{summed}")
    masks = [name for name in judged.unexpected if name.endswith("mask")]
    if masks:
        facts.append(f"weights are not zero where {listed(masks, 1)} is: multiply them and save that")
    if judged.shapes.keys() & set(last):
        facts.append("model.head=new would draw the last layer anew")
    if (judged.missing or judged.unexpected) and len(theirs) != len(own.tensors):
        facts.append(f"the file has {len(theirs)} tensors, the model {len(own.tensors)}")
    return facts


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
