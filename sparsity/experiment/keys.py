"""What determines each stage of a run, and the key in the store that follows from it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from sparsity import store
from sparsity.config import Call, Run
from sparsity.files import file_digest

# The code of a stage is every file of this package but those that change no number. What is left counts in a member's
# first stage, and so in all later ones; the code of one stage alone counts there.
NO_NUMBERS = ("__init__", "accounting", "callbacks", "config", "console", "errors", "files", "front", "kinds")
NO_NUMBERS += ("launcher", "memory", "processes", "results", "store", "streams", "sweeper", "tables")
NO_NUMBERS += ("experiment.__init__", "experiment.folder", "experiment.keys", "experiment.record")
OF_ONE_STAGE = {"regularizers": "regularize", "pruning": "prune", "compaction": "finetune"}


class Key(NamedTuple):
    """The key of one stage, and what it is the hash of."""

    key: str
    ingredients: dict[str, Any]


def stage_keys(run: Run, data: str, device: str, precision: str) -> dict[str, Key]:
    """The key of every stage of a run.

    data: the fingerprint of the images; device: its kind; precision: the resolved one.
    """
    place = {"format": store.FORMAT, "data": data, "device": device, "precision": precision, "seed": run.seed}
    before: Any = {"model": _call(run.model.factory), "weights": run.model.weights and _weights(run.model.weights)}
    before["code"] = store.our_code((*NO_NUMBERS, *OF_ONE_STAGE, *(() if run.model.weights else ("weights",))))
    before |= {} if run.model.head is None else {"head": run.model.head}
    keys: dict[str, Key] = {}
    for stage in run.stages:
        ingredients = {"stage": stage, "before": before, **place, **_own(stage, run), "code": _code(stage)}
        keys[stage] = Key(store.key_of(ingredients), ingredients)
        before = keys[stage].key
    return keys


def _code(stage: str) -> dict[str, str]:
    """Our code that this stage alone runs."""
    others = [room for room in store.our_code() if OF_ONE_STAGE.get(room.partition(".")[0]) != stage]
    return store.our_code(others)


def _weights(path: str) -> str | None:
    return file_digest(path) if Path(path).is_file() else None  # a missing file is refused where it is read


def _own(stage: str, run: Run) -> dict[str, Any]:
    """What a stage is made of, besides the stage before it."""
    if stage == "prune":
        rule = {entry.name: getattr(run.prune, entry.name) for entry in dataclasses.fields(run.prune)}
        calls = {"rule": _call(run.prune.rule), "cut": run.prune.cut and _call(run.prune.cut)}
        return {"rule": {**rule, **calls, "search": None}, "sensitivity": run.sensitivity}
    numbers = dataclasses.asdict(getattr(run.schedule, stage))
    loop = {"schedule": numbers, "batch_size": run.schedule.batch_size, "optimizer": _call(run.optimizer)}
    if stage != "regularize" or run.reg.penalty is None:
        return loop
    penalty = {"penalty": _call(run.reg.penalty), "decay": run.reg.decay, "apply_to": run.reg.apply_to}
    return {**loop, **penalty}


def _call(call: Call) -> dict[str, Any]:
    return {"target": call.target, "numbers": call.numbers, "code": store.code_of(call.target, call.function)}
