"""What results say of accuracy, whatever the recipe: dense, regularized, pruned, selected, last, best and final."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity.stages import MASKED, PENALIZED, SELECTED
from sparsity.training import Epoch

Accuracy = dict[str, float | None]
NOTHING: Accuracy = {"validation": None, "test": None}


def accuracies(
    stages: Sequence[Mapping[str, Any]], given: Accuracy | None, histories: Mapping[str, Sequence[Epoch]]
) -> dict[str, Any]:
    """The accuracies of one member by where they were measured, each of the last stage of its kind.

    dense: before the first mask, without a penalty, in all bits; regularized: after a penalty; pruned: after masking;
    selected, last, best: of the epochs of the stage that selects; final: at the end. given: of the weights that the
    member starts from; histories: of one member, by stage.
    """
    found: dict[str, Any] = {
        "dense": given or NOTHING,
        "regularized": last_of(stages, PENALIZED, "accuracy", NOTHING),
        "pruned": last_of(stages, MASKED, "accuracy", NOTHING),
    }
    for stage in before_masks(stages):
        if PENALIZED not in stage["did"]:
            found["dense"] = stage["accuracy"]
    found |= {"selected": {**NOTHING, "epoch": None}, "last": NOTHING, "best": {"test": None, "epoch": None}}
    found["final"] = stages[-1]["accuracy"] if stages else given
    rows = histories.get(last_of(stages, SELECTED, "name"))
    if not rows:
        return found
    epoch = last_of(stages, SELECTED, "selected_epoch")
    if epoch is not None:
        found["selected"] = {**_accuracy(rows[epoch]), "epoch": epoch}
    found["last"] = _accuracy(rows[-1])
    able = [row for row in rows if row.epoch >= last_of(stages, SELECTED, "final_from", 0)]  # as small as what is kept
    best = max(able or rows[-1:], key=lambda row: row.test[0])  # the first of equals
    found["best"] = {"test": best.test[0], "epoch": best.epoch}
    return found


def before_masks(stages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The stages before the first that masks."""
    first = next((place for place, stage in enumerate(stages) if MASKED in stage["did"]), len(stages))
    return stages[:first]


def last_of(stages: Sequence[Mapping[str, Any]], deed: str, key: str, missing: Any = None) -> Any:
    """What the last stage that did something has under a key."""
    return next((stage.get(key, missing) for stage in reversed(stages) if deed in stage["did"]), missing)


def selection(stages: Sequence[Mapping[str, Any]]) -> str:
    """How the network that a run hands back was chosen, in words."""
    name, epoch = (last_of(stages, SELECTED, key) for key in ("name", "selected_epoch"))
    if name is None:
        return "no epoch was selected: the network is that after the last stage"
    end = "" if stages[-1]["name"] == name else f"the network is that after {stages[-1]['name']}"
    if epoch is None:
        end = end or f"the network is that of the last epoch of {name}"
        return f"nothing was selected (data.validation=0): {end}"
    return f"epoch {epoch} of {name}, selected by validation accuracy" + (f"; {end}" if end else "")


def _accuracy(row: Epoch) -> Accuracy:
    return {"validation": row.validation and row.validation[0], "test": row.test and row.test[0]}
