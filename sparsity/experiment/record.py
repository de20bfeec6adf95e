"""What the stages of one population came to, member by member, and the files that say so."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsity import console, results, stages
from sparsity.accounting import Report, account
from sparsity.config import Run
from sparsity.errors import ConfigError, DivergedError, SparsityError
from sparsity.experiment.parts import owner_of, precision_of
from sparsity.graph import Layer, trace
from sparsity.population import Population
from sparsity.results import plots
from sparsity.stages import Ingredients, Pruned
from sparsity.training import Trained, evaluate
from sparsity.weights import write_state

log = logging.getLogger("sparsity")

MEASURED = {"pretrain": "dense", "regularize": "regularized", "prune": "pruned"}  # accuracies after a stage


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={folder} cannot be written: {error.strerror or error}") from error


def _whole_layer(name: str, run: Run) -> str:
    layer = name.rpartition(".")[0]
    owner = owner_of(name, run.prune.layers)
    key = "sensitivity" if owner is None else f"prune.layers.{owner}"
    number = run.sensitivity if owner is None else run.prune.layers[owner]
    return (
        f"{key}={number:g} pruned all of {name}, so that the output no longer depends on the input there: lower it, or "
        f"give the layer its own by prune.layers.{layer}"
    )


@dataclass(frozen=True)
class Job:
    """One member: its checked run, its folder; its config, notes and overrides as they are written into the result."""

    run: Run
    folder: Path
    config: Any = None
    notes: Sequence[str] = ()
    overrides: Sequence[str] = ()  # of the command line: those that run the member by itself


class Record:
    """Remembers what the stages of one population came to, and writes it down as it comes."""

    def __init__(self, jobs: Sequence[Job], parts: Ingredients, population: Population, device: torch.device):
        self.jobs, self.parts, self.population, self.device = jobs, parts, population, device
        self.splits = splits = parts.splits
        self.run = jobs[0].run
        self.graph: dict[str, Layer] = trace(population.module, splits.example())
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.measured: dict[str, list[dict[str, float | None]]] = {}
        self.histories: dict[str, list[Any]] = {}
        self.selected_epoch: list[int] | None = None
        self.pruned: Pruned | None = None
        self.states: dict[str, Population] = {}  # before and after regularizing
        self.errors: list[SparsityError | None] = [None] * len(jobs)
        self.warnings: list[list[str]] = [[*job.notes] for job in jobs]
        self._note_whole_network()
        self._check_folders()
        if self.run.model.weights is not None:
            self.measured["dense"] = self._measure()

    def _note_whole_network(self) -> None:
        weights = [name for name, layout in self.population.layouts.items() if layout.kind == "weight"]
        unseen = [name for name in weights if name not in self.graph]
        if unseen:
            self._warn_all(f"MACs leave out {', '.join(unseen)}: no linear layer or convolution uses them directly")
        if self.splits.validation is None and "finetune" in self.run.stages:
            self._warn_all("data.validation=0: nothing is selected; the network will be that of the last epoch")

    def _check_folders(self) -> None:
        """A folder that cannot be written is found out before anything trains."""
        for job in self.jobs:
            if (job.folder / "result.json").exists():
                raise ConfigError(f"hydra.run.dir={job.folder} holds a finished run: name another folder or remove it")
            with _writing(job.folder):
                (job.folder / "stages").mkdir(parents=True, exist_ok=True)
                if not os.access(job.folder / "stages", os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @property
    def all_failed(self) -> bool:
        """Whether no member is left."""
        return None not in self.errors

    def advance(self, stage: str) -> None:
        """Takes one stage."""
        before, start = self.population, time.perf_counter()
        if stage == "prune":
            self._take_pruned(stages.prune(before, self.parts))
        else:
            self._take_trained(stage, getattr(stages, stage)(before, self.parts))
        self.seconds[stage] = time.perf_counter() - start
        if stage in MEASURED:
            self.measured[MEASURED[stage]] = self._measure()
        if stage == "regularize":
            self.states = {"before regularizing": before, "after regularizing": self.population}
        self._keep(stage)
        if stage in ("prune", "finetune") and len(self.jobs) == 1:
            console.show_report(f"after {stage}", self._report(0))

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

    def _warn_all(self, line: str) -> None:
        for lines in self.warnings:
            lines.append(line)
        log.warning(f"warning: {line}")

    def _measure(self) -> list[dict[str, float | None]]:
        """Validation and test accuracy of every member as it is now."""
        held_out = self.splits.validation
        validation = None if held_out is None else evaluate(self.population, held_out, self.splits)
        test = evaluate(self.population, self.splits.test, self.splits)
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
            state, description = self.population.state(member), self._description(job.run, stage)
            with _writing(job.folder):
                write_state(self._stage_file(stage, member), state, description)
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
        if self.all_failed:
            return list(self.errors)
        self.measured["final"] = self._measure()
        return [error or self._finish(member) for member, error in enumerate(self.errors)]

    def _finish(self, member: int) -> dict[str, Any]:
        job, report = self.jobs[member], self._report(member)
        result = self._result(member, report)
        description = self._description(job.run, ["given", *self.run.stages][-1])
        with _writing(job.folder):
            write_state(job.folder / "model.safetensors", self.population.state(member), description)
            results.write_history(job.folder, self.histories, member)
            if job.run.plots:
                states = {name: population.state(member) for name, population in self.states.items()}
                plots.draw_all(job.folder, self.histories, result["layers"], states, results.title(result), member)
            results.write_result(job.folder, result)  # the last file: where it is, the run is whole
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
            "overrides": list(job.overrides),
            "environment": results.environment(self.device, precision_of(job.run, self.device)),
            "config": job.config,
        }
