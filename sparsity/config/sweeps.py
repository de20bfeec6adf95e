"""What a sweep is: the keys that it sweeps, its name, the number of its members."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from sparsity.config.reading import check_objectives, is_of_stages
from sparsity.config.recipe import Readers
from sparsity.config.schema import METHODS, SEARCHED, Objectives, Run
from sparsity.config.typed import check, check_names, flatten
from sparsity.errors import ConfigError

# keys that change no number, and so no sweep
NEUTRAL = ("card", "compact", "export", "plots", "step", "store", "threads", "track", "trust")
NUMBERED = "${hydra.job.num}"  # Hydra's own name for the folder of a job
NAMING = ("search", *METHODS, "recipe")  # groups whose choices make a sweep's name


def search_ranges(composed: DictConfig) -> dict[str, str]:
    """The ranges of a search, each as it stands beside the number that it ranges over: `reg.search.decay`.

    Those of numbers that no listed stage reads are left out, as is the sensitivity where a budget finds it.
    """
    ranges = {}
    for group, root in SEARCHED.items():
        own = OmegaConf.to_container(composed[group].search, resolve=True) or {}
        ranges |= {f"{root}{key}": str(text) for key, text in flatten(own).items()}
    readers = Readers(OmegaConf.to_container(composed, resolve=False))
    plain = OmegaConf.to_container(composed.budget, resolve=False)
    swept = swept_keys(composed.hydra.overrides.task)
    has_budget = any(value is not None for value in plain.values()) or any(key.startswith("budget.") for key in swept)
    found = {key: text for key, text in ranges.items() if not is_of_stages(key) or readers.is_read(key)}
    return {key: text for key, text in found.items() if key != "sensitivity" or not has_budget}


def sweep_name(composed: DictConfig) -> str:
    """The name of a sweep: the choices made in its groups, and the hash of its config and of what it ranges over.

    composed: the config of a multirun, with `hydra` in it.
    """
    own = composed.hydra
    typed = [text for text in own.overrides.task if _key(text).partition(".")[0] not in NEUTRAL]
    config = {key: node for key, node in _plain(composed).items() if key not in (*NEUTRAL, "hydra")}
    config.get("data", {}).pop("root", None)  # where the images lie; what they are, the stages look at
    settings = {key: _plain(own.sweeper).get(key) for key in ("params", "sampler")}
    swept = sorted(text for text in typed if swept_keys([text]))
    text = json.dumps([config, swept, settings], sort_keys=True, default=str)
    named = [group for group in NAMING if group != "recipe" or "recipe" in map(_key, typed)]
    chosen = [str(own.runtime.choices.get(group)) for group in named if group not in swept_keys(typed)]
    names = [name for name in chosen if name != "None"]
    return "-".join([*names, hashlib.sha256(text.encode()).hexdigest()[:8]])


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that overrides give several values or a range."""
    return [override.get_key_element().lstrip("+") for override in _parsed(overrides) if override.is_sweep_override()]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides by Hydra's grammar; while Hydra runs, it knows the choices that a glob stands for."""
    running = GlobalHydra.instance()
    loader = running.config_loader() if running.is_initialized() else None
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def count_members(overrides: Sequence[str]) -> int | None:
    """The number of jobs of a grid; None where an override is no list of values. Of equal keys the last one holds."""
    last = {override.get_key_element(): override for override in _parsed(overrides)}
    swept = [override for override in last.values() if override.is_sweep_override()]
    if not all(override.is_discrete_sweep() for override in swept):
        return None
    return math.prod(len(list(override.sweep_string_iterator())) for override in swept)


def is_numbered(composed: DictConfig) -> bool:
    """Whether the folders of a sweep's members are their numbers, and not named by the user."""
    return _plain(composed.hydra.sweep)["subdir"] == NUMBERED


def check_sweep(composed: DictConfig) -> None:
    """Refuses a sweep whose members would all be refused; composed: the config of a multirun, with `hydra` in it."""
    own = composed.hydra
    for part in ("sweeper", "launcher"):
        if own[part] is None:
            raise ConfigError(f"hydra.{part}=null leaves nothing that runs a sweep: choose one by hydra/{part}=basic")
    plain = {key: value for key, value in _plain(composed).items() if key != "hydra"}
    check_names("", {**plain, "name": {}}, Run)
    check_objectives(check("objectives", plain["objectives"], Objectives))
    check("store", plain["store"], str | None)
    for group in SEARCHED:
        check(f"{group}.search", plain[group].get("search", {}), dict[str, str])
    if own.runtime.choices.get("hydra/sweeper") == "basic":
        for override in _parsed(own.overrides.task):
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line} is a range, which a search draws from: add search=pareto, or list values"
                )


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=False)
