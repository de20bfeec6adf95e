"""What the stages of one population came to, member by member, and the files that say so."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsity import console, results
from sparsity.accounting import Report, account
from sparsity.config import Run
from sparsity.errors import DivergedError, SparsityError, StageError, reason
from sparsity.evaluation import evaluate, images_at_once
from sparsity.experiment.closing import closing_lines
from sparsity.experiment.folder import check_writable, finished, held, writing
from sparsity.experiment.keys import Key
from sparsity.experiment.parts import owner_of
from sparsity.experiment.precision import precision_of
from sparsity.experiment.stored import check, circumstances, epoch_of, population_of, run_stage, tensors_of
from sparsity.graph import Graph, Layer
from sparsity.population import Population, join
from sparsity.results import plots
from sparsity.results.sealed import FORMAT, sealed
from sparsity.stages import Ingredients
from sparsity.store import Kept, Store
from sparsity.tables import say_parts
from sparsity.training import Epoch
from sparsity.weights import write_state

log = logging.getLogger("sparsity")

NETWORK = "model.safetensors"
MEASURED = {"pretrain": "dense", "regularize": "regularized", "prune": "pruned"}  # accuracies after a stage


def _whole_layer(name: str, run: Run) -> str:
    layer = name.rpartition(".")[0] or name
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
    flags: Sequence[str] = ()  # of the command line, before the overrides
    in_sweep: bool = False  # says one line on the terminal, not two tables
    number: int = 0  # among the jobs that run together


@dataclass
class Member:
    """What one member has come to."""

    job: Job
    keys: Mapping[str, Key]
    population: Population  # of this member alone
    error: SparsityError | None = None
    finished: dict[str, Any] | None = None  # the result, where another process was first
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and hash of the networks written
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)  # the stages that were not in the store
    computed_with: dict[str, dict[str, Any]] = field(default_factory=dict)  # threads, versions, … of every stage
    measured: dict[str, dict[str, float | None]] = field(default_factory=dict)
    histories: dict[str, list[Epoch]] = field(default_factory=dict)
    selected_epoch: int | None = None
    seen: dict[str, dict[str, float]] = field(default_factory=dict)  # what the pruning rule saw: stds, thresholds
    states: dict[str, Population] = field(default_factory=dict)  # before and after regularizing

    def warn(self, line: str) -> None:
        """Keeps a warning for the result."""
        self.warnings.append(line)
        log.warning(f"warning: {line}", extra={"member": self.job.number})


class Record:
    """Remembers what the stages of one population came to, and writes it down as it comes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        keys: Sequence[Mapping[str, Key]],
        parts: Ingredients,
        population: Population,
        device: torch.device,
        store: Store | None,
        choose: Callable[[Ingredients, Population, dict[str, Layer]], int],
        graph: Graph,
    ):
        """choose: how many members are trained as one."""
        self.parts, self.population, self.device, self.store = parts, population, device, store
        self.choose = choose
        self.at_a_time: int | None = None  # chosen where something is to be trained
        self.failed: dict[str, SparsityError] = {}  # by the stage's key
        self.splits = parts.splits
        self.run = jobs[0].run
        self.graph = graph
        self.start = time.perf_counter()
        self.members = [
            Member(job, key, population.member(index), warnings=[*job.notes])
            for index, (job, key) in enumerate(zip(jobs, keys))
        ]
        self._note_data()
        self._note_whole_network(population)
        for job in jobs:
            check_writable(job.folder)
        if self.run.model.weights is not None:
            is_same = self.run.model.head is None  # the weights of all members
            measured = self._measure(population.member(0) if is_same else population)
            for index, member in enumerate(self.members):
                accuracy = measured[0 if is_same else index]
                member.measured |= {"dense": accuracy, "final": accuracy}

    def _note_data(self) -> None:
        """What there is to say of the data, and settings of the command line that it makes no use of."""
        for line in self.splits.notes:
            self._warn_all(line)
        for member in self.members:
            for key in dict.fromkeys(override.lstrip("+~").partition("=")[0] for override in member.job.overrides):
                if key in self.splits.idle:
                    member.warn(f"{key} does nothing: {self.splits.idle[key]}")

    def _note_whole_network(self, population: Population) -> None:
        weights = [name for name, layout in population.layouts.items() if layout.kind == "weight"]
        unseen = [name for name in weights if name not in self.graph]
        if unseen:
            self._warn_all(f"MACs leave out {', '.join(unseen)}: no linear layer or convolution uses them directly")
        units = self.graph.units
        if units is None or units.unknown:
            them = "its functions do" if units is None else f"{', '.join(units.unknown)} does"
            self._warn_all(f"it is not known what {them} with channels: those stay, and count as kept")
        if self.splits.validation is None and "finetune" in self.run.stages:
            self._warn_all("data.validation=0: nothing is selected; the network will be that of the last epoch")

    def warn_all(self, lines: Iterable[str]) -> None:
        """Keeps warnings for the result of every member."""
        for line in lines:
            self._warn_all(line)

    def _warn_all(self, line: str) -> None:
        for member in self.members:
            member.warnings.append(line)
        log.warning(f"warning: {line}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the members' folders; a member that another process finished meanwhile is taken as it is."""
        with held([member.job.folder for member in self.members]):
            for member in self.members:
                keys = {stage: key.key for stage, key in member.keys.items()}
                member.finished = finished(member.job.folder, keys, member.job.overrides)
            yield

    @property
    def alive(self) -> list[Member]:
        """The members that have not failed and are not finished."""
        return [member for member in self.members if member.error is None and member.finished is None]

    def advance(self, stage: str) -> None:
        """Takes one stage: from the store where it is there, else computed, once for the members that share it."""
        if stage == "finetune":
            for member in self.alive:
                _warn_of_zeros(member)
        finished = self._found(stage, self.alive)
        missing = [member for member in self.alive if member.keys[stage].key not in finished]
        if missing:
            with self._claimed(stage, missing):
                finished |= self._found(stage, missing)  # by whoever held the lock until now
                finished |= self._computed(stage, _first_of_each(stage, missing, finished))
        for member in self.alive:
            key = member.keys[stage].key
            if key in self.failed:
                member.error = self.failed[key]
            else:
                self._take(stage, member, finished[key])

    def _found(self, stage: str, members: Iterable[Member]) -> dict[str, Kept]:
        if self.store is None:
            return {}
        like = {member.keys[stage].key: member.population for member in members}
        found = {key: self.store.find(stage, key, partial(check, stage, like=like[key])) for key in like}
        found = {key: kept for key, kept in found.items() if kept is not None}
        here = circumstances(stage, self.parts, self.device)
        for kept in found.values():
            there = kept.note["computed_with"]
            others = [
                f"{name}={there.get(name)}" for name in ("threads", "torch", "device") if there.get(name) != here[name]
            ]
            how = f" with {', '.join(others)}" if others else ""
            log.info(f"{stage:<10} from the store | computed in {_minutes(kept.note['seconds'])}{how}")
        return found

    def _claimed(self, stage: str, members: Iterable[Member]) -> contextlib.AbstractContextManager[None]:
        if self.store is None:
            return contextlib.nullcontext()
        return self.store.claim(stage, [member.keys[stage].key for member in members])

    def _computed(self, stage: str, members: list[Member]) -> dict[str, Kept]:
        """The stage of some members, trained together as many at a time as is set, and kept."""
        computed: dict[str, Kept] = {}
        if self.at_a_time is None and len(members) > 1 and stage in self.parts.loops:
            self.at_a_time = self.choose(self.parts, self.population, self.graph)
        while members:
            size = self.at_a_time or len(members)
            some, members = members[:size], members[size:]
            try:
                computed |= self._computed_together(stage, some)
            except torch.OutOfMemoryError as error:
                if len(some) == 1:
                    self._fail(stage, some[0], error, "out of memory: lower schedule.batch_size, or free some")
                    continue
                self.at_a_time = (len(some) + 1) // 2
                log.info(f"{len(some)} members do not fit into memory: they are trained {self.at_a_time} at a time")
                members = [*some, *members]
            except Exception as error:  # whatever code of the user's own may raise
                if isinstance(error, AssertionError):
                    raise  # a mistake of ours
                if len(some) == 1:
                    self._fail(stage, some[0], error, reason(error))
                    continue
                log.info(f"{len(some)} members together fail ({reason(error)}): they are trained one by one")
                self.at_a_time, members = 1, [*some, *members]
        return computed

    def _fail(self, stage: str, member: Member, error: Exception, why: str) -> None:
        """Notes why a stage of a member, and of those that share it, has failed; others are not stopped."""
        failure = error if isinstance(error, SparsityError) else StageError(f"{stage}: {type(error).__name__}: {why}")
        failure.__cause__ = failure.__cause__ or (None if failure is error else error)
        self.failed[member.keys[stage].key] = failure

    def _computed_together(self, stage: str, members: list[Member]) -> dict[str, Kept]:
        start = time.perf_counter()
        before = join([member.population for member in members])
        parts = self.parts.take([self.members.index(member) for member in members])
        after, notes = run_stage(stage, before, parts)
        seconds = time.perf_counter() - start
        for note, accuracy in zip(notes, self._measure(after)):
            note.update(accuracy=accuracy, seconds=seconds, computed_with=circumstances(stage, parts, after.device))
        computed = {}
        for index, (member, note) in enumerate(zip(members, notes)):
            kept = computed[member.keys[stage].key] = Kept(tensors_of(after, index), note)
            member.computed.append(stage)
            if self.store is not None and note.get("diverged") is None:
                self.store.keep(stage, *_named(member.keys[stage]), kept=kept)
        return computed

    def _measure(self, population: Population) -> list[dict[str, float | None]]:
        """Validation and test accuracy of every member as it is now."""
        held_out = self.splits.validation
        at_once = images_at_once(population, self.run.schedule.batch_size, self.parts.image_bytes)
        validation = None if held_out is None else evaluate(population, held_out, self.splits, at_once)
        test = evaluate(population, self.splits.test, self.splits, at_once)
        return [{"validation": validation and validation[index], "test": value} for index, value in enumerate(test)]

    def _take(self, stage: str, member: Member, kept: Kept) -> None:
        """Brings one member to where a finished stage leaves it."""
        before, note = member.population, kept.note
        member.population = population_of(kept.tensors, before, self.device)
        member.seconds[stage], member.computed_with[stage] = note["seconds"], note["computed_with"]
        member.measured["final"] = member.measured[MEASURED.get(stage, stage)] = note["accuracy"]
        if stage == "prune":
            member.seen = {name: note[name] for name in ("stds", "thresholds")}
            _warn_of_whole_layers(member, before)
            self._say_what_is_left(member, note["accuracy"])
        else:
            member.histories[stage] = [epoch_of(row) for row in note["history"]]
        if stage == "regularize":
            member.states = {"before regularizing": before, "after regularizing": member.population}
        if stage == "finetune":
            member.selected_epoch = note["selected_epoch"]
        self._keep(stage, member)
        if note.get("diverged") is not None:
            member.error = _divergence(stage, note["diverged"], member)

    def _say_what_is_left(self, member: Member, accuracy: Mapping[str, float | None]) -> None:
        """One line after pruning; the table of all tensors comes at the end."""
        report = self._report(member)
        line = f"{'prune':<10} {report.nonzero['weights']:,} of {report.total['weights']:,} weights left"
        if accuracy["validation"] is not None:
            line += f" | validation {accuracy['validation']:.2%}"
        log.info(line, extra={"member": member.job.number})

    def _keep(self, stage: str, member: Member) -> None:
        """The files of one stage in the member's folder."""
        with writing(member.job.folder):
            description = self._description(member.job.run, stage)
            path = _stage_file(stage, member)
            about = write_state(path, member.population.state(0), description)
            member.files[path.relative_to(member.job.folder).as_posix()] = about
            results.write_history(member.job.folder, member.histories, 0)

    def _report(self, member: Member) -> Report:
        parameters = {name: parameter[0].detach() for name, parameter in member.population.parameters.items()}
        buffers = {name: buffer[0].detach() for name, buffer in member.population.buffers.items()}
        return account(parameters, member.population.layouts, self.graph, buffers=buffers, **member.seen)

    def _description(self, run: Run, stage: str) -> dict[str, Any]:
        """What a weights file says of its network."""
        factory = run.model.factory
        return {
            "factory": {"_target_": factory.target, **factory.numbers},
            "input_shape": list(self.splits.input_shape),
            "num_classes": self.splits.num_classes,
            "classes": self.splits.classes,
            "mean": self.splits.mean,
            "std": self.splits.std,
            "stage": stage,
            "seed": run.seed,
        }

    def outcomes(self) -> list[dict[str, Any] | SparsityError]:
        """Every member's result, written into its folder, or its error."""
        return [member.error or member.finished or self._finish(member) for member in self.members]

    def _finish(self, member: Member) -> dict[str, Any]:
        job, report = member.job, self._report(member)
        description = self._description(job.run, ["given", *self.run.stages][-1])
        closing = closing_lines(job.run, member.measured, report.compression["weights"], self.splits.test.labels)
        member.warnings += closing
        with writing(job.folder):
            about = write_state(job.folder / NETWORK, member.population.state(0), description)
            member.files[NETWORK] = about
            result = sealed(self._result(member, report))
            results.write_history(job.folder, member.histories, 0)
            if job.run.plots or (job.run.plots is None and not job.in_sweep):
                states = {name: population.state(0) for name, population in member.states.items()}
                plots.draw_all(job.folder, member.histories, result["layers"], states, results.title(result), 0)
            results.write_result(job.folder, result)  # the last file: where it is, the run is whole
        if not job.in_sweep:
            self._show(report)
        say_parts(results.summary(result, job.folder))
        for line in [] if job.in_sweep else closing:
            log.warning(f"warning: {line}", extra={"member": job.number})
        return {**result, "folder": str(job.folder)}

    def _show(self, report: Report) -> None:
        """The table of what is left, once: finetuning leaves the zeros that pruning made."""
        last = next((stage for stage in reversed(self.run.stages) if stage in ("prune", "finetune")), None)
        if last is not None or not self.run.stages:
            console.show_report("as given" if last is None else f"after {last}", report)

    def _result(self, member: Member, report: Report) -> dict[str, Any]:
        job, run, epoch = member.job, member.job.run, member.selected_epoch
        typed = [*job.flags, *job.overrides]
        return {
            "format": FORMAT,
            "name": run.name,
            "stages": run.stages,
            "seed": run.seed,
            "classes": self.splits.classes,
            "accuracy": results.accuracies(member.measured, member.histories.get("finetune"), epoch, 0),
            "selection": results.selection(run.stages, epoch),
            **results.describe_report(report),
            "seconds": {**member.seconds, "total": time.perf_counter() - self.start},
            "computed": member.computed,
            "computed_with": member.computed_with,
            "keys": {stage: key.key for stage, key in member.keys.items()},
            "files": member.files,
            "warnings": member.warnings,
            "overrides": list(job.overrides),
            "flags": list(job.flags),
            "environment": results.environment(self.device, precision_of(run, self.device), typed),
            "config": job.config,
        }


def _first_of_each(stage: str, members: Iterable[Member], finished: Mapping[str, Kept]) -> list[Member]:
    """One member for each key that is not finished."""
    first: dict[str, Member] = {}
    for member in members:
        first.setdefault(member.keys[stage].key, member)
    return [member for key, member in first.items() if key not in finished]


def _named(key: Key) -> tuple[str, dict[str, Any]]:
    return key.key, key.ingredients


def _warn_of_whole_layers(member: Member, before: Population) -> None:
    """Names the weights of which the rule took the last entry that was not zero."""
    after = member.population
    for name in after.masks:
        if after.layouts[name].kind == "weight" and before.parameters[name].any() and not after.parameters[name].any():
            member.warn(_whole_layer(name, member.job.run))


def _warn_of_zeros(member: Member) -> None:
    """Names what is all zero, be it never pruned, before finetuning holds it."""
    population = member.population
    known = " ".join(line for line in member.warnings if " pruned all of " in line)
    names = [
        name
        for name, parameter in population.trainable.items()
        if population.layouts[name].kind in ("weight", "bias")
        and not parameter.any()
        and f" pruned all of {name}," not in known
        and (population.layouts[name].kind == "weight" or name not in population.masks or population.masks[name].any())
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        member.warn(
            f"all zero before finetuning, which holds zeros: {', '.join(names[:3])}{more} cannot learn: train first, "
            f"as by stages=[pretrain,prune,finetune]"
        )


def _divergence(stage: str, epoch: int, member: Member) -> DivergedError:
    run = member.job.run
    causes = f"schedule.{stage}.lr={getattr(run.schedule, stage).lr:g}"
    if stage == "regularize" and run.reg.penalty is not None:
        causes += f" or reg.decay={run.reg.decay:g}"
    return DivergedError(
        f"{stage}: the loss became NaN or infinite in epoch {epoch}; {causes} is likely too large: lower it (the "
        f"last good state is in {_stage_file(stage, member)})"
    )


def _stage_file(stage: str, member: Member) -> Path:
    return member.job.folder / "stages" / f"{stage}.safetensors"


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02}"
