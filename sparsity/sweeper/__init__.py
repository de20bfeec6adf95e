"""The Hydra sweeper for searches: hydra-optuna-sweeper's, extended where it falls short.

Hydra imports this at every start, so that Optuna is left to `search.py`.
"""

import os
import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sparsity.errors import USER_MISTAKE, SparsityError


class SearchSweeper(Sweeper):
    """Searches with Optuna, as `conf/hydra/sweeper/search.yaml` sets it; takes the stock sweeper's settings."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what the search works with."""
        from sparsity.sweeper.search import Search

        self.search = Search(**self.settings)
        self.search.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Searches; arguments: the overrides of the command line. A user's mistake ends it with one line."""
        try:
            self.search.sweep(arguments)
        except SparsityError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(error, file=sys.stderr)
            raise SystemExit(USER_MISTAKE) from error
