"""Configs → populations → stages → results: the only room that knows the whole way."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sparsity import config, results
from sparsity.errors import ConfigError, SparsityError
from sparsity.experiment.parts import device_of, first_population, load_data, machine
from sparsity.experiment.record import Job, Record
from sparsity.models import draws_random_numbers

log = logging.getLogger("sparsity")

Outcome = dict[str, Any] | SparsityError


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the pipeline as `python main.py OVERRIDES` does and returns what `result.json` holds, and its `folder`.

    Raises a SparsityError for a mistake of the user's. Sweeps (`-m`) are for the command line.
    """
    composed, hydra = config.compose(overrides)
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


def _run_one(
    composed: DictConfig, folder: Path, overrides: Sequence[str], choices: Mapping[str, str | None]
) -> dict[str, Any]:
    checked = config.read(composed, overrides=overrides, choices=choices)
    idle = config.idle_settings(checked, overrides)
    for line in idle:
        log.warning(f"warning: {line}")
    outcome = run_members([Job(checked, folder, OmegaConf.to_container(composed, resolve=True), idle)])[0]
    if isinstance(outcome, SparsityError):
        raise outcome
    return outcome


def run_members(jobs: Sequence[Job]) -> list[Outcome]:
    """The result of every job, trained together; a member that diverges gives its error, and the others go on.

    The jobs may differ in seed, decay, sensitivities, and the penalty's own floats alone.
    """
    runs = [job.run for job in jobs]
    with machine(runs[0].threads):
        device = device_of(runs[0].device)
        splits = load_data(runs[0]).to(device)
        population = first_population(runs, splits, device)
        if len(jobs) > 1 and draws_random_numbers(population.module):
            return [run_members([job])[0] for job in jobs]
        record = Record(jobs, splits, population, device)
        for stage in runs[0].stages:
            record.advance(stage)
            if record.all_failed:
                break
        return record.outcomes()
