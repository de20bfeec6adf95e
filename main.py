"""Composes, hands over, maps errors to the exit status: `python main.py --help`."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra._internal import hydra as program
from hydra._internal import utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sparsity import config, processes
from sparsity.errors import USER_MISTAKE, ConfigError, SparsityError, one_line
from sparsity.streams import be_lenient, be_quiet

INTERRUPTED = 130  # the exit status

be_lenient()
config.register()
TRUST = config.admitted(sys.argv[1:])  # before Hydra composes, so that no YAML has a say in it
os.environ["SPARSITY_TRUST"] = ",".join(TRUST)  # for the processes that a launcher starts
be_quiet(TRUST)


def run(composed: DictConfig) -> tuple[float, ...]:
    """One job: a run, or a member of a sweep."""
    be_lenient()  # where a launcher runs it in a process of its own, too
    from sparsity import experiment  # torch takes seconds to import, and --help and bad keys need none of it

    try:
        return experiment.run_job(composed, TRUST)
    except SparsityError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        logging.getLogger("sparsity").error(error)
        if not any(getattr(handler, "stream", None) is sys.stderr for handler in logging.getLogger().handlers):
            print(error, file=sys.stderr)  # hydra/job_logging=disabled, none, stdout
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # a failed member does not stop the others of a sweep
        raise SystemExit(USER_MISTAKE) from error


def run_together(jobs: Sequence[DictConfig], **how: Any) -> list[Any]:
    """Jobs of a sweep as populations, for the launcher of that name."""
    from sparsity import experiment

    return experiment.run_jobs(jobs, TRUST, **how)


run.together = run_together
main = hydra.main(config_path="conf", config_name="config", execution_whitelist=config.may_call(TRUST))(run)


def reporting(report: Callable[..., Any], typed: Sequence[str]) -> Callable[..., Any]:
    """Hydra's `run_and_report`, but for a user's mistakes: they are raised as one line."""

    def run_and_report(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            line = config.mistake(error, typed)
            if line is not None:
                raise error if isinstance(error, SparsityError) else ConfigError(line) from error
            return report(function_that_raises(error))

    return run_and_report


def function_that_raises(error: Exception) -> Callable[[], None]:
    """What Hydra is given to report an error that came up before."""

    def function() -> None:
        raise error

    return function


def command_line(arguments: Sequence[str]) -> int | str | None:
    """Runs what is typed and returns the exit status; a user's mistake is one line."""
    options = argparse.Namespace(package=None)
    try:
        arguments = sys.argv[1:] = config.shell_home(arguments)
        processes.end_by_sigterm()
        options = config.check_options(arguments)
        config.watch_warnings()
        utils.run_and_report = program.run_and_report = reporting(utils.run_and_report, options.overrides)
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        if processes.is_interruption(end):
            return processes.TERMINATED
        return USER_MISTAKE if end.code == 1 and options.package else end.code  # a package that is not there
    except Exception as error:
        line = config.mistake(error, arguments)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        if line is None:
            return 1
        print(one_line(line), file=sys.stderr)
        return USER_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
