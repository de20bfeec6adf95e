"""Configs → populations → stages → results: the only room that knows the whole way."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sparsity import config, results
from sparsity.errors import ConfigError, SparsityError
from sparsity.experiment.parts import (
    can_be_stacked,
    check_methods,
    device_of,
    first_population,
    ingredients,
    load_data,
    machine,
)
from sparsity.experiment.record import Job, Record

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
    outcome = run_members([Job(checked, folder, OmegaConf.to_container(composed, resolve=True), idle, overrides)])[0]
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

    The jobs may differ in seed, decay, sensitivities, and the penalty's own floats alone.
    """
    runs = [job.run for job in jobs]
    with machine(runs[0].threads):
        device = device_of(runs[0].device)
        splits = load_data(runs[0]).to(device)
        population = first_population(runs, splits, device)
        parts = ingredients(runs, splits, population, device)
        check_methods(runs[0], population, parts)
        if not can_be_stacked(population, parts):
            return [run_members([job])[0] for job in jobs]
        record = Record(jobs, parts, population, device)
        for stage in runs[0].stages:
            record.advance(stage)
            if record.all_failed:
                break
        return record.outcomes()
