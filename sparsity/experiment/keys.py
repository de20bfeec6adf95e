"""What determines each stage of a run, and the key in the store that follows from it."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sparsity import store
from sparsity.config import START, Run, Stage
from sparsity.config.signatures import marked
from sparsity.files import file_digest
from sparsity.limits import Budget
from sparsity.nodes import STATE, TEACHER, Call, Loss, Regularizer
from sparsity.pruning.unit import entry

# The code of a stage is every file of this package but those that change no number. What is left counts in a member's
# first stage, and so in all later ones; what some stages use counts in those alone.
NO_NUMBERS = ("__init__", "callbacks", "config", "console", "errors", "files", "front", "kinds")
NO_NUMBERS += ("launcher", "memory", "nodes", "processes", "results", "store", "streams", "sweeper", "tables")
NO_NUMBERS += ("experiment.__init__", "experiment.folder", "experiment.keys", "experiment.record")
NO_NUMBERS += ("tracking", "experiment.closing", "experiment.job", "experiment.probing", "experiment.views")
NO_NUMBERS += ("exports", "csr", "experiment.compacting")
# what counts in the stages that use it alone
OF_SOME = ("regularizers", "shrinking", "pruning", "limits", "budgets", "accounting", "compaction", "artifact")

READS = "weights"  # the room that counts where a file of weights is read


class Key(NamedTuple):
    """The key of one stage or state, and what it is the hash of."""

    key: str
    ingredients: dict[str, Any]


def stage_keys(run: Run, data: str, device: str, precision: str) -> dict[str, Key]:
    """The key of every stage of a run, and of every state that one of them names.

    data: the fingerprint of the images; device: its kind; precision: the resolved one.
    """
    place = {"format": store.FORMAT, "data": data, "device": device, "precision": precision, "seed": run.seed}
    before: Any = {"model": _call(run.model.factory), "weights": run.model.weights and _weights(run.model.weights)}
    before["code"] = store.our_code((*NO_NUMBERS, *OF_SOME, *(() if run.model.weights else (READS,))))
    before |= {} if run.model.head is None else {"head": run.model.head}
    keys: dict[str, Key] = {}
    for stage in run.recipe:
        states = {name: _state_key(name, keys) for name in named_states(stage)}
        ingredients = {"stage": stage.name, "before": before, **place, **_own(stage)}
        ingredients |= {"states": {name: key and key.key for name, key in states.items()}} if states else {}
        keys |= {name: key for name, key in states.items() if key is not None}
        keys[stage.name] = Key(store.key_of(ingredients), ingredients)
        before = keys[stage.name].key
    return keys


def named_states(stage: Stage) -> list[str]:
    """The earlier states that a stage names."""
    found = [stage.call.numbers.get(name) for name in marked(stage.call.function, STATE)]
    return [name for name in found if name is not None]


def _state_key(name: str, keys: Mapping[str, Key]) -> Key | None:
    """The key of a state: of a stage it is the stage's, of one of its epochs one of its own; None of the start."""
    made, sign, epoch = name.partition("@")
    if made == START:
        return None
    if not sign:
        return keys[made]
    ingredients = {**keys[made].ingredients, "stop": int(epoch)}
    return Key(store.key_of(ingredients), ingredients)


def _own(stage: Stage) -> dict[str, Any]:
    """What a stage is made of, besides what comes before it: its function, its numbers, and the code of its own."""
    given = {name: _without_entries(value) for name, value in stage.call.numbers.items() if value is not None}
    numbers = {name: _plain(value) for name, value in given.items()}
    called = [stage.call.target, *(call.target for value in given.values() for call in _calls(value))]
    rooms = {target.split(".")[1] for target in called if target.startswith("sparsity.")}
    rooms |= {"limits", "budgets", "accounting"} if "budget" in numbers else set()
    budget = stage.call.numbers.get("budget")
    rooms |= {"artifact"} if isinstance(budget, Budget) and budget.limits_bytes else set()
    rooms |= {"compaction"} if numbers.get("hold") == "zeros" else set()
    losses = [value for value in stage.call.numbers.values() if isinstance(value, Loss)]
    rooms |= {READS} if any(loss.teacher for loss in losses) else set()
    others = {room.partition(".")[0] for room in store.our_code()} - (rooms & {*OF_SOME, READS})
    return {"function": {**_call(stage.call), "numbers": numbers}, "code": store.our_code(others)}


def _without_entries(value: Any) -> Any:
    """A regularizer of entries by themselves without their unit, which is no code that runs; all else as it is."""
    is_of_entries = isinstance(value, Regularizer) and value.unit is not None and value.unit.function.function is entry
    return replace(value, unit=None) if is_of_entries else value


def _plain(value: Any) -> Any:
    """A node as JSON takes it, without what changes no number."""
    if isinstance(value, Call):
        return _call(value)
    if isinstance(value, Regularizer) and value.method is None:
        return None  # its other numbers are of no use
    if isinstance(value, Loss):
        found = {"function": _call(value.function)}
        if value.teacher is not None:  # what it is, wherever it lies
            found[TEACHER] = {"weights": _weights(value.teacher), "model": _call(value.teacher_model.factory)}
        return found
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.name != "search"}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _calls(value: Any) -> list[Call]:
    """The functions that a node names, at any depth."""
    if isinstance(value, Call):
        return [value, *(call for number in value.numbers.values() for call in _calls(number))]
    if is_dataclass(value):
        return [call for each in fields(value) for call in _calls(getattr(value, each.name))]
    return []


def _call(call: Call) -> dict[str, Any]:
    return {"target": call.target, "numbers": call.numbers, "code": store.code_of(call.target, call.function)}


def _weights(path: str) -> str | None:
    return file_digest(path) if Path(path).is_file() else None  # a missing file is refused where it is read
