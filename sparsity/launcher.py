"""Hydra launchers: populations, whose members are trained as one stacked computation; processes of this machine.

Hydra imports this at every start, so that torch is left to the task. A task says how its jobs run together by an
attribute `together`; any other task runs one job at a time.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

from sparsity.errors import USER_MISTAKE, SparsityError, reason
from sparsity.processes import end_workers

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
        if max_members is not None and max_members < 1:
            _refuse(f"hydra.launcher.max_members must be a whole number ≥ 1, got {max_members}")
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


# --- processes of this machine ---------------------------------------------------------------------------------------


class LocalLauncher(Launcher):
    """submitit's local launcher with an end to how many jobs run at a time, and the cores shared between them."""

    def __init__(self, n_jobs: int, **settings: Any):
        if not isinstance(n_jobs, int) or (n_jobs < 1 and n_jobs != -1):
            _refuse(f"hydra.launcher.n_jobs must be a whole number ≥ 1, or -1 for one a core; got {n_jobs}")
        self.n_jobs, self.settings = n_jobs, settings

    def setup(self, **how: Any) -> None:
        """Takes what the jobs are run with."""
        try:
            from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher as Submitit
        except ImportError:
            _refuse("hydra/launcher=submitit_local needs an extra: pip install -e '.[submitit]'")
        self.submitit = Submitit(**self.settings)
        self.submitit.setup(**how)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The returns of the jobs, in their order."""
        cores = _num_cores()
        at_a_time = cores if self.n_jobs == -1 else self.n_jobs
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        with _threads(max(1, cores // at_a_time)), ThreadPool(at_a_time) as pool:  # its threads end with the program
            try:
                return pool.starmap(self._launch_one, zip(job_overrides, numbers), chunksize=1)
            except BaseException:  # Ctrl-C or SIGTERM
                pool.terminate()
                end_workers()
                raise

    def _launch_one(self, overrides: Sequence[str], number: int) -> JobReturn:
        """The return of one job; a process that ends without one has failed, and does not stop others."""
        try:
            return self.submitit.launch([overrides], number)[0]
        except Exception as error:  # submitit's of several kinds
            failed = JobReturn()
            failed.return_value = SparsityError(f"member {number}: its process ended ({reason(error)})")
            failed.status = JobStatus.FAILED
            return failed


def _refuse(line: str) -> NoReturn:
    """Ends the program; an error would reach the user with its traceback."""
    print(line, file=sys.stderr)
    raise SystemExit(USER_MISTAKE)


def _num_cores() -> int:
    """The cores that this process may use."""
    from joblib import cpu_count

    return cpu_count()


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Gives processes that start meanwhile so many threads each, unless the user has said how many."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
