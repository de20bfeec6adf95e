"""Result files of a run, and its numbers in words; README.md documents the schema of `result.json`."""

import contextlib
import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import reason
from sparsity.files import write_text
from sparsity.front import OBJECTIVES
from sparsity.results.sealed import RESULT

if TYPE_CHECKING:  # what reads finished sweeps imports this room, and needs no torch
    import torch

    from sparsity.accounting import Report, Row
    from sparsity.training import Epoch

FAILURE = "failure.json"
BEGUN = ".begun.json"  # what a member was begun with, for one that fails or is cut off
PACKAGES = ("torch", "torchvision", "hydra-core", "optuna", "numpy")
LAYER_FIELDS = ("name", "kind", "shape", "nonzero", "total", "density", "std", "threshold", "live_inputs")
LAYER_FIELDS += ("live_outputs", "macs", "macs_removable")

Histories = dict[str, "list[Epoch]"]  # by stage


def describe_layers(rows: "Iterable[Row]") -> list[dict[str, Any]]:
    """The rows of a report under the keys of `result.json`."""
    return [{name: getattr(row, name) for name in LAYER_FIELDS} for row in rows]


def describe_left(report: "Report") -> dict[str, Any]:
    """What is left, in the few figures that every stage has."""
    return {name: getattr(report, name) for name in ("nonzero", "total", "compression", "macs", "structure")}


def describe_report(report: "Report") -> dict[str, Any]:
    """A report under the keys of `result.json`."""
    return {
        **describe_left(report),
        "structure_removable": report.structure_removable,
        "dense_structure": report.dense_structure,
        "layers": describe_layers(report.rows),
    }


def environment(device: "torch.device", precision: str, overrides: Iterable[str]) -> dict[str, Any]:
    """What a number may depend on besides the config; overrides: those that run it by itself."""
    import torch

    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "git_commit": _git_commit(),
        "command": ["main.py", *overrides],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as Linux or the platform gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside its checkout."""
    if not _git("ls-files", Path(__file__).name):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# --- files -----------------------------------------------------------------------------------------------------------


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """`layers.csv`, then `result.json` of a sealed result: the last file of a run, which proves all others."""
    rows = [{**layer, "shape": "x".join(map(str, layer["shape"]))} for layer in result["layers"]]
    write_text(folder / "layers.csv", csv_text(LAYER_FIELDS, rows), durable=True)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n", durable=True)


def write_failure(folder: Path, error: Exception) -> None:
    """`failure.json`: why a member of a sweep has no result; a disk that refuses even that is left alone."""
    with contextlib.suppress(OSError):
        text = {"kind": type(error).__name__, "error": reason(error)}
        write_text(folder / FAILURE, json.dumps(text, indent=1) + "\n")


def begin(folder: Path, overrides: Iterable[str]) -> None:
    """Takes away the failure of an earlier try, and notes what a member of a sweep is, however it will end."""
    with contextlib.suppress(OSError):
        (folder / FAILURE).unlink(missing_ok=True)
        write_text(folder / BEGUN, json.dumps({"overrides": list(overrides)}) + "\n")


def write_history(folder: Path, histories: Histories, member: int) -> None:
    """`history.csv`: one row an epoch of every training stage."""
    from sparsity.training import Epoch

    def entry(row: Epoch, name: str) -> Any:
        value = getattr(row, name)
        return value[member] if isinstance(value, list) else value

    rows = [
        {"stage": stage, **{name: entry(row, name) for name in Epoch._fields}}
        for stage, history in histories.items()
        for row in history
    ]
    write_text(folder / "history.csv", csv_text(("stage", *Epoch._fields), rows), durable=True)


def csv_text(header: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV under a header; a key that a row lacks is left empty."""
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def dig(node: Any, key: str) -> Any:
    """What lies under a dotted key; None where there is nothing, or more than one value."""
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return None if isinstance(node, dict) else node


def number(result: Mapping[str, Any] | None, key: str) -> float | None:
    """A number of a result under its dotted key; None where it was not measured.

    Of results of the first versions, which lack the MACs that are left, those that papers count.
    """
    found = dig(result, key)
    if found is None and key == "macs.removable":
        found = dig(result, "macs.pruned")
    return None if found is None else float(found)


def objectives(result: Mapping[str, Any], names: Iterable[str]) -> tuple[float, ...]:
    """The numbers that a search looks at; accuracy is validation accuracy, counts are of weights."""
    found = [number(result, OBJECTIVES[name].key) for name in names]
    return tuple(float("nan") if value is None else value for value in found)


# --- words -----------------------------------------------------------------------------------------------------------


def title(result: Mapping[str, Any]) -> str:
    """The run in a few words, over its pictures."""
    name = result["name"]
    compression = result["compression"]["weights"]
    times = f"{compression:.1f}×" if compression else "nothing left"
    test = result["accuracy"]["final"]["test"]
    config = result.get("config") or {}
    methods = [group for group, node in config.items() if isinstance(node, dict) and "search" in node]
    parts = [name.get("model"), name.get("data"), *(f"{group}={name.get(group)}" for group in sorted(methods)[::-1])]
    parts += beyond(result)
    return f"{', '.join(map(str, parts))}: {test:.2%} test accuracy, {times} fewer weights"


def beyond(result: Mapping[str, Any]) -> list[str]:
    """What training did beyond a plain reproduction, such as loss=distill; results of the first versions lack it."""
    training = result.get("training") or {}
    return [f"{part}={name if isinstance(name, str) else name['model']}" for part, name in training.items()]


def summary(result: Mapping[str, Any], folder: Path) -> list[str]:
    """The parts of the line that says what came out."""
    accuracy, compression = result["accuracy"], result["compression"]
    before = next(
        (accuracy[name]["test"] for name in ("dense", "regularized") if accuracy[name]["test"] is not None), None
    )
    after = _percent(accuracy["final"]["test"])
    note = ""
    if accuracy["last"]["test"] is not None:
        epoch = accuracy["selected"]["epoch"]
        chosen = "last epoch, nothing selected" if epoch is None else f"epoch {epoch}, selected on validation"
        last, best = _percent(accuracy["last"]["test"]), _percent(accuracy["best"]["test"])
        ran = result.get("stages_run") or []  # results of the first version lack it: their last stage selected
        chooser, end = next((stage["name"] for stage in ran[::-1] if "selected" in stage["did"]), None), ran[-1:]
        start = f"after {end[0]['name']}; {chooser}: " if end and end[0]["name"] != chooser else ""
        note = f" ({start}{chosen}; last {last}; best on test, as the reference reports, {best})"
    return [
        f"test accuracy {_percent(before)} → {after}{note}",
        f"compression {_times(compression['weights'])} of weights, {_times(compression['parameters'])} with biases",
        f"structure {result['structure']} of {result['dense_structure']}",
        macs_left(result["macs"]),
        f"files in {near(folder)}",
    ]


def macs_left(macs: Mapping[str, int]) -> str:
    """The MACs as papers count them, and those that are left once what is dead is removed, of the dense ones."""
    removable = macs.get("removable")  # results of the first versions lack it
    kinds = "" if removable is None else f" as papers count, {removable:,} once dead units are removed,"
    return f"MACs {macs['pruned']:,}{kinds} of {macs['dense']:,}"


def near(folder: Path) -> str:
    """A folder as seen from here, if it is below; else whole."""
    whole = os.path.abspath(folder)
    seen = os.path.relpath(whole)
    return whole if seen.startswith(os.pardir) else seen


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _times(ratio: float | None) -> str:
    return "∞" if ratio is None else f"{ratio:.1f}×"
