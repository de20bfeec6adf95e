"""Configs → populations → stages → results: the only room that knows the whole way."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sparsity import config, results
from sparsity.data import Splits
from sparsity.errors import ConfigError, SparsityError
from sparsity.experiment.keys import Key, stage_keys
from sparsity.experiment.parts import (
    can_be_stacked,
    check_methods,
    device_of,
    first_population,
    ingredients,
    load_data,
    machine,
    precision_of,
)
from sparsity.experiment.record import Job, Record
from sparsity.store import Store

log = logging.getLogger("sparsity")

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
    return _run_one(composed, hydra, Path(hydra.run.dir).absolute(), trust)


def run_job(composed: DictConfig, trust: Sequence[str] = ()) -> tuple[float, ...]:
    """Runs one job of Hydra's and returns its objectives, for a sweeper; trust: from `config.admitted`."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    with _failure_in(folder) if hydra.mode is RunMode.MULTIRUN else contextlib.nullcontext():
        result = _run_one(composed, hydra, folder, trust)
    return results.objectives(result, composed.objectives)


@contextlib.contextmanager
def _failure_in(folder: Path) -> Iterator[None]:
    """Leaves `failure.json` in the folder of a member that fails, for the summary of its sweep."""
    results.clear_failure(folder)
    try:
        yield
    except Exception as error:
        results.write_failure(folder, error)
        raise


def _run_one(composed: DictConfig, hydra: DictConfig, folder: Path, trust: Sequence[str]) -> dict[str, Any]:
    _check_search(composed, hydra)
    checked = config.read(composed, trust=trust, choices=hydra.runtime.choices)
    idle = config.idle_settings(checked, list(hydra.overrides.task))
    for line in idle:
        log.warning(f"warning: {line}")
    overrides = [entry for entry in hydra.overrides.task if not entry.startswith("search=")]
    config_of = OmegaConf.to_container(composed, resolve=True)
    outcome = run_members([Job(checked, folder, config_of, idle, overrides, hydra.mode is RunMode.MULTIRUN)])[0]
    if isinstance(outcome, SparsityError):
        raise outcome
    return outcome


def _check_search(composed: DictConfig, hydra: DictConfig) -> None:
    """A search needs a sweep, and whatever chooses members by their accuracy needs images to choose on."""
    search, sweeper = hydra.runtime.choices.get("search"), hydra.runtime.choices.get("hydra/sweeper")
    is_sweep = hydra.mode is RunMode.MULTIRUN
    if search and not is_sweep:
        raise ConfigError(f"search={search} needs a sweep: add -m, as in python main.py -m search={search}")
    if is_sweep and sweeper != "basic" and composed.data.validation == 0:
        chooser = f"search={search}" if search else f"hydra/sweeper={sweeper}"
        raise ConfigError(f"data.validation=0 leaves {chooser} nothing to select on: set it above 0")


def run_members(jobs: Sequence[Job]) -> list[Outcome]:
    """The result of every job, trained together; a member that diverges gives its error, and the others go on.

    The jobs may differ in seed, decay, sensitivities, and the penalty's own floats alone. A job whose folder holds
    its result already gives that.
    """
    run = jobs[0].run
    with machine(run.threads):
        device = device_of(run.device)
        kept = None if run.store is None else Store(run.store)
        splits, fingerprint = load_data(run)
        splits = splits.to(device)
        keys = [stage_keys(job.run, fingerprint, device.type, precision_of(job.run, device)) for job in jobs]
        outcomes: list[Outcome | None] = [_finished(job, key) for job, key in zip(jobs, keys)]
        left = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if left:
            found = _run_left([jobs[index] for index in left], [keys[index] for index in left], splits, device, kept)
            for index, outcome in zip(left, found):
                outcomes[index] = outcome
        return outcomes


def _run_left(
    jobs: Sequence[Job], keys: Sequence[dict[str, Key]], splits: Splits, device: torch.device, kept: Store | None
) -> list[Outcome]:
    """The outcome of jobs that are not finished, as one population where they can be stacked."""
    runs = [job.run for job in jobs]
    population = first_population(runs, splits, device)
    parts = ingredients(runs, splits, population, device)
    check_methods(runs[0], population, parts)
    if not can_be_stacked(population, parts):
        return [_run_left([job], [key], splits, device, kept)[0] for job, key in zip(jobs, keys)]
    record = Record(jobs, keys, parts, population, device, kept)
    for stage in runs[0].stages:
        record.advance(stage)
    return record.outcomes()


def _finished(job: Job, keys: dict[str, Key]) -> dict[str, Any] | None:
    """The result that a folder holds already, if it is of the same stages."""
    result = results.read_result(job.folder)
    if result is None or result.get("keys") != {stage: key.key for stage, key in keys.items()}:
        return None
    log.info(f"finished before: {job.folder}")
    return {**result, "folder": str(job.folder)}
