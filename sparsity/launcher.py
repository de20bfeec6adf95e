"""The Hydra launcher for populations: members that differ in numbers alone are trained as one stacked computation.

Hydra imports this at every start, so that torch is left to the task. A task says how its jobs run together by an
attribute `together`; any other task runs one job at a time.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from omegaconf import DictConfig, open_dict

from sparsity.errors import SparsityError

log = logging.getLogger("sparsity")


@dataclass
class PopulationConf:
    """The launcher's settings."""

    _target_: str = "sparsity.launcher.PopulationLauncher"
    stacked: bool | None = None  # None: on a CPU what a short measurement says, on a GPU always
    max_members: int | None = None  # of one population; None: as many as fit into half of the free memory


ConfigStore.instance().store(group="hydra/launcher", name="population", node=PopulationConf, provider="sparsity")


class PopulationLauncher(BasicLauncher):
    """Runs the jobs that a sweeper hands over together, and gives each its own folder, log, result and failure."""

    def __init__(self, stacked: bool | None = None, max_members: int | None = None):
        super().__init__()
        self.stacked, self.max_members = stacked, max_members

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The returns of the jobs, in their order."""
        together = getattr(self.task_function, "together", None)
        if together is None:
            return super().launch(job_overrides, initial_job_idx)
        setup_globals()
        self._configure_log()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [self._compose(initial_job_idx + index, each) for index, each in enumerate(job_overrides)]
        heard: list[list[logging.LogRecord]] = [[] for _ in jobs]
        outcomes = together(
            jobs, listen=lambda members: _listening(heard, members), stacked=self.stacked, limit=self.max_members
        )
        returns = [self._return(*each) for each in zip(jobs, outcomes, heard)]
        self._configure_log()
        return returns

    def _configure_log(self) -> None:
        own = self.config.hydra
        configure_log(own.hydra_logging, own.verbose, execution_whitelist=self.hydra_context.execution_whitelist)

    def _compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """The config of one job."""
        log.info(f"#{number} : {' '.join(filter_overrides(overrides))}")
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
        return composed

    def _return(self, job: DictConfig, outcome: Any, heard: list[logging.LogRecord]) -> JobReturn:
        """What Hydra makes of a job: its folder, its log, and its result or its error."""

        def finish(_: DictConfig) -> Any:
            _write_log(heard)
            if isinstance(outcome, SparsityError):
                log.error(outcome)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return run_job(
            hydra_context=self.hydra_context,
            task_function=finish,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


class _Listener(logging.Handler):
    """Remembers what is logged; what says whose it is, for that member alone."""

    def __init__(self, heard: Sequence[list[logging.LogRecord]], members: Sequence[int]):
        super().__init__()
        self.heard, self.members = heard, members

    def emit(self, record: logging.LogRecord) -> None:
        for member in self.members:
            if getattr(record, "member", member) == member:
                self.heard[member].append(record)


@contextlib.contextmanager
def _listening(heard: Sequence[list[logging.LogRecord]], members: Sequence[int]) -> Iterator[None]:
    """Keeps what is logged meanwhile for the logs of some members."""
    listener = _Listener(heard, members)
    log.addHandler(listener)
    try:
        yield
    finally:
        log.removeHandler(listener)


def _write_log(heard: Sequence[logging.LogRecord]) -> None:
    """What was said of a member, into its log file; the terminal has shown it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            for record in heard:
                handler.handle(record)
