"""Composes, hands over, maps errors to the exit status: `python main.py --help`."""

import logging
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sparsity import config
from sparsity.errors import USER_MISTAKE, SparsityError

INTERRUPTED = 130  # the exit status

config.register()
TRUST = config.admitted(sys.argv[1:])  # before Hydra composes, so that no YAML has a say in it
os.environ["SPARSITY_TRUST"] = ",".join(TRUST)  # for the processes that a launcher starts


def run(composed: DictConfig) -> tuple[float, ...]:
    """One job: a run, or a member of a sweep."""
    from sparsity import experiment  # torch takes seconds to import, and --help and bad keys need none of it

    try:
        return experiment.run_job(composed, TRUST)
    except SparsityError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        logging.getLogger("sparsity").error(error)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # a sweep goes on with its other members
        raise SystemExit(USER_MISTAKE) from error


def run_together(jobs: Sequence[DictConfig], **how: Any) -> list[Any]:
    """Jobs of a sweep as populations, for the launcher of that name."""
    from sparsity import experiment

    return experiment.run_jobs(jobs, TRUST, **how)


run.together = run_together
main = hydra.main(config_path="conf", config_name="config", execution_whitelist=config.TRUSTED)(run)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that ends the program: a user's mistake as one line, anything else in full."""
    if issubclass(kind, SparsityError) and os.environ.get("HYDRA_FULL_ERROR") != "1":
        print(error, file=sys.stderr)
        failures.append(error)
    else:
        sys.__excepthook__(kind, error, trace)


failures: list[BaseException] = []

if __name__ == "__main__":
    sys.excepthook = report
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        sys.exit(USER_MISTAKE if end.code == 1 and failures else end.code)
