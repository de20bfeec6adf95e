"""What methods cost beside a plain epoch: augmentation, a teacher, masks that change, and scores that read data."""

import time
from dataclasses import replace

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.floor import Rates
from benchmarks.report import Figure, Report, Target
from benchmarks.subjects import Setting, Told, default, loop, module, population, splits
from benchmarks.turns import Tell, Turns
from sparsity import config, nodes
from sparsity.experiment.machine import machine
from sparsity.graph import trace
from sparsity.population import Population
from sparsity.stages import Context
from sparsity.stages.pruning import scored
from sparsity.stages.regrowing import regrowth_of
from sparsity.stages.rules import rule_of
from sparsity.stages.training import loss_of
from sparsity.step import CROSS_ENTROPY, Loss
from sparsity.teachers import Teacher
from sparsity.tensors import Tensors
from sparsity.training import Gradual, train

PART = "methods"
LEFT, EVERY = 0.1, 100  # of the weights under a mask; steps from one mask to the next
# times the other's epoch
MOST = {"augment=digits": ("plain", 1.5), "loss=distill": ("plain", 1.1)}
MOST |= {"gradual": ("masked", 1.05), "rigl": ("masked", 1.05)}
STEPS = 15  # that scores by gradients over 10 batches of 128 may take
SCORES = ("taylor", "wanda", "brain_damage", "grasp")


def measure(setting: Setting, report: Report, rates: Rates) -> None:
    """An epoch with each method, against one without, and the time of scoring in steps."""
    network = "lenet300"
    report.heading(f"methods on {network}; ratio: to what the target says")
    trained = ("plain", "augment=digits", "loss=distill", "masked", "gradual", "rigl")[: 2 if setting.quick else None]
    kinds = {name: (epochs, setting, network, name) for name in trained}
    kinds |= {name: (scoring, setting, network, name) for name in SCORES[: 1 if setting.quick else None]}
    turns = Turns(kinds, setting.rounds)
    for name in trained:
        seconds = setting.per_epoch(turns.median(name))
        report.add(Figure(PART, f"{name}, an epoch", seconds, "s / 60,000 images", details={"all": turns.all(name)}))
    for name, (other, most) in MOST.items():
        if name not in trained:
            continue
        report.add(Figure(PART, f"{name} / {other}", turns.ratio(name, other), "×", target=Target(most)))
    for name in SCORES[: 1 if setting.quick else None]:
        steps = turns.ratio(name, "plain") * setting.steps
        target = Target(STEPS) if name == "taylor" else None
        report.add(Figure(PART, f"{name}, 10 batches of 128, in steps of 100", steps, "steps", target=target))


def epochs(tell: Tell, setting: Setting, network: str, kind: str) -> None:
    """Tells the seconds of epoch after epoch of one kind."""
    with machine(None):
        data, members = splits(setting), population(network)
        plan, gradual, loss = loop(*default(network, reg="none")), None, CROSS_ENTROPY
        if kind == "augment=digits":
            node = config.read(config.compose([kind])[0]).augment
            plan = replace(plan, augment=node.function.partial(), draws=node.draws)
        if kind == "loss=distill":  # from outputs that are kept; those of a network with other weights
            loss = distilling(Teacher(module(network, seed=1), data, members.device), members.device)
        if kind in ("masked", "rigl"):
            members = replace(members, masks=largest(members, 1.0))
        if kind == "gradual":
            gradual = Gradual(largest, list(largest(members, 1.0)), lambda progress: progress, 0.5, EVERY)
        if kind == "rigl":
            context = Context(splits=data, seeds=[0], graph=trace(module(network), data.example()))
            gradual = regrowth_of(nodes.Regrow("gradient", 0.3, 1.0, EVERY), members, context, plan, loss)
        generators = [torch.Generator().manual_seed(0)]
        train(members, data, plan, generators, loss=loss, gradual=gradual, watcher=Told(tell))


def distilling(teacher: Teacher, device: torch.device) -> Loss:
    """Distillation as its YAML has it, of one member."""
    node = OmegaConf.to_container(config.compose(["loss=distill"])[0].loss)
    return replace(loss_of([config.check("loss", node, nodes.Loss)], device), teacher=teacher)


def largest(members: Population, share: float) -> Tensors:
    """The masks of the largest entries of each weight, so far on the way to those that are left in the end."""

    def mask(parameter: Tensor) -> Tensor:
        sizes = parameter.detach().abs().flatten(1)
        place = max(1, int(share * (1 - LEFT) * sizes.shape[1]))
        return parameter.detach().abs() >= sizes.kthvalue(place, dim=1).values.view(-1, *[1] * (parameter.ndim - 1))

    return {name: mask(p) for name, p in members.parameters.items() if members.layouts[name].kind == "weight"}


def scoring(tell: Tell, setting: Setting, network: str, name: str) -> None:
    """Tells the seconds of scoring after scoring."""
    with machine(None):
        data, members = splits(setting), population(network)
        node = config.read(config.compose(["prune=percentile", f"prune/importance={name}"])[0]).prune
        context = Context(splits=data, seeds=[0], graph=trace(module(network), data.example()))
        rule, generators = rule_of([node], [0.5], members), context.generators()
        while True:
            start = time.perf_counter()
            scored(members, rule, [node.importance], context, CROSS_ENTROPY, generators)
            tell(seconds=time.perf_counter() - start)
