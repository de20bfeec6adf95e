"""Time to result: the tuned recipes from nothing to a pruned, finetuned network, as a user runs them."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.floor import Rates
from benchmarks.plain import plain_epochs
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import Setting
from benchmarks.turns import Turns

PART = "recipes"
ROOT = Path(__file__).parent.parent
RECIPES = {
    "lenet300": ("hs", ["prune=std", "sensitivity=0.03"]),
    "lenet5": ("group_hs", ["prune=std", "sensitivity=0.6"]),
}
MOST_MINUTES = {"lenet300": 2, "lenet5": 6}
PAPER = {"none": 250 + 100, "penalty": 250}  # epochs of the recipe that the plain loop's users run


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """The wall time of each recipe and what came out, once; its ratio is to the plain loop's 600 epochs."""
    report.heading("time to result; ratio: the plain loop's 600 epochs, measured per epoch and multiplied / ours")
    for network in setting.networks[: 1 if setting.quick else None]:
        plain = plain_seconds(setting, network)
        seconds, result = run(setting, network)
        selected = result["accuracy"]["selected"] or result["accuracy"]["final"]
        outcome = {
            "test accuracy": (100 * selected["test"], "%"),
            "dense test accuracy": (100 * result["accuracy"]["dense"]["test"], "%"),
            "compression of the weights": (result["compression"]["weights"] or 0.0, "×"),
        }
        target = Target(MOST_MINUTES[network])
        details = {"plain_seconds": plain, "seconds": result["seconds"], "command": result["environment"]["command"]}
        label = f"{network} {' '.join([RECIPES[network][0], *RECIPES[network][1]])}"
        report.add(Figure(PART, f"{label}, plain", plain / 60, "min, extrapolated"))
        report.add(Figure(PART, label, seconds / 60, "min", target=target, details=details))
        report.add(Figure(PART, f"{label}: plain / ours", plain / seconds, "×"))
        for name, (value, unit) in outcome.items():
            report.add(Figure(PART, f"{label}: {name}", value, unit))
    grid(setting, report)


def grid(setting: Setting, report: Report) -> None:
    """The wall time of the README's grid, its members together, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*GRID, "hydra/launcher=population", f"store={folder}/store", f"hydra.sweep.dir={folder}/sweep"]
        start = time.perf_counter()
        command = [sys.executable, "main.py", "-m", *given, *data_of(setting)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        report.add(Figure(PART, " ".join(GRID), time.perf_counter() - start, "s", target=Target(MOST_SECONDS)))


GRID = ("reg.decay=1e-5,1e-4,1e-3", "sensitivity=0.3,0.6,0.9,1.2")
MOST_SECONDS = 40


def plain_seconds(setting: Setting, network: str) -> float:
    """The plain loop's 600 epochs: those without a penalty, and those with it."""
    regs = {"none": "none", "penalty": RECIPES[network][0]}
    turns = Turns({name: (plain_epochs, setting, network, reg) for name, reg in regs.items()}, setting.rounds)
    return sum(PAPER[name] * setting.per_epoch(turns.median(name)) for name in regs)


def run(setting: Setting, network: str) -> tuple[float, dict[str, Any]]:
    """The wall time of the command, from nothing to its end, and its result."""
    reg, rule = RECIPES[network]
    with tempfile.TemporaryDirectory() as folder:
        given = [f"model={network}", f"reg={reg}", *rule, "store=null", "plots=false", f"hydra.run.dir={folder}"]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "main.py", *given, *data_of(setting)], cwd=ROOT, check=True, capture_output=True
        )
        seconds = time.perf_counter() - start
        return seconds, json.loads((Path(folder) / "result.json").read_text())


def data_of(setting: Setting) -> list[str]:
    """The overrides that name the data; small data and a short schedule where nothing but working is asked."""
    if setting.quick or setting.random:
        return ["data=digits", "schedule=smoke"]
    return [f"data.root={Path(setting.data_root).absolute()}"]
