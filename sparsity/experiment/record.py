"""What the stages of one population came to, member by member, and the files that say so."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsity import artifact, console, results
from sparsity.accounting import Report, account
from sparsity.config import START, Run
from sparsity.errors import DivergedError, ExportError, SparsityError, StageError, reason
from sparsity.evaluation import images_at_once
from sparsity.experiment.closing import causes, closing_lines
from sparsity.experiment.compacting import MOST_AT_ONCE, Compact, compact_member, figures_of, ranges_of
from sparsity.experiment.folder import check_writable, finished, held, writing
from sparsity.experiment.job import Job, Member
from sparsity.experiment.keys import Key
from sparsity.experiment.naming import beyond_plain
from sparsity.experiment.plan import Planned, planned
from sparsity.experiment.precision import precision_of
from sparsity.experiment.stored import check, circumstances, epoch_of, notes_of, population_of, tensors_of
from sparsity.experiment.views import accuracies, selection
from sparsity.files import file_digest
from sparsity.front import OF_COMPACT
from sparsity.kernels import Kernels
from sparsity.population import Population, join
from sparsity.results import card, plots
from sparsity.results.lines import Course
from sparsity.results.sealed import FORMAT, sealed
from sparsity.stages import MASKED, PENALIZED, Context
from sparsity.stages.rules import owner_of
from sparsity.store import Kept, Store
from sparsity.tables import say_parts
from sparsity.tracking import About, Following
from sparsity.training import Epoch, Watcher, measured
from sparsity.weights import NETWORK, write_state

log = logging.getLogger("sparsity")


class Record:
    """Remembers what the stages of one population came to, and writes it down as it comes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        keys: Sequence[Mapping[str, Key]],
        context: Context,
        population: Population,
        store: Store | None,
        choose: Callable[[Sequence[Planned], Population, Context], int],
    ):
        """choose: how many members are trained as one."""
        self.context, self.population, self.store = context, population, store
        self.device = population.device
        self.choose = choose
        self.at_a_time: int | None = None  # chosen where something is to be trained
        self.failed: dict[str, SparsityError] = {}  # by the stage's key
        self.splits, self.graph = context.splits, context.graph
        self.run = jobs[0].run
        self.stages = planned([job.run for job in jobs])
        self.named = {name for stage in self.stages for name in stage.states}  # states that stages name
        self.training = beyond_plain(self.run)  # now, as a teacher's file may go while members train
        self.start = time.perf_counter()
        self.members = [
            Member(job, key, population.member(index), warnings=[*job.notes])
            for index, (job, key) in enumerate(zip(jobs, keys))
        ]
        for member in self.members:
            member.following = Following(member.job.run.track.others, _known_before(member.job))
        self._note_data()
        self._note_whole_network(population)
        for job in jobs:
            check_writable(job.folder)
        if self.run.model.weights is not None:
            is_same = self.run.model.head is None  # the weights of all members
            found = self._measure(population.member(0) if is_same else population)
            for index, member in enumerate(self.members):
                member.given = found[0 if is_same else index]
        if START in self.named:
            for member in self.members:
                member.states[START] = member.population

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
        if self.splits.validation is None and any(stage.arguments.get("select") for stage in self.stages):
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
                keys = {name: key.key for name, key in member.keys.items()}
                member.finished = finished(member.job.folder, keys, member.job.overrides)
            yield

    @property
    def alive(self) -> list[Member]:
        """The members that have not failed and are not finished."""
        return [member for member in self.members if member.error is None and member.finished is None]

    def advance_all(self) -> None:
        """Takes every stage in order."""
        for stage in self.stages:
            self.advance(stage)

    def advance(self, stage: Planned) -> None:
        """Takes one stage, and first those of its epochs that a later stage names.

        From the store where they are there, else computed, once for the members that share it.
        """
        if stage.holds_zeros:
            for member in self.alive:
                _warn_of_zeros(stage.name, member)
        for state in sorted(name for name in self.named if name.startswith(f"{stage.name}@")):
            found = self._obtained(state, stage, stop=int(state.rpartition("@")[2]))
            for member in self._without_failed(state):
                tensors = found[member.keys[state].key].tensors
                member.states[state] = population_of(tensors, member.population, self.device)
        found = self._obtained(stage.name, stage)
        for member in self._without_failed(stage.name):
            self._take(stage, member, found[member.keys[stage.name].key])

    def _without_failed(self, name: str) -> list[Member]:
        """The members whose stage or state has not failed; notes why of the others."""
        for member in self.alive:
            member.error = self.failed.get(member.keys[name].key)
        return self.alive

    def _obtained(self, name: str, stage: Planned, stop: int | None = None) -> dict[str, Kept]:
        """By key, a stage of the living members, or its state after an epoch."""
        ready = self._found(name, stage, self.alive)
        missing = [member for member in self.alive if member.keys[name].key not in ready]
        if missing:
            with self._claimed(name, missing):
                ready |= self._found(name, stage, missing)  # by whoever held the lock until now
                ready |= self._computed(name, stage, stop, _first_of_each(name, missing, ready))
        return ready

    def _found(self, name: str, stage: Planned, members: Iterable[Member]) -> dict[str, Kept]:
        if self.store is None:
            return {}
        like = {member.keys[name].key: member.population for member in members}
        found = {key: self.store.find(name, key, partial(check, like=like[key])) for key in like}
        found = {key: kept for key, kept in found.items() if kept is not None}
        here = circumstances(stage, self.population, self.context)
        for kept in found.values():
            there = kept.note["computed_with"]
            keys = [key for key in ("threads", "torch", "device") if there.get(key) != here[key]]
            others = [f"{key}={there.get(key)}" for key in keys]
            how = f" with {', '.join(others)}" if others else ""
            log.info(f"{name:<10} from the store | computed in {_minutes(kept.note['seconds'])}{how}")
        return found

    def _claimed(self, name: str, members: Iterable[Member]) -> contextlib.AbstractContextManager[None]:
        if self.store is None:
            return contextlib.nullcontext()
        return self.store.claim(name, [member.keys[name].key for member in members])

    def _computed(self, name: str, stage: Planned, stop: int | None, members: list[Member]) -> dict[str, Kept]:
        """The stage of some members, trained together as many at a time as is set, and kept."""
        computed: dict[str, Kept] = {}
        if self.at_a_time is None and len(members) > 1 and stage.schedule is not None:
            self.at_a_time = self.choose(self.stages, self.population, self.context)
        while members:
            size = self.at_a_time or len(members)
            some, members = members[:size], members[size:]
            try:
                computed |= self._computed_together(name, stage, stop, some)
            except torch.OutOfMemoryError as error:
                if len(some) == 1:
                    self._fail(name, some[0], error, "out of memory: lower schedule.batch_size, or free some")
                    continue
                self.at_a_time = (len(some) + 1) // 2
                log.info(f"{len(some)} members do not fit into memory: they are trained {self.at_a_time} at a time")
                members = [*some, *members]
            except Exception as error:  # whatever custom code may raise
                if isinstance(error, AssertionError):
                    raise  # a mistake of ours
                if len(some) == 1:
                    self._fail(name, some[0], error, reason(error))
                    continue
                log.info(f"{len(some)} members together fail ({reason(error)}): they are trained one by one")
                self.at_a_time, members = 1, [*some, *members]
        return computed

    def _fail(self, name: str, member: Member, error: Exception, why: str) -> None:
        """Notes why a stage of a member, and of those that share it, has failed; others are not stopped."""
        failure = error if isinstance(error, SparsityError) else StageError(f"{name}: {type(error).__name__}: {why}")
        failure.__cause__ = failure.__cause__ or (None if failure is error else error)
        self.failed[member.keys[name].key] = failure

    def _computed_together(self, name: str, stage: Planned, stop: int | None, members: list[Member]) -> dict[str, Kept]:
        start = time.perf_counter()
        before = join([member.population for member in members])
        indexes = [self.members.index(member) for member in members]
        states = {state: join([member.states[state] for member in members]) for state in stage.states}
        watch = _watched(self.context.watch, members) if stop is None else self.context.watch
        context = replace(self.context.take(indexes), states=states, stop=stop, watch=watch)
        outcome = stage.take(indexes).run(before, context)
        after, notes = outcome.population, notes_of(outcome)
        seconds = time.perf_counter() - start
        how = circumstances(stage, before, context)
        for note, accuracy in zip(notes, self._measure(after)):
            note.update(accuracy=accuracy, seconds=seconds, computed_with=how)
        computed = {}
        for index, (member, note) in enumerate(zip(members, notes)):
            error = outcome.errors[index] if outcome.errors else None
            if error is None and note["diverged"] is None and not _is_finite(after, index):
                error = StageError(f"{name}: it gives weights that are NaN or infinite")
            if error is not None:
                self.failed[member.keys[name].key] = error
                continue
            kept = computed[member.keys[name].key] = Kept(tensors_of(after, index), note)
            if stop is None:
                member.computed.append(name)
            if self.store is not None and note["diverged"] is None:
                self.store.keep(name, *member.keys[name], kept=kept)
        return computed

    def _measure(self, population: Population) -> list[dict[str, float | None]]:
        """Validation and test accuracy of every member as it is now."""
        at_once = images_at_once(population, self.run.schedule.batch_size, self.context.image_bytes)
        sets = {"validation": self.splits.validation, "test": self.splits.test}
        found = {
            name: measured(population, data, self.splits, at_once, self.kernels)
            for name, data in sets.items()
            if data is not None
        }
        return [dict.fromkeys(sets) | dict(zip(found, values)) for values in zip(*found.values())]

    @functools.cached_property
    def kernels(self) -> Kernels | None:
        """Those of the network, where a stage trains by them."""
        loops = (stage.loop(self.population, self.context) for stage in self.stages)
        return next((loop.kernels for loop in loops if loop is not None and loop.kernels is not None), None)

    def _take(self, stage: Planned, member: Member, kept: Kept) -> None:
        """Brings one member to where a finished stage leaves it."""
        before = member.population
        member.population = population_of(kept.tensors, before, self.device)
        report = self._report(member.population)
        note = {**kept.note, "left": results.describe_left(report)}  # as this code counts it
        member.densities.append({row.name: row.density for row in report.rows})
        member.course = note.get("course", member.course)
        own = stage.take([self.members.index(member)])
        member.stages.append(_about(own, note))
        member.computed_with[stage.name] = note["computed_with"]
        if note["history"]:
            member.histories[stage.name] = [epoch_of(row) for row in note["history"]]
            for row in member.histories[stage.name]:  # what is from the store was not told
                member.following.epoch(stage.name, row)
        if MASKED in note["did"]:
            member.seen = {name: note[name] for name in ("stds", "thresholds") if name in note} or member.seen
            _warn_of_whole_layers(own, member, before)
            self._say_what_is_left(own, member, note)
        if "decay" in note:
            line = f"{stage.name:<10} {own.key('penalty')}.decay {note['decay']:.4g} in the end, as the budget asks"
            log.info(line, extra={"member": member.job.number})
        for line in note.get("said", ()):
            member.warn(f"{stage.name}: {line}")
        if PENALIZED in note["did"]:
            member.penalized = before, member.population
        if stage.name in self.named:
            member.states[stage.name] = member.population
        self._keep(stage.name, member)
        if note["diverged"] is not None:
            member.error = _divergence(own, note["diverged"], member)

    def _say_what_is_left(self, stage: Planned, member: Member, note: Mapping[str, Any]) -> None:
        """One line after pruning; the table of all tensors comes at the end."""
        left, accuracy = note["left"], note["accuracy"]
        line = f"{stage.name:<10} {left['nonzero']['weights']:,} of {left['total']['weights']:,} weights left"
        if "sensitivity" in note:
            line += f" | {stage.key('sensitivity')} {note['sensitivity']:.4g}, as the budget asks"
        if accuracy["validation"] is not None:
            line += f" | validation {accuracy['validation']:.2%}"
        log.info(line, extra={"member": member.job.number})

    def _keep(self, name: str, member: Member) -> None:
        """The files of one stage in the member's folder."""
        with writing(member.job.folder):
            path = _stage_file(name, member)
            about = write_state(path, member.population.state(0), self._description(member.job.run, name))
            member.files[path.relative_to(member.job.folder).as_posix()] = about
            results.write_history(member.job.folder, member.histories, 0)

    def _report(self, population: Population, seen: Mapping[str, Any] | None = None) -> Report:
        """What is left of a population of one."""
        parameters = {name: parameter[0].detach() for name, parameter in population.parameters.items()}
        buffers = {name: buffer[0].detach() for name, buffer in population.buffers.items()}
        return account(parameters, population.layouts, self.graph, buffers=buffers, **(seen or {}))

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
        for member in self.members:
            if member.error is not None:
                member.following.end(None, str(member.error))
        return [member.error or member.finished or self._finish(member) for member in self.members]

    def _finish(self, member: Member) -> dict[str, Any]:
        job, report = member.job, self._report(member.population, member.seen)
        description = self._description(job.run, ["given", *(stage.name for stage in self.stages)][-1])
        compression, labels = report.compression["weights"], self.splits.test.labels
        closing = closing_lines(job.run, member.given, member.stages, compression, labels)
        member.warnings += closing
        with writing(job.folder):
            about = write_state(job.folder / NETWORK, member.population.state(0), description)
            member.files[NETWORK] = about
            compact = self._compact(member, report, description)
            result = sealed(self._result(member, report, compact))
            results.write_history(job.folder, member.histories, 0)
            if _asked(job.run.plots, job):
                self._draw(member, result)
            results.write_result(job.folder, result)  # the last file: where it is, the run is whole
        member.following.end(result)
        if not job.in_sweep:
            self._show(member, report)
        if result["card"] is not None and _asked(job.run.card, job):
            card.show(result["card"], result["latency"])
        say_parts(results.summary(result, job.folder))
        for line in [] if job.in_sweep else closing:
            log.warning(f"warning: {line}", extra={"member": job.number})
        return {**result, "folder": str(job.folder)}

    def _compact(self, member: Member, report: Report, description: Mapping[str, Any]) -> Compact | None:
        """The compact network of a member, where it is asked for, with what it saves."""
        job = member.job
        wanted = job.run.card or job.run.export.others or OF_COMPACT & {*job.run.objectives}
        if not (_asked(job.run.compact, job) or wanted):
            return None
        at_once = images_at_once(member.population, MOST_AT_ONCE, self.context.image_bytes)
        about = artifact.About(
            **{name: description[name] for name in ("input_shape", "classes", "mean", "std")},
            figures=figures_of(
                {
                    "name": job.run.name,
                    "seed": job.run.seed,
                    "stages_run": member.stages,
                    **results.describe_left(report),
                }
            ),
        )
        found = compact_member(
            member.population, self.splits, report, job.folder, about, at_once, ranges_of(member.stages)
        )
        for line in found.lines:
            member.warn(line)
        if found.file is not None:
            member.files[artifact.NAME] = found.file
        found.card["exports"] = self._export(member, found)
        dense = accuracies(member.stages, member.given, member.histories)["dense"]["test"]
        if dense is not None:
            found.card = {"dense": {"parameters": report.total["parameters"], "accuracy": dense}} | found.card
        return found

    def _export(self, member: Member, compact: Compact) -> dict[str, Any]:
        """The compact network in the forms that are asked for, and how each compares; what fails is told."""
        found: dict[str, Any] = {}
        for name, export in member.job.run.export.others.items():
            if compact.network is None:
                member.warn(f"export={name} is left out: there is no compact network to export")
                continue
            try:
                with console.waiting(f"export={name}"):
                    network = compact.quantized or compact.network
                    made = export.function.partial()(network, self.splits.test, member.job.folder)
            except ExportError as error:
                member.warn(f"export={name} is left out: {error}")
                continue
            found[name] = {"files": made.files, "difference": made.difference, "accuracy": made.accuracy}
            if made.latency:
                compact.latency[name] = made.latency
            if compact.quantized is not None and name == "onnx":
                compact.latency["quantized"] = made.latency
            for line in made.notes:
                log.info(line, extra={"member": member.job.number})
            for file in made.files:
                member.files[file] = {"bytes": made.files[file], "sha256": file_digest(member.job.folder / file)}
        return found

    def _draw(self, member: Member, result: Mapping[str, Any]) -> None:
        """The pictures of a run, the weights before and after its last penalty among them."""
        names = ("before regularizing", "after regularizing")
        states = {name: each.state(0) for name, each in zip(names, member.penalized or ())}
        folder, title = member.job.folder, results.title(result)
        plots.draw_all(folder, member.histories, result, states, title, _course(member))
        if result["card"] is not None and _asked(member.job.run.card, member.job):
            card.draw(folder / card.CARD, result["card"], result["latency"], title)

    def _show(self, member: Member, report: Report) -> None:
        """The table of what is left, once: later stages leave the zeros that pruning made."""
        masks = any(MASKED in stage["did"] for stage in member.stages)
        if masks or not self.stages or any(stage.holds_zeros for stage in self.stages):
            console.show_report(f"after {self.stages[-1].name}" if self.stages else "as given", report)

    def _result(self, member: Member, report: Report, compact: Compact | None) -> dict[str, Any]:
        job, run = member.job, member.job.run
        typed = [*job.flags, *job.overrides]
        names = [stage.name for stage in self.stages]
        return {
            "format": FORMAT,
            "name": run.name,
            "stages": names,
            "stages_run": member.stages,
            "seed": run.seed,
            "classes": self.splits.classes,
            "accuracy": accuracies(member.stages, member.given, member.histories),
            "selection": selection(member.stages),
            "training": self.training,
            **results.describe_report(report),
            "card": compact and compact.card,
            "latency": compact and compact.latency,
            "seconds": {**member.seconds, "total": time.perf_counter() - self.start},
            "computed": member.computed,
            "computed_with": member.computed_with,
            "keys": {name: key.key for name, key in member.keys.items()},
            "files": member.files,
            "warnings": member.warnings,
            "overrides": list(job.overrides),
            "flags": list(job.flags),
            "environment": results.environment(self.device, precision_of(run, self.device), typed),
            "config": job.config,
        }


def _asked(setting: bool | None, job: Job) -> bool:
    """Whether something is made for a job: None asks for it of a single run, not of each member of a sweep."""
    return not job.in_sweep if setting is None else setting


def _course(member: Member) -> Course | None:
    """The densities from stage to stage where several prune, or through the only one, if it trains meanwhile."""
    if sum(MASKED in stage["did"] for stage in member.stages) > 1:
        shares = {name: [each[name] for each in member.densities] for name in member.densities[0]}
        names = [stage["name"] for stage in member.stages]
        return Course(range(len(names)), shares, names)
    return None if member.course is None else Course(member.course["steps"], member.course["densities"])


def _about(stage: Planned, note: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage of one member came to, as its result has it."""
    left = note["left"]
    return {
        "name": stage.name,
        "function": stage.function,
        "round": stage.stages[0].round,
        "did": note["did"],
        "accuracy": note["accuracy"],
        **{name: left[name] for name in ("nonzero", "compression", "macs", "structure")},
        "selected_epoch": note["selected_epoch"],
        "final_from": note.get("final_from", 0),  # the first epoch with the final masks
        "sensitivity": note.get("sensitivity", (stage.arguments.get("sensitivity") or [None])[0]),
        "budget": note.get("budget"),
        "decay": note.get("decay"),
        "quantized": note.get("quantized"),
        "notes": note.get("said", []),
        "seconds": note["seconds"],
    }


def _known_before(job: Job) -> About:
    """What trackers are told of a run first."""
    group = job.folder.parent.name if job.in_sweep else None
    return About(job.folder.name, group, job.folder, job.config or {})


def _watched(watch: Callable[..., Watcher], members: Sequence[Member]) -> Callable[..., Watcher]:
    """What a stage is watched by, so that the members' trackers are told of every epoch, too."""
    return lambda *stage: _Telling(watch(*stage), stage[0], [member.following for member in members])


class _Telling(Watcher):
    """Remembers whom to tell of the epochs of a stage."""

    def __init__(self, watcher: Watcher, stage: str, followings: Sequence[Following]):
        self.watcher, self.stage, self.followings = watcher, stage, followings
        self.batch, self.close = watcher.batch, watcher.close

    def epoch(self, row: Epoch) -> None:
        """Shows it, and tells each member's trackers."""
        self.watcher.epoch(row)
        for index, following in enumerate(self.followings):
            following.epoch(self.stage, row, index)


def _is_finite(population: Population, member: int) -> bool:
    return all(bool(parameter[member].isfinite().all()) for parameter in population.parameters.values())


def _first_of_each(name: str, members: Iterable[Member], ready: Mapping[str, Kept]) -> list[Member]:
    """One member for each key that is not there yet."""
    first: dict[str, Member] = {}
    for member in members:
        first.setdefault(member.keys[name].key, member)
    return [member for key, member in first.items() if key not in ready]


def _warn_of_whole_layers(stage: Planned, member: Member, before: Population) -> None:
    """Names the weights of which the rule took the last entry that was not zero."""
    after = member.population
    for name in after.masks:
        if after.layouts[name].kind == "weight" and before.parameters[name].any() and not after.parameters[name].any():
            member.warn(_whole_layer(name, stage, member))


def _whole_layer(name: str, stage: Planned, member: Member) -> str:
    layer = name.rpartition(".")[0] or name
    layers = stage.rules[0].layers if stage.rules else {}
    owner, number = owner_of(name, layers), member.stages[-1]["sensitivity"]
    budget, remedy = (stage.arguments.get("budget") or [None])[0], "lower it"
    if owner is not None:
        cause = f"{stage.key('rule')}.layers.{owner}={layers[owner]:g}"
    elif budget is not None:
        cause, remedy = " and ".join(key for key, _ in budget.alone()), budget.turned(pruning="less")
    else:
        cause = f"{stage.key('sensitivity')}={number:g}"
    return (
        f"{cause} pruned all of {name}, so that the output no longer depends on the input there: {remedy}, or "
        f"give the layer its own by prune.layers.{layer}"
    )


def _warn_of_zeros(name: str, member: Member) -> None:
    """Names what is all zero, be it never pruned, before training holds it."""
    population = member.population
    known = " ".join(line for line in member.warnings if " pruned all of " in line)
    names = [
        own
        for own, parameter in population.trainable.items()
        if population.layouts[own].kind in ("weight", "bias")
        and not parameter.any()
        and f" pruned all of {own}," not in known
        and (population.layouts[own].kind == "weight" or own not in population.masks or population.masks[own].any())
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        member.warn(
            f"all zero before {name}, which holds zeros: {', '.join(names[:3])}{more} cannot learn: train first, by a "
            "stage that does not"
        )


def _divergence(stage: Planned, epoch: int, member: Member) -> DivergedError:
    return DivergedError(
        f"{stage.name}: the loss became NaN or infinite in epoch {epoch}; {causes(stage)} is likely too large: lower "
        f"it (the last good state is in {_stage_file(stage.name, member)})"
    )


def _stage_file(name: str, member: Member) -> Path:
    return member.job.folder / "stages" / f"{name}.safetensors"


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02}"
