"""Configs → populations → stages → results: the only room that knows the whole way."""

import contextlib
import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sparsity import config, console, results
from sparsity.config.signatures import marked
from sparsity.data import Splits
from sparsity.errors import ConfigError, SparsityError, reason
from sparsity.evaluation import image_bytes
from sparsity.experiment.checks import check_stages
from sparsity.experiment.folder import finished
from sparsity.experiment.job import Job
from sparsity.experiment.keys import Key, stage_keys
from sparsity.experiment.loading import load_data
from sparsity.experiment.machine import device_of, machine
from sparsity.experiment.members import first_population, members_at_a_time
from sparsity.experiment.plan import planned
from sparsity.experiment.precision import PRECISIONS, precision_of
from sparsity.experiment.record import Record
from sparsity.experiment.teachers import teachers_of
from sparsity.graph import trace
from sparsity.limits import Budget
from sparsity.nodes import EACH, Call
from sparsity.stages import Context
from sparsity.store import Store

log = logging.getLogger("sparsity")

SWEEPER = "hydra/sweeper"
Outcome = dict[str, Any] | SparsityError


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the pipeline as `python main.py OVERRIDES` does and returns what `result.json` holds, and its `folder`.

    Raises a SparsityError for a mistake of the user's. Sweeps (`-m`) are for the command line.
    """
    if not log.hasHandlers():  # in a notebook, where nobody else shows what a run says
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    trust = config.admitted(overrides)
    composed, hydra = config.compose(overrides)
    with config.hydra_of(hydra):
        return _run_one(composed, hydra, config.folder_of_run(hydra), trust)


def run_job(composed: DictConfig, trust: Sequence[str] = ()) -> tuple[float, ...]:
    """Runs one job of Hydra's and returns its objectives, for a sweeper; trust: from `config.admitted`."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    with _failure_in(folder, hydra.overrides.task) if hydra.mode is RunMode.MULTIRUN else contextlib.nullcontext():
        result = _run_one(composed, hydra, folder, trust)
    return results.objectives(result, composed.objectives)


def run_jobs(
    composed: Sequence[DictConfig],
    trust: Sequence[str] = (),
    *,
    listen: Callable[[Sequence[int]], contextlib.AbstractContextManager[None]],
    stacked: bool | None = None,
    limit: int | None = None,
) -> list[tuple[float, ...] | Exception]:
    """The objectives of Hydra's jobs, or their errors; those that differ in numbers alone are trained together.

    composed: with `hydra` in them; listen: is given the jobs that what is said meanwhile is of.
    """
    found: list[Any] = [None] * len(composed)
    jobs: dict[int, Job] = {}
    for index, each in enumerate(composed):
        with listen([index]), _hydra_of(each):
            found[index] = _prepared(each, trust)
        if isinstance(found[index], Job):
            jobs[index] = replace(found[index], number=index)
    for indexes in _groups(jobs):
        with listen(indexes):
            outcomes = _run_group([jobs[index] for index in indexes], stacked, limit)
        for index, outcome in zip(indexes, outcomes):
            found[index] = outcome
    for index, outcome in enumerate(found):
        if isinstance(outcome, Exception):
            results.write_failure(_folder_of(composed[index]), outcome)
        else:
            found[index] = results.objectives(outcome, composed[index].objectives)
    return found


@contextlib.contextmanager
def _hydra_of(composed: DictConfig) -> Iterator[None]:
    """Lets `${hydra:…}` in a config mean the job's own, as it does where the job runs alone."""
    instance = HydraConfig.instance()
    before, own = instance.cfg, copy.deepcopy(composed)
    OmegaConf.set_readonly(own.hydra, False)
    with open_dict(own):
        own.hydra.runtime.output_dir = str(_folder_of(composed))
    instance.set_config(own)
    try:
        yield
    finally:
        instance.cfg = before


def _prepared(composed: DictConfig, trust: Sequence[str]) -> Job | Exception:
    """The checked job of a composed config, or what is wrong with it."""
    try:
        folder = _folder_of(composed)
        folder.mkdir(parents=True, exist_ok=True)
        results.begin(folder, composed.hydra.overrides.task)
        own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
        return _job(own, composed.hydra, folder, trust)
    except (SparsityError, OSError) as error:
        return error


def _folder_of(composed: DictConfig) -> Path:
    """The folder that Hydra gives a job of a sweep."""
    return Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir)).absolute()


def _groups(jobs: Mapping[int, Job]) -> list[list[int]]:
    """The jobs whose runs differ in seed, decay, sensitivities and the methods' own floats alone."""
    groups: dict[str, list[int]] = {}
    for index, job in jobs.items():
        groups.setdefault(_kind_of(job.run), []).append(index)
    return list(groups.values())


def _kind_of(run: config.Run) -> str:
    """All that members of one population have in common, as text."""
    own = (
        *config.SEARCHED,
        "loss",
        "sensitivity",
        "budget",
        "ramp",
        "seed",
        "name",
        "track",
        "plots",
        "compact",
        "card",
        "export",
    )  # which stages have read
    shared = {each.name: getattr(run, each.name) for each in dataclasses.fields(run) if each.name not in own}
    return json.dumps(_alike(shared, False), default=str)


def _alike(value: Any, is_each: bool) -> Any:
    """A setting as text, without the floats in which members of one population may differ."""
    if isinstance(value, config.Stage):
        each = marked(value.call.function, EACH)
        numbers = {name: _alike(number, name in each) for name, number in value.call.numbers.items()}
        return [value.name, value.call.target, numbers]
    if isinstance(value, Budget) and is_each:
        return "a budget"
    if isinstance(value, Call):
        return [value.target, _alike(value.numbers, is_each)]
    if dataclasses.is_dataclass(value):
        found = {
            each.name: _alike(getattr(value, each.name), is_each and each.name != "teacher_model")
            for each in dataclasses.fields(value)
        }
        return found if not is_each else {name: entry for name, entry in found.items() if name != "search"}
    if isinstance(value, Mapping):
        return {name: _alike(entry, is_each) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_alike(entry, is_each) for entry in value]
    return "a number" if is_each and isinstance(value, float) else value


def _run_group(jobs: Sequence[Job], stacked: bool | None, limit: int | None) -> list[Outcome | Exception]:
    """The outcomes of one group; what fails it as a whole is found out member by member."""
    try:
        return run_members(jobs, stacked=stacked, limit=limit)
    except Exception as error:
        if len(jobs) == 1:
            return [error]
        log.warning(f"warning: {len(jobs)} members together fail ({reason(error)}): they are run one by one")
        return [_run_group([job], stacked, limit)[0] for job in jobs]


@contextlib.contextmanager
def _failure_in(folder: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Leaves `failure.json` in the folder of a member that fails, for the summary of its sweep."""
    results.begin(folder, overrides)
    try:
        yield
    except Exception as error:
        results.write_failure(folder, error)
        raise


def _run_one(composed: DictConfig, hydra: DictConfig, folder: Path, trust: Sequence[str]) -> dict[str, Any]:
    outcome = run_members([_job(composed, hydra, folder, trust)])[0]
    if isinstance(outcome, SparsityError):
        raise outcome
    return outcome


def _job(composed: DictConfig, hydra: DictConfig, folder: Path, trust: Sequence[str]) -> Job:
    """The checked job of a composed config."""
    _check_search(composed, hydra)
    config.check_variables(hydra, trust)
    composed = config.settle(composed, str(hydra.runtime.cwd) if hydra.job.chdir else None)
    typed = config.typed_in(hydra)
    checked = config.read(composed, trust=trust, choices=hydra.runtime.choices, folder=hydra.runtime.cwd, typed=typed)
    idle = config.idle_settings(checked, composed, typed)
    for line in [*idle, *config.idle_hydra(hydra)]:
        log.warning(f"warning: {line}")
    overrides = [entry for entry in hydra.overrides.task if not entry.startswith("search=")]
    whole = OmegaConf.to_container(composed, resolve=True)
    return Job(checked, folder, whole, idle, overrides, _flags(hydra), _is_sweep(hydra))


def _flags(hydra: DictConfig) -> list[str]:
    """What a command line needs beside the overrides to run a job by itself: where further YAMLs lie, and which."""
    own = hydra.runtime
    sources = [] if OmegaConf.is_missing(own, "config_sources") else own.config_sources  # of a composition by Python
    folders = [source.path for source in sources if source.provider == "command-line"]
    flags = [f"--config-dir={folder}" for folder in folders]
    if hydra.job.config_name not in (None, "config"):
        flags.append(f"--config-name={hydra.job.config_name}")
    if own.choices.get("experiment") and own.choices.get(SWEEPER, "basic") != "basic":
        flags.append(f"{SWEEPER}={own.choices[SWEEPER]}")  # whose keys the experiment may set
    return flags


def _is_sweep(hydra: DictConfig) -> bool:
    return hydra.mode is RunMode.MULTIRUN


def _check_search(composed: DictConfig, hydra: DictConfig) -> None:
    """A search needs a sweep, and whatever chooses members by their accuracy needs images to choose on."""
    search, sweeper = hydra.runtime.choices.get("search"), hydra.runtime.choices.get("hydra/sweeper")
    is_sweep = _is_sweep(hydra)
    if search and not is_sweep:
        raise ConfigError(f"search={search} needs a sweep: add -m, as in python main.py -m search={search}")
    if is_sweep and sweeper != "basic" and composed.data.validation == 0:
        chooser = f"search={search}" if search else f"hydra/sweeper={sweeper}"
        raise ConfigError(f"data.validation=0 leaves {chooser} nothing to select on: set it above 0")


def run_members(jobs: Sequence[Job], *, stacked: bool | None = None, limit: int | None = None) -> list[Outcome]:
    """The result of every job, trained together; a member that diverges gives its error, and the others go on.

    The jobs may differ in seed, decay, sensitivities, budgets, and the methods' own floats alone. A job whose folder
    holds its result already gives that. stacked: as one computation; None: where that is faster. limit: of members at
    a time.
    """
    if not jobs:
        return []
    run = jobs[0].run
    with machine(run.threads):
        device = device_of(run.device)
        kept = None if run.store is None else Store(run.store)
        splits, fingerprint = load_data(run, in_sweep=jobs[0].in_sweep)
        splits = splits.to(device)
        keys = [stage_keys(job.run, fingerprint, device.type, precision_of(job.run, device)) for job in jobs]
        outcomes: list[Outcome | None] = [
            finished(job.folder, {name: key.key for name, key in own.items()}, job.overrides)
            for job, own in zip(jobs, keys)
        ]
        left = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if left:
            choose = partial(members_at_a_time, stacked=stacked, limit=limit)
            own = [jobs[index] for index in left], [keys[index] for index in left]
            record = _record(*own, splits, device, kept, choose)
            with record.held():
                record.advance_all()
                for index, outcome in zip(left, record.outcomes()):
                    outcomes[index] = outcome
        return outcomes


def _record(
    jobs: Sequence[Job],
    keys: Sequence[dict[str, Key]],
    splits: Splits,
    device: torch.device,
    kept: Store | None,
    choose: Callable[..., int],
) -> Record:
    """The members before their first stage, everything about them checked."""
    runs = [job.run for job in jobs]
    population, warnings = first_population(runs, splits, device)
    first = runs[0]
    teachers, said = teachers_of(first, splits, device)
    context = Context(
        splits=splits,
        seeds=[run.seed for run in runs],
        graph=trace(population.module, splits.example()),
        precision=PRECISIONS[precision_of(first, device)],
        precision_is_asked=first.precision != "auto",
        step=first.step,
        model=first.model.factory.target,
        image_bytes=image_bytes(population, splits),
        watch=console.watch,
        choices=first.name,
        teachers=teachers,
    )
    check_stages(planned(runs), population, context)
    record = Record(jobs, keys, context, population, kept, choose)
    record.warn_all([*warnings, *said])
    return record
