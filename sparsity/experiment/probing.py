"""What pruning each layer alone would cost a finished run: its network and data again, no training."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsity import config, console
from sparsity.config.signatures import marked
from sparsity.errors import ConfigError, reason
from sparsity.evaluation import evaluate, image_bytes, images_at_once
from sparsity.experiment.loading import load_data
from sparsity.experiment.machine import device_of, machine
from sparsity.experiment.members import first_population
from sparsity.experiment.views import before_masks
from sparsity.files import Unreadable, file_digest
from sparsity.graph import Units, trace
from sparsity.kinds import OWN_SHARE
from sparsity.memory import free_bytes
from sparsity.nodes import Call, Unit
from sparsity.population import Population
from sparsity.pruning.unit import entry
from sparsity.results.plots import ROUND
from sparsity.results.sealed import RESULT, read_result
from sparsity.results.sensitivity import Curve, Sensitivity
from sparsity.stages import MASKED
from sparsity.stages.rules import AppliedRule, Pool, masks_of, rule_of, scores_of
from sparsity.tensors import Tensors, denormals_kept
from sparsity.weights import NETWORK

log = logging.getLogger("sparsity")

Accuracies = Callable[[Population], list[float]]
FEW_IMAGES = 3  # by which rounding may change an accuracy from machine to machine


def sensitivity(
    folder: Path, shares: Sequence[float], *, stage: str | None = None, trust: Sequence[str] = ()
) -> Sensitivity:
    """The accuracy of a finished run's network with a share of each layer alone pruned, by magnitude, for all shares.

    Of a run that prunes whole units these go, by their root mean square; what belongs to one goes with it. folder: of
    the run. stage: whose network; None: the last before the first that masks, or where there is none the final one.
    trust: modules outside this package that the run's model, data or unit may be of.
    """
    result = result_of(folder)
    stage, file, recorded = network_of(folder, result, stage)
    run = run_again(result, file, trust)
    with machine(run.threads):
        device = device_of(run.device)
        splits, _ = load_data(run)
        splits = splits.to(device)
        population, _ = first_population([run], splits, device)
        units = trace(population.module, splits.example()).units
        part, data = ("test", splits.test) if splits.validation is None else ("validation", splits.validation)
        num_bytes = image_bytes(population, splits)

        def accuracies(some: Population) -> list[float]:
            return evaluate(some, data, splits, images_at_once(some, run.schedule.batch_size, num_bytes))

        (dense,) = accuracies(population)
        if recorded[part] is not None and abs(dense - recorded[part]) * len(data) > FEW_IMAGES:
            log.warning(
                f"warning: {dense:.2%} on {part}, and the run had {recorded[part]:.2%} there: its data or its model is "
                "not what it was"
            )
        rule = rule_of([run.prune], [0.0], population)
        curves = {}
        for place, name in enumerate(rule.names, 1):
            alone = replace(rule, pools=[Pool([name], torch.zeros(1, device=device))])
            with console.waiting(f"layer {place} of {len(rule.names)}: {name}"):
                curves[name] = _curve(population, alone, units, shares, accuracies)
    return Sensitivity(
        network=stage,
        part=part,
        unit=run.prune.unit.function.target.rpartition(".")[2],
        dense=dense,
        shares=list(shares),
        curves=[curve for curve in curves.values() if curve is not None],
        whole=[name for name, curve in curves.items() if curve is None],
        title=", ".join(str(run.name.get(group)) for group in ("model", "data")),
    )


# --- a run again -----------------------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict[str, Any]:
    """What a finished run came to; refuses a folder of anything else."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give that of a finished run, which holds {RESULT}")
    path = folder / RESULT
    if not path.is_file():
        raise ConfigError(f"{folder} is no folder of a finished run, as it lacks {RESULT}: give another")
    try:
        result = read_result(path)
    except (Unreadable, OSError) as problem:
        raise ConfigError(f"{path} {problem}: run it again") from problem
    if not {"checksum", "stages_run", "files", "config"} <= result.keys():
        raise ConfigError(f"{path} is of an earlier version, which says too little: run it again")
    return result


def network_of(
    folder: Path, result: Mapping[str, Any], name: str | None
) -> tuple[str, Path, Mapping[str, float | None]]:
    """The stage whose network it is, the file that holds it, and its accuracy as the run measured it."""
    stages = {stage["name"]: stage for stage in result["stages_run"]}
    if name is not None and name not in stages:
        raise ConfigError(f"--stage {name} is no stage of {folder}: choose of {', '.join(stages) or 'none'}")
    before = before_masks(result["stages_run"])
    if name is None and before:
        name = before[-1]["name"]
    accuracy = stages[name]["accuracy"] if name is not None else result["accuracy"]["final"]
    relative = NETWORK if name is None else f"stages/{name}.safetensors"
    file = folder / relative
    if not file.is_file():
        raise ConfigError(f"{file} is missing: there is no network to prune; run it again, or give another --stage")
    if file_digest(file) != result["files"][relative]["sha256"]:
        raise ConfigError(f"{file} is damaged: it is not what {RESULT} says: run it again, or give another --stage")
    return (f"after {name}" if name is not None else "at the end"), file, accuracy


def run_again(result: Mapping[str, Any], file: Path, trust: Sequence[str]) -> config.Run:
    """The settings of a run that starts from one of another's networks, on its data, and prunes shares of its units."""
    rule = config.RULE
    typed = [f"{rule}=percentile", f"{rule}/cut=layer", "reg=none", "stages=[]", "store=null"]
    composed, _ = config.compose(typed)
    node = result["config"]
    composed.model = {**node["model"], "weights": str(file), "head": None}
    composed.data = node["data"]
    own = _rule_node(result)
    if "unit" in own:
        composed[rule].unit = own["unit"]
    try:
        admitted = config.admitted([f"trust=[{','.join(trust)}]"])
        run = config.read(composed, trust=admitted, choices=result["name"])
    except ConfigError as error:  # which speaks of another command line
        raise ConfigError(re.sub(r"trust=\[(\S+)\] on the command line", r"--trust \1", str(error))) from error
    if marked(run.prune.unit.function.function, OWN_SHARE):  # of no other share than that
        of_entries = Unit(Call(f"{rule}.unit", entry.__name__, entry, {}), structural=False)
        run = replace(run, prune=replace(run.prune, unit=of_entries))
    return run


def _rule_node(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rule of the first stage that masks, as the run's config has it; of a run without one that of its choice."""
    recipe = result["config"]["recipe"]
    nodes = [recipe.get(ROUND.sub("", stage["name"])) for stage in result["stages_run"] if MASKED in stage["did"]]
    return next((node["rule"] for node in nodes if node and node.get("rule")), result["config"][config.RULE])


# --- pruning one layer -----------------------------------------------------------------------------------------------


def _curve(
    population: Population, rule: AppliedRule, units: Units | None, shares: Sequence[float], accuracies: Accuracies
) -> Curve | None:
    """The accuracy of a network with shares of one layer pruned; None where the rule leaves all of it.

    rule: of this layer alone; accuracies: maps a population to those of its members.
    """
    (name,) = rule.names
    with denormals_kept(), torch.no_grad():
        scores = scores_of(population, rule, units)

    def masks_at(share: float) -> Tensors:
        with denormals_kept(), torch.no_grad():
            return masks_of(population, rule.at(torch.tensor([share], device=population.device)), units, scores)

    if masks_at(1.0)[name].all():
        return None
    num_bytes = sum(each.nbytes for each in population.parameters.values())
    size = max(1, min(len(shares), free_bytes(population.device) // COPIES // num_bytes))
    pruned, found = [], []
    for first in range(0, len(shares), size):
        masks = [masks_at(share) for share in shares[first : first + size]]
        pruned += [1 - each[name].double().mean().item() for each in masks]
        found += _measured(_with(population, masks), accuracies)
    return Curve(name, population.parameters[name].numel(), pruned, found)


COPIES = 8  # of the parameters a member: its own, what the mapped pass makes of them, and as much again to spare


def _with(population: Population, masks: Sequence[Tensors]) -> Population:
    """A member for each of some masks, zero where they are 0; what none of them is of is held once."""
    members = population.map(lambda tensor: tensor.expand(len(masks), *tensor.shape[1:]))
    own = {}
    for name in dict.fromkeys(name for each in masks for name in each):
        parameter = population.parameters[name]
        own[name] = torch.cat([torch.where(each[name], parameter, 0) if name in each else parameter for each in masks])
    return replace(members, parameters={**members.parameters, **own})


def _measured(members: Population, accuracies: Accuracies) -> list[float]:
    """The accuracies of members, one after another where their network cannot be mapped over them."""
    try:
        return accuracies(members)
    except Exception as error:  # whatever a custom module may raise
        if members.num_members == 1:
            raise
        log.debug(f"the network is not mapped over members: {reason(error)}")
        return [accuracies(members.member(index))[0] for index in range(members.num_members)]
