"""What only a GPU shows, in 8 minutes at most: `python -m benchmarks gpu` prints the table and writes gpu.json."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, populations
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import BATCH_SIZE, Setting, loop, module, penalty, population, splits
from sparsity.capture import Way
from sparsity.data import Splits
from sparsity.experiment.machine import machine as as_training_wants_it
from sparsity.population import Population, stack
from sparsity.step import Step, leaves
from sparsity.training import train

PART = "gpu"
REG = "hs"
SIZES = (1, 4, 16, 64)
STEPS = 20  # of the runs whose weights are compared
ROUNDING = 1e-4  # by how much of their own length weights may differ after them, together or alone
SHAPES = {"conv1": (1, 20, 28), "conv2": (20, 50, 12)}  # of LeNet-5: channels, filters, and the image's side
TESTS = Path("tests")


def measure(setting: Setting, report: Report) -> None:
    """Equal results, what a step takes and holds, stacked convolutions in several ways, and the tests of a GPU."""
    device = torch.device(setting.device)
    with as_training_wants_it(None):
        for network in setting.networks:
            _equal(setting, report, network, device)
            _kernels(setting, report, network, device)
        _convolutions(setting, report, device)
    if not setting.quick:
        populations.measure(setting, report, machine.measure(replace(setting, quick=True), report, device))
        _tests(report)


# --- equal results ---------------------------------------------------------------------------------------------------


def _equal(setting: Setting, report: Report, network: str, device: torch.device) -> None:
    """Members together and alone, a recorded step and the step as it is, and one run twice."""
    report.heading(f"{network} on {device.type}: weights after {STEPS} steps of SGD, reg={REG}, float32")
    images = splits(replace(setting, images=STEPS * BATCH_SIZE)).to(device)
    alone = {seed: _trained(network, [seed], "recorded", images, device) for seed in (0, max(SIZES) - 1)}
    eager = _trained(network, [0], "eager", images, device)
    report.add(_different(f"{network}: recorded, and op by op: entries that differ", alone[0], eager))
    for size in SIZES[: 2 if setting.quick else None]:
        seeds = list(range(size))
        together, again = (_trained(network, seeds, "recorded", images, device) for _ in range(2))
        report.add(_different(f"{network}: {size} together, twice: entries that differ", together, again))
        for seed, other in alone.items():
            if seed in seeds:
                name = f"{network}: member {seed} of {size}, and alone: distance / length"
                far = _distance(together.member(seed), other)
                report.add(Figure(PART, name, far, "", target=Target(ROUNDING)))


def _trained(network: str, seeds: list[int], way: Way, images: Splits, device: torch.device) -> Population:
    members = stack([module(network, seed) for seed in seeds], device)
    plan = replace(loop(way, "float32", 1), optimizer=partial(torch.optim.SGD, fused=True, lr=0.05))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return train(members, images, plan, generators, penalty=penalty(REG, members)).last


def _different(name: str, one: Population, other: Population) -> Figure:
    pairs = zip(one.parameters.values(), other.parameters.values())
    return Figure(PART, name, float(sum((a != b).sum() for a, b in pairs)), "entries", target=Target(0))


def _distance(one: Population, other: Population) -> float:
    flat = [torch.cat([p.double().flatten() for p in each.parameters.values()]) for each in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


# --- the kernels of a step -------------------------------------------------------------------------------------------


def _kernels(setting: Setting, report: Report, network: str, device: torch.device) -> None:
    """How many kernels a replayed step starts: those of its graph, and what brings its batch and takes its result."""
    images = splits(replace(setting, images=STEPS * BATCH_SIZE)).to(device)
    for size in (SIZES[0], SIZES[-1]):
        members = leaves(population(network, size, device.type))
        plan = loop("recorded", "float32")
        step = Step(members, images, penalty(REG, members), plan.optimizer, way="recorded")
        members.module.train()
        order = torch.arange(len(images.train)).repeat(size, 1)
        batches = list(step.batches(order, BATCH_SIZE))
        for batch in batches[:5]:
            step(*batch)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
            step(*batches[5])
            machine._wait(device)
        kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        names = sorted({event.name for event in kernels})
        details = {"names": names, "microseconds": sum(event.time_range.elapsed_us() for event in kernels)}
        report.add(Figure(PART, f"{network}: kernels of a step of {size}", len(kernels), "kernels", details=details))
        report.add(Figure(PART, f"{network}: their time, {size}", details["microseconds"], "µs"))


# --- stacked convolutions --------------------------------------------------------------------------------------------


def _grouped(images: Tensor, weights: Tensor) -> Tensor:
    """[members, batch, channels, h, w] by [members, filters, channels, k, k]: members are groups of one convolution."""
    size, batch, channels = images.shape[:3]
    stacked = images.transpose(0, 1).reshape(batch, size * channels, *images.shape[3:])
    found = F.conv2d(stacked, weights.flatten(0, 1), groups=size)
    return found.unflatten(1, (size, -1)).transpose(0, 1)


def _grouped_last(images: Tensor, weights: Tensor) -> Tensor:
    """The same with channels last in memory."""
    size, batch, channels = images.shape[:3]
    stacked = images.transpose(0, 1).reshape(batch, size * channels, *images.shape[3:])
    stacked = stacked.contiguous(memory_format=torch.channels_last)
    kernels = weights.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(stacked, kernels, groups=size).unflatten(1, (size, -1)).transpose(0, 1)


def _patches(images: Tensor, weights: Tensor) -> Tensor:
    """One product a member: patches [members, batch · positions, channels · k · k], which only copies once."""
    size, batch, _, height, width = images.shape
    k = weights.shape[-1]
    view = images.unfold(3, k, 1).unfold(4, k, 1)  # members, batch, channels, y, x, k, k
    rows = view.permute(0, 1, 3, 4, 2, 5, 6).reshape(size, batch * (height - k + 1) * (width - k + 1), -1)
    found = torch.bmm(rows, weights.flatten(2).transpose(1, 2))
    return found.view(size, batch, height - k + 1, width - k + 1, -1).permute(0, 1, 4, 2, 3)


def _one_by_one(images: Tensor, weights: Tensor) -> Tensor:
    """Each member's own convolution, one after the other."""
    return torch.stack([F.conv2d(*pair) for pair in zip(images, weights)])


WAYS = {
    "mapped": torch.func.vmap(F.conv2d),
    "grouped": _grouped,
    "grouped, channels last": _grouped_last,
    "patches": _patches,
    "one by one": _one_by_one,
}


def _convolutions(setting: Setting, report: Report, device: torch.device) -> None:
    """Forward and backward of LeNet-5's convolutions over members, in several ways; each the same numbers."""
    report.heading("stacked convolutions, forward and backward, float32 (and TF32, where the processor has it)")
    for name, (channels, filters, side) in SHAPES.items():
        for size in SIZES[:1] if setting.quick else SIZES:
            images = torch.randn(size, BATCH_SIZE, channels, side, side, device=device, requires_grad=name != "conv1")
            weights = torch.randn(size, filters, channels, 5, 5, device=device, requires_grad=True)
            with torch.no_grad():
                right = _one_by_one(images.double(), weights.double())
            slopes = torch.randn(right.shape, device=device)
            for way, function in WAYS.items():
                for tf32 in (False,) if setting.quick else (False, True):
                    title = f"{name} × {size}, {way}"
                    _convolution(report, setting, title, function, (images, weights), right, slopes, tf32)


def _convolution(
    report: Report,
    setting: Setting,
    title: str,
    function: Callable[[Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor],
    right: Tensor,
    slopes: Tensor,
    tf32: bool,
) -> None:
    """right: the outputs, in double precision; slopes: the gradient of the outputs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    moved = [each for each in inputs if each.requires_grad]
    try:
        call = _captured(lambda: torch.autograd.grad(function(*inputs), moved, slopes), slopes.device)
        seconds = machine.seconds_of(call, slopes.device, setting.rounds)
        error = float((function(*inputs).detach() - right).norm() / right.norm())
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    report.add(Figure(PART, f"{title}{', TF32' if tf32 else ''}", seconds * 1e6, "µs", details={"error": error}))


def _captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function as one graph, as a recorded step has it."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


# --- the tests -------------------------------------------------------------------------------------------------------


def _tests(report: Report) -> None:
    """How many tests marked `gpu` fail."""
    report.heading("pytest -m gpu")
    options = ["-m", "gpu", "-n", "4", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / "test_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    found = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failed = found.get("failed", 0) + found.get("error", 0)
    report.add(Figure(PART, "tests of a GPU that fail", failed, "tests", target=Target(0), details=found))
