"""The compact network of a finished member: its file, checked on every test image, and what it saves."""

import copy
import logging
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsity import artifact
from sparsity.accounting import Report, account
from sparsity.artifact import About, Network
from sparsity.data import Splits
from sparsity.errors import reason
from sparsity.evaluation import image_bytes, images_at_once
from sparsity.experiment.loading import load_data
from sparsity.experiment.machine import device_of, machine
from sparsity.experiment.members import first_population
from sparsity.experiment.probing import result_of, run_again
from sparsity.graph import trace
from sparsity.population import Population
from sparsity.tensors import nonzero
from sparsity.weights import NETWORK

log = logging.getLogger("sparsity")

ROUNDING = 1e-4  # of the largest output, or of 1: by which the compact network's outputs may differ
BATCHES = (1, 256)  # images whose latency is measured
MOST_AT_ONCE = BATCHES[-1]  # of a pass that compares
SECONDS, ROUNDS = 0.1, 5  # of measuring each batch, at least


@dataclass
class Compact:
    """What came of it."""

    card: dict[str, Any]  # dense, masked and compact side by side
    latency: dict[str, Any] = field(default_factory=dict)  # seconds, of a batch: not the same from run to run
    file: dict[str, Any] | None = None
    network: Network | None = None
    quantized: Network | None = None  # with its layers' inputs in uint8, where the run ends with them so
    lines: list[str] = field(default_factory=list)  # warnings


def compact_member(
    member: Population,
    splits: Splits,
    report: Report,
    folder: Path,
    about: About,
    at_once: int,
    ranges: artifact.Ranges = MappingProxyType({}),
) -> Compact:
    """Writes `compact.safetensors` of a population of one and compares it with the masked network.

    folder: of the run, with its `model.safetensors`. about: what the file says beside the network. at_once: test images
    in a pass. ranges: of layers' inputs in uint8, by the weight's name. What cannot be recorded is written as weights
    alone, what would compute something else not at all; both are told.
    """
    found = Compact({"masked": _masked(report, (folder / NETWORK).read_bytes())})
    try:
        module = as_module(member)
        made = artifact.cut(copy.deepcopy(module).cpu(), splits.scale(_pixels(splits, 1)).cpu())
    except Exception as error:  # of ours where it cannot be recorded, and whatever a custom module may raise
        found.lines.append(f"{artifact.NAME} holds weights alone: {reason(error)}; sparsity.load needs module= for it")
        found.file = artifact.write_state(folder / artifact.NAME, member.state(0), about, reason(error))
        return found
    network = Network(made.program.fused()).to(member.device).eval()  # as sparsity.load has it
    difference, largest, correct = _compared(module, network, splits, at_once)
    found.card["masked"]["accuracy"] = correct[0]
    if not difference <= ROUNDING * max(1.0, largest):
        found.lines.append(
            f"{artifact.NAME} is not written: the compact network's outputs differ by {difference:.2g}; "
            "compact=false leaves it out"
        )
        return found
    found.file = artifact.write(folder / artifact.NAME, made, about)
    image = splits.scale(_pixels(splits, 1))
    found.card["compact"] = _compact(network, report, folder / artifact.NAME, correct[1], difference)
    found.card["compact"]["macs"] = counted_macs(network, image)
    found.card["stays"] = made.stays
    found.latency = latencies({"masked": module, "compact": network}, splits, at_once)
    network.about, found.network = about, network
    if ranges:
        _quantize(found, Network(artifact.quantized(made, ranges)), module, splits, at_once)
    return found


def _quantize(found: Compact, network: Network, module: nn.Module, splits: Splits, at_once: int) -> None:
    """Takes note of the compact network in whole numbers, and of how it differs from the masked one."""
    network.to(splits.example().device).eval().about = found.network.about
    difference, _, (_, accuracy) = _compared(module, network, splits, at_once)
    found.quantized = network
    found.card["quantized"] = {**found.card["compact"], "accuracy": accuracy, "difference": difference}


def export_compact(folder: Path, target: Path, trust: Sequence[str] = ()) -> Compact:
    """Writes `compact.safetensors` of a finished run into another folder, of its network and data again.

    folder: of the run. target: holds its `model.safetensors`. trust: modules outside this package that the run's model
    or data may be of. Raises a ConfigError where the run cannot be read again.
    """
    result = result_of(folder)
    run = run_again(result, target / NETWORK, trust)
    with machine(run.threads):
        device = device_of(run.device)
        splits = load_data(run)[0].to(device)
        population, _ = first_population([run], splits, device)
        parts = population.parameters, population.buffers
        parameters, buffers = ({name: tensor[0].detach() for name, tensor in part.items()} for part in parts)
        graph = trace(population.module, splits.example())
        report = account(parameters, population.layouts, graph, buffers=buffers)
        about = About(splits.input_shape, splits.classes, splits.mean, splits.std, figures_of(result))
        at_once = images_at_once(population, MOST_AT_ONCE, image_bytes(population, splits))
        return compact_member(population, splits, report, target, about, at_once, ranges_of(result["stages_run"]))


def ranges_of(stages: Sequence[Mapping[str, Any]]) -> artifact.Ranges:
    """Of the inputs of layers, where the last of a run's stages quantized them: by the weight, lowest and highest."""
    about = stages[-1].get("quantized") if stages else None
    return (about or {}).get("inputs", {})


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact says of its run: names of the groups, seed, what is left, and how the network is quantized."""
    names = ("name", "seed", "nonzero", "total", "compression", "macs", "structure")
    about = (result["stages_run"] or [{}])[-1].get("quantized") or {}
    own = {name: about[name] for name in ("method", "bits", "inputs") if about.get(name)}
    return {name: result[name] for name in names} | ({"quantized": own} if own else {})


def as_module(member: Population) -> nn.Module:
    """The network of a population of one, in evaluation."""
    module = copy.deepcopy(member.module).to(member.device)
    module.load_state_dict({**module.state_dict(), **member.state(0)})
    return module.eval()


def _masked(report: Report, saved: bytes) -> dict[str, Any]:
    return {
        "parameters": report.total["parameters"],
        "nonzero": report.nonzero["parameters"],
        "bytes": len(saved),
        "compressed": len(zlib.compress(saved)),
        "macs": report.macs["dense"],
        "structure": report.dense_structure,
    }


def _compact(network: Network, report: Report, path: Path, accuracy: float, difference: float) -> dict[str, Any]:
    parameters = list(network.parameters())
    content = path.read_bytes()
    return {
        "parameters": sum(each.numel() for each in parameters),
        "nonzero": sum(int(nonzero(each.detach()).sum()) for each in parameters),
        "bytes": len(content),
        "compressed": len(zlib.compress(content)),
        "structure": report.structure_removable,
        "accuracy": accuracy,
        "difference": difference,
    }


def counted_macs(network: nn.Module, image: Tensor) -> int:
    """What torch's own counter counts in one forward pass of one image [1, *shape]."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def _pixels(splits: Splits, count: int) -> Tensor:
    """The first test images, as the data set holds them."""
    order = torch.arange(min(count, len(splits.test))).unsqueeze(0)
    return next(iter(splits.test.batches(order, count))).images.squeeze(0)


def _compared(module: nn.Module, network: nn.Module, splits: Splits, at_once: int) -> tuple[float, float, list[float]]:
    """The largest difference of outputs over the test set, the largest output, and both accuracies."""
    difference, largest, correct = 0.0, 0.0, [0, 0]
    with torch.no_grad():
        for batch in splits.test.batches(torch.arange(len(splits.test)).unsqueeze(0), at_once):
            images, labels = splits.scale(batch.images.squeeze(0)), batch.labels.squeeze(0)
            outputs = [each(images) for each in (module, network)]
            difference = max(difference, (outputs[0] - outputs[1]).abs().max().item())
            largest = max(largest, outputs[0].abs().max().item())
            for place, each in enumerate(outputs):
                correct[place] += int((each.argmax(1) == labels).sum())
    return difference, largest, [count / len(splits.test) for count in correct]


def latencies(networks: Mapping[str, nn.Module], splits: Splits, at_once: int) -> dict[str, dict[str, float]]:
    """The seconds that a batch takes, by network and batch size: the median of many, measured in turns."""
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    for size in BATCHES:
        pixels = _pixels(splits, size)
        if size > max(1, at_once) or not len(pixels):  # more than there is room for
            continue
        images = splits.scale(pixels)
        images = images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]
        taken: dict[str, list[float]] = {name: [] for name in networks}
        start = time.perf_counter()
        with torch.no_grad():
            while len(taken[next(iter(networks))]) <= ROUNDS or time.perf_counter() - start < SECONDS:
                for name, network in networks.items():
                    taken[name].append(_seconds(network, images))
        for name, each in taken.items():
            found[name][str(size)] = statistics.median(each[1:])  # the first warms up
    return found


def _seconds(network: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    network(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
