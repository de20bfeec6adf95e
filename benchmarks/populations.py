"""Members trained as one stacked computation, beside one member at a time."""

from dataclasses import replace

import torch

from benchmarks import machine
from benchmarks.floor import Rates, work
from benchmarks.plain import plain_epochs
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import (
    BATCH_SIZE,
    FULL_EPOCH,
    Setting,
    Told,
    default,
    loop,
    module,
    our_epochs,
    population,
    splits,
    torch_precision,
    with_kernels,
)
from benchmarks.turns import Tell, Turns
from sparsity.experiment.machine import machine as machine_of
from sparsity.training import train

PART = "populations"
REG = "hs"
SIZES = {"cpu": (4, 8), "cuda": (4, 16, 64)}
SWEEP = 64  # members that the targets are of
SWEEP_EPOCHS = 600
MOST_MINUTES = {"lenet300": 4, "lenet5": 15}  # of the sweep on a GPU
MOST_STEPS = {"one eager": 1, "one recorded": 2}  # a captured step of the sweep over one member's
Kinds = dict[str, tuple[str, int]]  # of how a step is computed, and the number of members


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """Steps and members a second, and memory, of one member and of populations, on the device asked for."""
    if setting.device != "cpu":
        rates = machine.measure(setting, report, torch.device(setting.device))
    report.heading(f"populations on {setting.device}, reg={REG}; ratio: one member at a time / stacked")
    sizes = SIZES[setting.device]
    kinds: Kinds = {"one eager": ("eager", 1), "one recorded": ("recorded", 1)}
    kinds |= {f"{size} stacked": ("recorded", size) for size in sizes[: 1 if setting.quick else None]}
    for network in setting.networks[: 1 if setting.quick else None]:
        _network(setting, report, rates, network, kinds)
    if setting.device == "cpu":
        side_by_side(setting, report)


def side_by_side(setting: Setting, report: Report) -> None:
    """Members finetuned together on the cores, by kernels, beside one after another."""
    turns = Turns({f"{count}": (sparse_epochs, setting, count) for count in (1, MANY)}, setting.rounds)
    each, together = (setting.per_epoch(turns.median(name)) for name in ("1", f"{MANY}"))
    name = f"lenet300 at {LEFT:.0%} by kernels: {MANY} members, an epoch of each"
    ratio, target = MANY * turns.ratio("1", f"{MANY}"), Target(BESIDE, at_least=True)
    report.add(Figure(PART, f"lenet300 at {LEFT:.0%} by kernels: one member", each, "s / 60,000 images"))
    report.add(Figure(PART, name, together / MANY, "s / 60,000 images", ratio=ratio, target=target))


MANY, LEFT, BESIDE = 8, 0.02, 1.8  # members, share of the weights, times as fast


def sparse_epochs(tell: Tell, setting: Setting, count: int) -> None:
    """Tells the seconds of epoch after epoch of members that have little left, wherever it is."""
    with machine_of(None):
        images, members = splits(setting), population("lenet300", count)
        generator = torch.Generator().manual_seed(0)
        weights = {name: p for name, p in members.parameters.items() if members.layouts[name].kind == "weight"}
        masks = {name: torch.rand(p.shape, generator=generator) < LEFT for name, p in weights.items()}
        own = members.parameters | {name: p * masks[name] for name, p in weights.items()}
        members = replace(members, parameters=own, masks=masks)
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        train(
            members, images, with_kernels(loop("kernels", "float32"), members, images), generators, watcher=Told(tell)
        )


def _network(setting: Setting, report: Report, rates: Rates, network: str, kinds: Kinds) -> None:
    device = setting.device
    precision = torch_precision() if device == "cpu" else default(network, device=device)[1]
    calls = {
        name: (our_epochs, setting, network, REG, way, precision, members, device)
        for name, (way, members) in kinds.items()
    }
    if device != "cpu":
        calls["plain"] = (plain_epochs, setting, network, REG, device)
    turns = Turns(calls, setting.rounds)
    if device != "cpu":
        _plain(setting, report, turns, network)
    step = work(module(network), (1, 28, 28), BATCH_SIZE, penalised=True)
    for name, (_, members) in kinds.items():
        floor = step.floor(rates, precision, members)
        _figures(setting, report, turns, name, f"{network} {precision}: {name}", members, floor)
    if f"{SWEEP} stacked" in kinds:
        _targets(setting, report, network, turns)


def _figures(setting: Setting, report: Report, turns: Turns, name: str, title: str, members: int, floor: float) -> None:
    """floor: the least seconds of a step of all members."""
    seconds = turns.median(name)
    rate = members * setting.images / FULL_EPOCH / seconds
    report.add(
        Figure(
            PART,
            f"{title}, an epoch of each member",
            setting.per_epoch(seconds) / members,
            "s / 60,000 images",
            ratio=turns.ratio("one recorded", name) * members,
            floor=setting.per_epoch(setting.steps * floor) / members,
            details={"seconds": turns.all(name), "members": members, "members_epochs_per_second": rate},
        )
    )
    report.add(Figure(PART, title, rate, "members · epochs / s"))
    report.add(Figure(PART, title, setting.steps / seconds, "steps / s"))
    if members > 1 or setting.device != "cpu":  # what one member takes is lost in what else a process holds
        report.add(Figure(PART, title, turns.median(name, "bytes") / members / 2**20, "MB a member"))


def _plain(setting: Setting, report: Report, turns: Turns, network: str) -> None:
    """The plain loop's epoch, which a CPU reads and scales the images of."""
    name, seconds = f"{network} float32: the plain loop, an epoch", setting.per_epoch(turns.median("plain"))
    times = turns.ratio("plain", "one recorded")
    report.add(Figure(PART, name, seconds, "s / 60,000 images", details={"seconds": turns.all("plain")}))
    report.add(Figure(PART, f"{network}: one recorded, against the plain loop", times, "× faster"))


def _targets(setting: Setting, report: Report, network: str, turns: Turns) -> None:
    """What a sweep on a GPU should reach; its time is extrapolated from the epochs measured."""
    name = f"{SWEEP} stacked"
    if network == "lenet300":
        for other, bound in MOST_STEPS.items():
            times = turns.ratio(name, other)
            report.add(Figure(PART, f"{network}: a step of {name} / {other}", times, "×", target=Target(bound)))
    minutes = setting.per_epoch(turns.median(name)) * SWEEP_EPOCHS / 60
    label = f"{network}: {name} × {SWEEP_EPOCHS} epochs, extrapolated"
    report.add(Figure(PART, label, minutes, "min", target=Target(MOST_MINUTES[network])))
