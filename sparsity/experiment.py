"""Configs → populations → stages → results: the only room that knows the whole way."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sparsity import config as schema
from sparsity import console, results, stages
from sparsity.accounting import Report, account
from sparsity.config import Run
from sparsity.data import Splits, count_batches, split
from sparsity.errors import ConfigError, DivergedError, SparsityError
from sparsity.graph import Layer, trace
from sparsity.models import build, check_fits, draws_random_numbers
from sparsity.population import Population, stack
from sparsity.results import plots
from sparsity.schedules import learning_rate
from sparsity.stages import Ingredients, Pruned, derived_seed
from sparsity.tensors import Layout
from sparsity.training import Loop, Penalty, Trained, evaluate
from sparsity.weights import fill, read_state, write_state

log = logging.getLogger("sparsity")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURED = {"pretrain": "dense", "regularize": "regularized", "prune": "pruned"}  # accuracies after a stage


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the pipeline as `python main.py OVERRIDES` does and returns what `result.json` holds, and its `folder`.

    Raises a SparsityError for a mistake of the user's. Sweeps (`-m`) are for the command line.
    """
    composed, hydra = schema.compose(overrides)
    return _run_one(composed, Path(hydra.run.dir).absolute(), list(hydra.overrides.task), hydra.runtime.choices)


def run_job(composed: DictConfig) -> tuple[float, ...]:
    """Runs one job of Hydra's and returns its objectives, for a sweeper."""
    hydra = HydraConfig.get()
    is_sweep, search = hydra.mode is RunMode.MULTIRUN, hydra.runtime.choices.get("search")
    if search and not is_sweep:
        raise ConfigError(f"search={search} needs a sweep: add -m, as in python main.py -m search={search}")
    if search and not composed.data.validation:
        raise ConfigError(f"data.validation=0 leaves search={search} nothing to select on: set it above 0")
    folder = Path(hydra.runtime.output_dir)
    result = _run_one(composed, folder, list(hydra.overrides.task), hydra.runtime.choices)
    return results.objectives(result, composed.objectives)


def _run_one(composed: DictConfig, folder: Path, overrides: Sequence[str], choices: Any) -> dict[str, Any]:
    checked = schema.read(composed, overrides=overrides, choices=choices)
    for line in schema.idle_settings(checked, overrides):
        log.warning(f"warning: {line}")
    outcome = run_members([Job(checked, folder, OmegaConf.to_container(composed, resolve=True))])[0]
    if isinstance(outcome, SparsityError):
        raise outcome
    return outcome


@dataclass(frozen=True)
class Job:
    """One member: its checked run, its folder, and its config as it is written into the result."""

    run: Run
    folder: Path
    config: Any = None


def run_members(jobs: Sequence[Job]) -> list[dict[str, Any] | SparsityError]:
    """The result of every job, trained together; a member that diverges gives its error, and the others go on.

    The jobs may differ in seed, decay, sensitivities, and the penalty's own floats alone.
    """
    first = jobs[0].run
    device = _device(first.device)
    with _machine(first.threads):
        splits = _load_data(first).to(device)
        population = _first_population(jobs, splits, device)
        if len(jobs) > 1 and draws_random_numbers(population.module):
            return [run_members([job])[0] for job in jobs]
        progress = _Progress(jobs, splits, population, device)
        for stage in first.stages:
            progress.advance(stage)
            if all(error is not None for error in progress.errors):
                break
        return progress.outcomes()


# --- parts -----------------------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        there = ["auto", "cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(f"device={name} is not there: this machine has {', '.join(there)}") from error
    if device.type == "meta":
        raise ConfigError("device=meta computes nothing: take auto or cpu")
    return device


@contextlib.contextmanager
def _machine(threads: int | None) -> Iterator[None]:
    """The process as training wants it: denormals flushed (sparsity training makes many), threads as asked."""
    before, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or before)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
        torch.backends.cudnn.deterministic = deterministic


def _load_data(run: Run) -> Splits:
    try:
        source = run.data.loader.partial()()
    except (TypeError, OSError) as error:
        raise ConfigError(f"data={run.name.get('data')} cannot be loaded: {' '.join(str(error).split())}") from error
    return split(source, validation=run.data.validation, seed=run.data.validation_seed, normalize=run.data.normalize)


def _first_population(jobs: Sequence[Job], splits: Splits, device: torch.device) -> Population:
    """The members as they are before the first stage: drawn by their seeds, or with the weights given."""
    model = jobs[0].run.model
    name = jobs[0].run.name.get("model", model.factory.target)
    modules = [_build(job.run, splits, name) for job in jobs]
    if model.weights is not None:
        state = read_state(model.weights)
        modules = [fill(module, state, model.weights) for module in modules]
    check_fits(modules[0], splits.example(), splits.num_classes, name)
    return stack(modules, device)


def _build(run: Run, splits: Splits, name: str) -> torch.nn.Module:
    try:
        return build(
            run.model.factory.partial(), splits.input_shape, splits.num_classes, derived_seed(run.seed, "weights")
        )
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={name} cannot be built for images {list(splits.input_shape)}: {reason}") from error


def _ingredients(jobs: Sequence[Job], splits: Splits, population: Population, device: torch.device) -> Ingredients:
    first = jobs[0].run
    return Ingredients(
        splits=splits,
        loops={stage: _loop(first, stage) for stage in first.stages if stage != "prune"},
        penalty=_penalty([job.run for job in jobs], population.layouts, device),
        rule=_rule([job.run for job in jobs], population.layouts, device),
        seeds=[job.run.seed for job in jobs],
        watcher=lambda stage: _watch(first, stage, len(splits.train)),
    )


def _loop(run: Run, stage: str) -> Loop:
    numbers = getattr(run.schedule, stage)
    optimizer = partial(_optimizer, run, numbers.lr, numbers.weight_decay)
    optimizer([torch.zeros(1)])  # a number that it refuses shall be refused before anything trains
    return Loop(
        epochs=numbers.epochs,
        batch_size=run.schedule.batch_size,
        learning_rate=partial(learning_rate, lr=numbers.lr, shape=numbers.shape, warmup=numbers.warmup),
        optimizer=optimizer,
        precision=PRECISIONS[run.precision],
    )


def _optimizer(run: Run, lr: float, weight_decay: float, tensors: list[Tensor]) -> torch.optim.Optimizer:
    try:
        return run.optimizer.partial(lr=lr, weight_decay=weight_decay)(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer={run.name.get('optimizer')}: {' '.join(str(error).split())}") from error


def _penalty(runs: list[Run], layouts: dict[str, Layout], device: torch.device) -> Penalty | None:
    """The penalty of all members; the method's floats may differ between them."""
    reg = runs[0].reg
    if reg.penalty is None:
        return None
    names = [name for name, layout in layouts.items() if layout.kind in reg.apply_to]
    if not names:
        raise ConfigError(f"reg.apply_to={reg.apply_to}: the model has no such parameters")
    shared = {name: number for name, number in reg.penalty.numbers.items() if not isinstance(number, float)}
    floats = {
        name: torch.tensor([run.reg.penalty.numbers[name] for run in runs], device=device)
        for name in reg.penalty.numbers
        if name not in shared
    }
    function = stages.total_penalty(partial(reg.penalty.function, **shared), layouts, names)
    return Penalty(function, torch.tensor([run.reg.decay for run in runs], device=device), floats)


def _rule(runs: list[Run], layouts: dict[str, Layout], device: torch.device) -> stages.Rule:
    """The pruning rule of all members, its parameters in pools of one sensitivity a member."""
    rule = runs[0].prune
    _check_layers(rule, layouts)
    names = [name for name, layout in layouts.items() if layout.kind in rule.apply_to]
    names = [name for name in names if not any(_is_in(name, layer) for layer in rule.exclude)]
    owners = {name: _owner(name, rule.layers) for name in names}
    pools = []
    for owner in dict.fromkeys(owners.values()):
        numbers = [run.sensitivity if owner is None else run.prune.layers[owner] for run in runs]
        pools.append(([name for name in names if owners[name] == owner], torch.tensor(numbers, device=device)))
    return stages.Rule(
        mask=rule.rule.partial(),
        cut=None if rule.cut is None else rule.cut.partial(),
        whole=rule.scope == "network",
        structural=rule.structural,
        pools=pools,
    )


def _check_layers(rule: schema.Rule, layouts: dict[str, Layout]) -> None:
    for key, layers in (("prune.exclude", rule.exclude), ("prune.layers", list(rule.layers))):
        for layer in layers:
            if not any(_is_in(name, layer) for name in layouts):
                known = dict.fromkeys(name.rpartition(".")[0] for name in layouts)
                raise ConfigError(f"{key} names '{layer}', which the model lacks: its layers are {', '.join(known)}")


def _is_in(name: str, layer: str) -> bool:
    """Whether a parameter is of a layer: fc1.weight of fc1.weight, of fc1, and features.0.weight of features."""
    return name == layer or name.startswith(f"{layer}.")


def _owner(name: str, layers: dict[str, float]) -> str | None:
    """The longest of the layers' names that a parameter is of."""
    return max((layer for layer in layers if _is_in(name, layer)), key=len, default=None)


def _watch(run: Run, stage: str, num_images: int) -> console.StageProgress:
    num_batches = count_batches(num_images, run.schedule.batch_size)
    return console.StageProgress(stage, getattr(run.schedule, stage).epochs, num_batches)


def _whole_layer(name: str, run: Run) -> str:
    layer = name.rpartition(".")[0]
    owner = _owner(name, run.prune.layers)
    key = "sensitivity" if owner is None else f"prune.layers.{owner}"
    number = run.sensitivity if owner is None else run.prune.layers[owner]
    return (
        f"{key}={number:g} pruned all of {name}, so that the output no longer depends on the input there: lower it, or "
        f"give the layer its own by prune.layers.{layer}"
    )


# --- progress through the stages -------------------------------------------------------------------------------------


class _Progress:
    """Remembers what the stages of one population came to, and writes it down as it comes."""

    def __init__(self, jobs: Sequence[Job], splits: Splits, population: Population, device: torch.device):
        self.jobs, self.splits, self.population, self.device = jobs, splits, population, device
        self.run = jobs[0].run
        self.parts = _ingredients(jobs, splits, population, device)
        self.graph: dict[str, Layer] = trace(population.module, splits.example())
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.measured: dict[str, list[dict[str, float | None]]] = {}
        self.histories: dict[str, list[Any]] = {}
        self.selected_epoch: list[int] | None = None
        self.pruned: Pruned | None = None
        self.states: dict[str, Population] = {}  # before and after regularizing
        self.errors: list[SparsityError | None] = [None] * len(jobs)
        self.warnings: list[list[str]] = [self._common_warnings() for _ in jobs]
        if self.run.model.weights is not None:
            self.measured["dense"] = self._measure()

    def _common_warnings(self) -> list[str]:
        lines = []
        weights = [name for name, layout in self.population.layouts.items() if layout.kind == "weight"]
        unseen = [name for name in weights if name not in self.graph]
        if unseen:
            lines.append(f"MACs leave out {', '.join(unseen)}: no linear layer or convolution uses them directly")
        if self.splits.validation is None and "finetune" in self.run.stages:
            lines.append("data.validation=0: nothing was selected; the network is that of the last epoch")
        for line in lines:
            log.warning(f"warning: {line}")
        return lines

    def advance(self, stage: str) -> None:
        """Takes one stage."""
        before, start = self.population, time.perf_counter()
        if stage == "prune":
            self._take_pruned(stages.prune(before, self.parts))
        else:
            self._take_trained(stage, self._trained(stage))
        self.seconds[stage] = time.perf_counter() - start
        if stage in MEASURED:
            self.measured[MEASURED[stage]] = self._measure()
        if stage == "regularize":
            self.states = {"before regularizing": before, "after regularizing": self.population}
        self._keep(stage)
        if stage in ("prune", "finetune") and len(self.jobs) == 1:
            console.show_report(f"after {stage}", self._report(0))

    def _trained(self, stage: str) -> Trained:
        watchers: list[console.StageProgress] = []

        def watcher(name: str) -> console.StageProgress:
            watchers.append(self.parts.watcher(name))
            return watchers[-1]

        try:
            return getattr(stages, stage)(self.population, replace(self.parts, watcher=watcher))
        finally:
            for opened in watchers:
                opened.close()

    def _take_trained(self, stage: str, trained: Trained) -> None:
        self.population = trained.selected
        self.histories[stage] = trained.history
        if stage == "finetune":
            self.selected_epoch = trained.selected_epoch
        for member, epoch in enumerate(trained.diverged):
            if epoch is not None and self.errors[member] is None:
                self.errors[member] = self._divergence(stage, epoch, member)

    def _divergence(self, stage: str, epoch: int, member: int) -> DivergedError:
        run, numbers = self.jobs[member].run, getattr(self.run.schedule, stage)
        causes = f"schedule.{stage}.lr={numbers.lr:g}"
        if stage == "regularize" and run.reg.penalty is not None:
            causes += f" or reg.decay={run.reg.decay:g}"
        return DivergedError(
            f"{stage}: the loss became NaN or infinite in epoch {epoch}; {causes} is likely too large: lower it (the "
            f"last good state is in {self._stage_file(stage, member)})"
        )

    def _take_pruned(self, pruned: Pruned) -> None:
        self.pruned, self.population = pruned, pruned.population
        for member, job in enumerate(self.jobs):
            for name in pruned.population.masks:
                is_weight = pruned.population.layouts[name].kind == "weight"
                if is_weight and not pruned.population.parameters[name][member].any():
                    self._warn(member, _whole_layer(name, job.run))

    def _warn(self, member: int, line: str) -> None:
        self.warnings[member].append(line)
        log.warning(f"warning: {line}")

    def _measure(self) -> list[dict[str, float | None]]:
        """Validation and test accuracy of every member as it is now."""
        precision = PRECISIONS[self.run.precision]
        held_out = self.splits.validation
        validation = None if held_out is None else evaluate(self.population, held_out, self.splits, precision)
        test = evaluate(self.population, self.splits.test, self.splits, precision)
        return [
            {"validation": validation and validation[member], "test": test[member]} for member in range(len(self.jobs))
        ]

    def _report(self, member: int) -> Report:
        parameters = {name: parameter[member].detach() for name, parameter in self.population.parameters.items()}
        if self.pruned is None:
            return account(parameters, self.population.layouts, self.graph)
        stds = {name: values[member] for name, values in self.pruned.stds.items()}
        thresholds = {name: values[member] for name, values in self.pruned.thresholds.items()}
        return account(parameters, self.population.layouts, self.graph, stds=stds, thresholds=thresholds)

    def _stage_file(self, stage: str, member: int) -> Path:
        return self.jobs[member].folder / "stages" / f"{stage}.safetensors"

    def _keep(self, stage: str) -> None:
        for member, job in enumerate(self.jobs):
            write_state(
                self._stage_file(stage, member), self.population.state(member), self._description(job.run, stage)
            )
            results.write_history(job.folder, self.histories, member)

    def _description(self, run: Run, stage: str) -> dict[str, Any]:
        """What a weights file says of its network."""
        factory = run.model.factory
        return {
            "factory": {"_target_": factory.target, **factory.numbers},
            "input_shape": list(self.splits.input_shape),
            "num_classes": self.splits.num_classes,
            "mean": self.splits.mean,
            "std": self.splits.std,
            "stage": stage,
            "seed": run.seed,
        }

    def outcomes(self) -> list[dict[str, Any] | SparsityError]:
        """Every member's result, written into its folder, or its error."""
        if all(error is not None for error in self.errors):
            return list(self.errors)
        self.measured["final"] = self._measure()
        return [error or self._finish(member) for member, error in enumerate(self.errors)]

    def _finish(self, member: int) -> dict[str, Any]:
        job, report = self.jobs[member], self._report(member)
        result = self._result(member, report)
        job.folder.mkdir(parents=True, exist_ok=True)
        last = (["given", *self.run.stages])[-1]
        write_state(job.folder / "model.safetensors", self.population.state(member), self._description(job.run, last))
        results.write_result(job.folder, result)
        results.write_history(job.folder, self.histories, member)
        if job.run.plots:
            states = {name: population.state(member) for name, population in self.states.items()}
            plots.draw_all(job.folder, self.histories, result["layers"], states, results.title(result), member)
        if len(self.jobs) == 1:
            if not self.run.stages:
                console.show_report("as given", report)
            console.show_line(results.summary(result, job.folder))
        return {**result, "folder": str(job.folder)}

    def _result(self, member: int, report: Report) -> dict[str, Any]:
        job = self.jobs[member]
        measured = {name: each[member] for name, each in self.measured.items()}
        epoch = None if self.selected_epoch is None else self.selected_epoch[member]
        return {
            "format": results.FORMAT,
            "name": job.run.name,
            "stages": job.run.stages,
            "seed": job.run.seed,
            "accuracy": results.accuracies(measured, self.histories.get("finetune"), epoch, member),
            "selection": results.selection(job.run.stages, epoch),
            **results.describe_report(report),
            "seconds": {**self.seconds, "total": time.perf_counter() - self.start},
            "warnings": self.warnings[member],
            "environment": results.environment(self.device, self.run.precision),
            "config": job.config,
        }
