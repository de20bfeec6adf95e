"""Seconds per epoch of finetuning what pruning left, beside an epoch of training the network dense."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import Rates, Work, layer_sizes, work, work_of
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import (
    BATCH_SIZE,
    FULL_EPOCH,
    PRECISIONS,
    WITHOUT_END,
    Setting,
    Told,
    loop,
    module,
    penalty,
    population,
    splits,
    torch_precision,
)
from benchmarks.turns import Contender, Tell, Turns
from sparsity import config, stages
from sparsity.accounting import live_inputs, live_outputs
from sparsity.capture import Way
from sparsity.experiment.machine import machine
from sparsity.graph import trace
from sparsity.nodes import Call, StageSchedule
from sparsity.population import Population
from sparsity.tensors import to_view
from sparsity.training import Watcher, train

PART = "finetune"
WAYS = ("recorded", "compiled", "kernels")
DENSE = {
    "lenet300": "compiled",
    "lenet5": "recorded",
}  # the fastest way of torch's, by which dense epochs were computed
REGS = {"lenet300": "hs", "lenet5": "group_hs"}
TARGETS = {"lenet300": 5, "lenet5": 4}
SHARES_LEFT = {"lenet300": 0.02, "lenet5": 0.01}  # of the weights
BEFORE = {"dense": (10, 2e-3), "penalized": (20, 4e-3)}  # epochs and learning rate, as schedule=fast has them
DECAYS = {"hs": 1e-4, "group_hs": 2e-3}  # of the regularizers' YAMLs


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """A whole epoch of finetuning what is left, and of training dense, by every way of computing a step.

    Not of fewer images: each epoch ends with an evaluation, which would then count for more than its share.
    """
    if not setting.quick:
        setting = replace(setting, images=FULL_EPOCH)
    shares = ", ".join(f"{share:.0%} of {network}" for network, share in SHARES_LEFT.items())
    report.heading(f"finetuning {shares} on the CPU; ratio: training dense by torch / finetuning")
    for network in setting.networks[: 1 if setting.quick else None]:
        reg = REGS[network]
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "pruned.pt")
            contender = Contender(prepare, setting, network, reg, file)
            prepared = contender.turn()
            contender.stop()
            _case(setting, report, rates, network, reg, file, prepared)


def _case(
    setting: Setting, report: Report, rates: Rates, network: str, reg: str, file: str, prepared: dict[str, Any]
) -> None:
    """The floor is that of the training steps; the seconds count evaluation too, of test as well in finetuning."""
    precision = torch_precision()
    calls = {}
    for way in WAYS[: 1 if setting.quick else None]:
        calls[f"dense, {way}"] = (train_dense, setting, network, way, precision)
        calls[f"finetuned, {way}"] = (finetune, setting, network, way, precision, file)
    turns = Turns(calls, setting.rounds)
    dense = work(module(network), (1, 28, 28), BATCH_SIZE, penalised=False)
    left = work_left(network, prepared["live"], prepared["weights"])
    for name in calls:
        kind, way = name.split(", ")
        is_fine = kind == "finetuned"
        report.add(
            Figure(
                PART,
                f"{network} {reg}: {name} {'float32' if way == 'kernels' else precision}",
                setting.per_epoch(turns.median(name)),
                "s / 60,000 images",
                ratio=turns.ratio(f"dense, {DENSE[network]}", name) if is_fine and not setting.quick else None,
                target=Target(TARGETS[network], at_least=True)
                if is_fine and way == "kernels" and not setting.quick
                else None,
                floor=setting.per_epoch(setting.steps * (left if is_fine else dense).floor(rates, precision)),
                details={**(prepared if is_fine else {}), "seconds": turns.all(name)},
            )
        )


def prepare(tell: Tell, setting: Setting, network: str, reg: str, file: str) -> None:
    """Trains a network dense, then with the penalty, prunes it, writes it, and tells what is left.

    As long as a tuned recipe does: what is dead then is what finetuning meets.
    """
    lengths = {stage: (1 if setting.quick else epochs, lr) for stage, (epochs, lr) in BEFORE.items()}
    precision = torch_precision()
    loops = {stage: loop("recorded", precision, epochs, lr, "cosine") for stage, (epochs, lr) in lengths.items()}
    with machine(None):
        members = population(network)
        data, generators = splits(setting, validated=True), [torch.Generator().manual_seed(0)]
        dense = train(members, data, loops["dense"], generators).last
        trained = train(dense, data, loops["penalized"], generators, penalty=penalty(reg, members, DECAYS[reg]))
        context = _context(setting, trained.last)
        pruned = stages.prune(trained.last, context, rule=[RULE], sensitivity=[1 - SHARES_LEFT[network]]).population
    torch.save({"parameters": pruned.parameters, "masks": pruned.masks}, file)
    (accuracy,) = trained.history[-1].validation
    tell(seconds=0.0, accuracy_before_pruning=accuracy, **_left(pruned))


def work_left(network: str, live: dict[str, tuple[int, int]], weights: int) -> Work:
    """The work of a step of the live inputs and outputs alone; weights: those that are trained."""
    dense = module(network)
    layers = []
    for (name, (inputs, outputs)), (_, units) in zip(live.items(), layer_sizes(dense, (1, 28, 28))):
        shape = dense.get_parameter(name).shape
        kernel, positions = shape[2:].numel(), units // shape[0]
        layers.append((inputs * outputs * kernel * positions, outputs * positions))
    return work_of(layers, next(iter(live.values()))[0], weights, BATCH_SIZE)


def _left(members: Population) -> dict[str, Any]:
    """The share of the weights that is left, and the live inputs and outputs of every layer."""
    views = {
        name: to_view(parameter[0], members.layouts[name])
        for name, parameter in members.parameters.items()
        if members.layouts[name].kind == "weight"
    }
    weights = sum(int((view != 0).sum()) for view in views.values())
    share = weights / sum(view.numel() for view in views.values())
    live = {name: (int(live_inputs(view).sum()), int(live_outputs(view).sum())) for name, view in views.items()}
    return {"weights": weights, "share_left": share, "live": live}


def train_dense(tell: Tell, setting: Setting, network: str, way: Way, precision: str) -> None:
    """Tells the seconds of epoch after epoch of dense training."""
    with machine(None):
        members = population(network)
        context = _context(setting, members, way=way, precision=precision, watcher=Told(tell))
        stages.train(members, context, schedule=SCHEDULE, batch_size=BATCH_SIZE, optimizer=ADAM)


def finetune(tell: Tell, setting: Setting, network: str, way: Way, precision: str, file: str) -> None:
    """Tells the seconds of epoch after epoch of finetuning the network of a file, as the stage does it."""
    with machine(None):
        pruned = replace(population(network), **torch.load(file))
        context = _context(setting, pruned, way=way, precision=precision, watcher=Told(tell))
        how = {"schedule": SCHEDULE, "batch_size": BATCH_SIZE, "optimizer": ADAM}
        stages.train(pruned, context, **how, hold="zeros", select=True)


ADAM = Call("optimizer", "torch.optim.Adam", torch.optim.Adam, {"fused": True})
SCHEDULE = StageSchedule(epochs=WITHOUT_END, lr=1e-3, shape="constant", warmup=0.0, weight_decay=0.0)
RULE = config.read(config.compose(["prune=percentile"])[0]).prune


def _context(
    setting: Setting, members: Population, way: Way = "eager", precision: str = "float32", watcher: Watcher = Watcher()
) -> stages.Context:
    """What stages are given: the data, the network's graph, and how steps are computed."""
    data = splits(setting, validated=True)
    return stages.Context(
        splits=data,
        seeds=[0],
        graph=trace(members.module, data.example()),
        precision=PRECISIONS[precision],
        step=way,
        watch=lambda stage, loop, num_images: watcher,
    )
