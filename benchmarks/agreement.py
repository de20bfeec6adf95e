"""Whether kernels train as torch does: the accuracies of some seeds by both."""

from statistics import mean, variance

import torch

from benchmarks.floor import Rates
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import Setting, loop, penalty, population, splits, with_kernels
from sparsity.capture import Way
from sparsity.experiment.machine import machine
from sparsity.training import train

PART = "agreement"
REG = "hs"
SEEDS, EPOCHS = 10, 3
MOST_APART = 2  # standard errors, which one difference in twenty is beyond


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """The test accuracies of some seeds by kernels beside those by torch's own operators."""
    seeds = 2 if setting.quick else SEEDS
    report.heading(
        f"test accuracy of {seeds} seeds after {EPOCHS} epochs of training with {REG}, by kernels and by torch"
    )
    for network in setting.networks[: 1 if setting.quick else None]:
        found = {way: accuracies(setting, network, way, seeds) for way in ("kernels", "eager")}
        for way, each in found.items():
            report.add(Figure(PART, f"{network} {REG}: {way}, mean", 100 * mean(each), "%", details={"seeds": each}))
        report.add(apart(network, *found.values(), is_judged=not setting.quick))


def apart(network: str, one: list[float], other: list[float], *, is_judged: bool) -> Figure:
    """The difference of two means in its standard errors, √((s₁² + s₂²) / n)."""
    error = ((variance(one) + variance(other)) / len(one)) ** 0.5
    difference = abs(mean(one) - mean(other))
    name = f"{network} {REG}: the difference of their means"
    target = Target(MOST_APART) if is_judged else None
    apart = difference / max(error, 1e-9)  # seeds that all agree
    return Figure(PART, name, apart, "standard errors", target=target)


def accuracies(setting: Setting, network: str, way: Way, seeds: int) -> list[float]:
    """The test accuracy of every seed, each trained from its own weights on its own order of the images."""
    with machine(None):
        members, images = population(network, seeds), splits(setting, validated=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        plan = with_kernels(loop(way, "float32", EPOCHS, lr=2e-3, shape="cosine"), members, images)
        return train(members, images, plan, generators, penalty=penalty(REG, members), select=True).history[-1].test
