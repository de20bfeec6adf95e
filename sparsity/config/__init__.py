"""The schema of a run: a composed config in, checked dataclasses out; every mistake names key, value and remedy."""

from sparsity.config.composing import compose, folder_of_run, hydra_of, register
from sparsity.config.grids import check_grid, folder_of_member
from sparsity.config.mistakes import mistake, said, watch_warnings
from sparsity.config.options import check_options
from sparsity.config.paths import at_home, settle, shell_home
from sparsity.config.reading import idle_hydra, idle_settings, read, shown, typed_in, unread
from sparsity.config.recipe import START
from sparsity.config.schema import METHODS, RULE, SEARCHED, Data, Model, Normalization, Ramp, Run, Schedule, Stage
from sparsity.config.sweeps import check_sweep, count_members, is_numbered, search_ranges, sweep_name, swept_keys
from sparsity.config.trust import admitted, check_variables, may_call
from sparsity.config.typed import check
from sparsity.config.yamls import check_yamls

__all__ = [
    "METHODS",
    "RULE",
    "SEARCHED",
    "START",
    "Data",
    "Model",
    "Normalization",
    "Ramp",
    "Run",
    "Schedule",
    "Stage",
    "admitted",
    "at_home",
    "check",
    "check_grid",
    "check_options",
    "check_sweep",
    "check_variables",
    "check_yamls",
    "compose",
    "count_members",
    "folder_of_member",
    "folder_of_run",
    "hydra_of",
    "idle_hydra",
    "idle_settings",
    "is_numbered",
    "may_call",
    "mistake",
    "read",
    "register",
    "said",
    "search_ranges",
    "settle",
    "shell_home",
    "shown",
    "sweep_name",
    "swept_keys",
    "typed_in",
    "unread",
    "watch_warnings",
]
