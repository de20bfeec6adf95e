"""Runs the benchmarks and prints their table: `make bench`, or `python -m benchmarks --data-root FOLDER`.

`python -m benchmarks gpu` is what only a GPU shows.

Measurements are interleaved within one run, after one to warm up; the table has medians, the JSON each round.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import agreement, compact, epochs, finetune, gpu, machine, methods, populations, recipes, startup
from benchmarks.floor import Rates
from benchmarks.report import Report
from benchmarks.subjects import NETWORKS, Setting

Part = Callable[[Setting, Report, Rates], None]
PARTS: dict[str, Part] = {
    "agreement": agreement.measure,
    "compact": compact.measure,
    "epochs": epochs.measure,
    "finetune": finetune.measure,
    "methods": methods.measure,
    "populations": populations.measure,
    "recipes": recipes.measure,
    "startup": startup.measure,
}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("all", "gpu"), default="all", help="all, or what only a GPU shows")
    root = os.environ.get("SPARSITY_DATA", "data")
    parser.add_argument("--data-root", default=root, help=f"folder that holds MNIST ({root})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="of a measured epoch; seconds are for 60,000")
    parser.add_argument("--only", type=_some(PARTS), default=tuple(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--networks", type=_some(NETWORKS), default=NETWORKS, help=f"some of {','.join(NETWORKS)}")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=there, help=f"of the populations ({there})")
    parser.add_argument("--quick", action="store_true", help="few cases, and small runs: to see that everything works")
    parser.add_argument("--random", action="store_true", help="random images instead of MNIST")
    parser.add_argument("--out", type=Path, help="the JSON (outputs/benchmarks/bench.json, or gpu.json)")
    asked = parser.parse_args()
    if asked.what == "gpu" and asked.device == "cpu" and not asked.quick:
        parser.error("there is no GPU here: --quick --device cpu shows that everything works")
    asked.out = asked.out or Path("outputs/benchmarks") / ("gpu.json" if asked.what == "gpu" else "bench.json")
    return asked


def _some(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Comma-separated names, each one of those known."""

    def names(text: str) -> tuple[str, ...]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{','.join(unknown)}: there are {','.join(known)}")
        return tuple(text.split(","))

    return names


def main() -> None:
    """Measures the parts asked for, one after the other."""
    asked = options()
    setting = Setting(
        asked.data_root, asked.images, asked.rounds, asked.quick, asked.random, asked.device, asked.networks
    )
    device = torch.device(asked.device)
    report = Report(asked.out, machine.name_of(device))
    print(", ".join(f"{key} {value}" for key, value in report.machine.items() if value is not None))
    if asked.what == "gpu":
        gpu.measure(setting, report)
    else:
        rates = machine.measure(setting, report, torch.device("cpu"))
        for name in asked.only:
            PARTS[name](setting, report, rates)
    print(f"\n{report.summary()}\nwritten to {asked.out}")


if __name__ == "__main__":
    main()
