"""What compact networks save: file and latency of the tuned recipes, and the time to compact a large network."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
MOST_SECONDS, MOST_GIGABYTES = 30, 4


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """The card of each recipe, and the time and memory of compacting a ResNet-50."""
    report.heading("compact networks; ratio: of the dense float32 file, and of the masked network's time")
    for network in setting.networks[: 1 if setting.quick else None]:
        overrides, smaller, faster = RUNS[network]
        result = run(setting, [f"model={network}", *overrides])
        card, latency = result["card"], result["latency"]
        name, size = f"{network} {' '.join(overrides)}", card["compact"]["bytes"]
        report.add(Figure(PART, f"{name}: file", size, "bytes", card["masked"]["bytes"] / size, Target(smaller, True)))
        for batch, target in (("256", Target(faster, True)), ("1", None)):
            seconds = {kind: each[batch] for kind, each in latency.items()}
            ratio = seconds["masked"] / seconds["compact"]
            report.add(Figure(PART, f"{name}: batch of {batch}", 1e3 * seconds["compact"], "ms", ratio, target))
        report.add(Figure(PART, f"{name}: accuracy", 100 * card["compact"]["accuracy"], "%"))
        more, smaller = FEW_BITS[network]
        card = run(setting, [f"model={network}", *overrides, *more])["card"]
        name, size = f"{network} {' '.join(more)}", card["compact"]["bytes"]
        report.add(Figure(PART, f"{name}: file", size, "bytes", card["masked"]["bytes"] / size, Target(smaller, True)))
        report.add(Figure(PART, f"{name}: accuracy", 100 * card["compact"]["accuracy"], "%"))
    large(report, "resnet18" if setting.quick else "resnet50")


def run(setting: Setting, overrides: list[str]) -> dict[str, Any]:
    """The result of a run without pictures and without a store."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*overrides, "store=null", "plots=false", f"hydra.run.dir={folder}", *data_of(setting)]
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
