"""From the command to the first training step, and to answers that need no training."""

import subprocess
import sys
import tempfile
import time
from statistics import median

from benchmarks.first_step import MARK
from benchmarks.floor import Rates
from benchmarks.recipes import ROOT, data_of
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import Setting

PART = "startup"
MOST_SECONDS = 2  # to the first training step, beyond importing torch


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """The seconds of each command, interleaved; of the run, until its first training step is done."""
    report.heading("start-up")
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(setting, folder)
        warm_ups = 0 if setting.quick else 1
        count = setting.rounds + warm_ups
        rounds = [{name: until_mark(call) for name, call in commands.items()} for _ in range(count)]
    taken = {name: [turn[name] for turn in rounds[warm_ups:]] for name in commands}
    for name, seconds in taken.items():
        report.add(Figure(PART, name, median(seconds), "s", details={"seconds": seconds}))
    beyond = [run - torch for run, torch in zip(taken["first training step"], taken["import torch"])]
    label = "first training step, beyond importing torch"
    report.add(Figure(PART, label, median(beyond), "s", target=Target(MOST_SECONDS), details={"seconds": beyond}))


def _commands(setting: Setting, folder: str) -> dict[str, list[str]]:
    run = ["store=null", "plots=false", f"hydra.run.dir={folder}", *data_of(setting)]
    return {
        "import torch": ["-c", "import torch"],
        "first training step": ["-m", "benchmarks.first_step", *run],
        "--help": ["main.py", "--help"],
        "--cfg job": ["main.py", "--cfg", "job"],
        "an error of composition (model=nothing)": ["main.py", "model=nothing"],
    }


def until_mark(arguments: list[str]) -> float:
    """The seconds until a command of Python says that its first step is done, or else until it ends."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.strip() == MARK:
                break
        else:
            process.wait()
        seconds = time.perf_counter() - start
        process.kill()
    return seconds
