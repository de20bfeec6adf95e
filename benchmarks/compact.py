"""What compact networks save: file and latency of the tuned recipes, and the time to compact a large network."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import Rates
from benchmarks.recipes import ROOT, data_of
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import Setting
from sparsity import artifact, models
from sparsity.graph import trace

PART = "compact"
RUNS = {  # what is left of them, how much smaller the file and faster the network must be
    "lenet300": (["reg=hs", "prune=std", "budget.compression=50"], 25, 3),
    "lenet5": (["reg=group_hs", "prune=std", "budget.compression=100"], 50, 2),
}
FEW_BITS = {  # the same with values that entries share: how much smaller the file must be
    "lenet300": (["recipe=quantized", "quantize=shared", "quantize.bits=5"], 60),
    "lenet5": (["recipe=quantized", "quantize=shared", "quantize.bits=4"], 150),
}
HALVED = ["model=resnet20", "recipe=magnitude", "prune=coupled", "budget.macs_reduction=2", "schedule=smoke"]
HALVED_FASTER = 1.5
MOST_SECONDS, MOST_GIGABYTES = 30, 4


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """The card of each recipe, and the time and memory of compacting a ResNet-50."""
    report.heading("compact networks; ratio: of the dense float32 file, and of the masked network's time")
    for network in setting.networks[: 1 if setting.quick else None]:
        overrides, smaller, faster = RUNS[network]
        result = run([f"model={network}", *overrides, *data_of(setting)])
        card, latency = result["card"], result["latency"]
        name, size = f"{network} {' '.join(overrides)}", card["compact"]["bytes"]
        report.add(Figure(PART, f"{name}: file", size, "bytes", card["masked"]["bytes"] / size, Target(smaller, True)))
        for batch, target in (("256", Target(faster, True)), ("1", None)):
            report.add(_latency(name, latency, batch, target))
        report.add(Figure(PART, f"{name}: accuracy", 100 * card["compact"]["accuracy"], "%"))
        more, smaller = FEW_BITS[network]
        card = run([f"model={network}", *overrides, *more, *data_of(setting)])["card"]
        name, size = f"{network} {' '.join(more)}", card["compact"]["bytes"]
        report.add(Figure(PART, f"{name}: file", size, "bytes", card["masked"]["bytes"] / size, Target(smaller, True)))
        report.add(Figure(PART, f"{name}: accuracy", 100 * card["compact"]["accuracy"], "%"))
    halved(setting, report)
    large(report, "resnet18" if setting.quick else "resnet50")


def halved(setting: Setting, report: Report) -> None:
    """The latency of a ResNet-20 without half of its MACs, of images of noise, on which it does not depend."""
    with tempfile.TemporaryDirectory() as folder:
        generator, file = np.random.default_rng(0), Path(folder) / "noise.npz"
        count = 100 if setting.quick else 1000
        np.savez(file, images=generator.integers(0, 256, (count, 3, 32, 32), np.uint8), labels=np.arange(count) % 10)
        result = run([*HALVED, "data=arrays", f"data.root={file}"])
    macs, name = result["macs"], "resnet20 at half its MACs"
    report.add(Figure(PART, f"{name}: MACs", macs["removable"], "MACs", macs["dense"] / macs["removable"]))
    report.add(_latency(name, result["latency"], "256", None if setting.quick else Target(HALVED_FASTER, True)))


def _latency(name: str, latency: dict[str, dict[str, float]], batch: str, target: Target | None) -> Figure:
    """The compact network's time for a batch, beside the masked network's."""
    seconds = {kind: each[batch] for kind, each in latency.items()}
    ratio = seconds["masked"] / seconds["compact"]
    return Figure(PART, f"{name}: batch of {batch}", 1e3 * seconds["compact"], "ms", ratio, target)


def run(overrides: list[str]) -> dict[str, Any]:
    """The result of a run without pictures and without a store."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*overrides, "store=null", "plots=false", f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, "main.py", *given], cwd=ROOT, check=True, capture_output=True)
        return json.loads((Path(folder) / "result.json").read_text())


def large(report: Report, name: str) -> None:
    """The time of compacting a network for 224×224 images whose coupled channels are half gone, and the memory."""
    module = models.torchvision(name=name, input_shape=(3, 224, 224), num_classes=1000).eval()
    image = torch.rand(1, 3, 224, 224)
    units = trace(module, image).units
    gone = torch.arange(units.num_units) % 2 == 0
    gone[units.of[torch.cat([units.outputs, units.frozen])]] = gone[0] = False
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for link in units.links:
            tensors[link.name].index_fill_(link.axis, gone[link.units].nonzero().flatten(), 0)
    start = time.perf_counter()
    made = artifact.cut(module, image)
    seconds = time.perf_counter() - start
    left = sum(tensor.numel() for tensor in made.program.tensors.values())
    dense = sum(tensor.numel() for tensor in module.parameters())
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report.add(Figure(PART, f"compacting {name}", seconds, "s", target=Target(MOST_SECONDS)))
    report.add(
        Figure(PART, f"compacting {name}: memory of the whole process", taken, "GiB", target=Target(MOST_GIGABYTES))
    )
    report.add(Figure(PART, f"compacting {name}: parameters left", 100 * left / dense, "%"))
