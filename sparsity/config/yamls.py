"""What a recipe's or an experiment's YAML gets wrong that its composed config no longer shows."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ConfigDefault
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsity.config.recipe import READ
from sparsity.errors import ConfigError

CHECKED = ("recipe", "experiment")  # groups whose YAMLs set keys of others

Yaml = dict[str, Any]


def check_yamls(loader: ConfigLoader, composed: DictConfig) -> None:
    """Refuses a YAML that gives both a sensitivity and a budget, and one that merges into what a stage reads.

    A merge into `schedule: ${schedule.finetune}` copies that schedule, and whatever is typed for it later does
    nothing. A whole schedule in its place is fine. composed: with `hydra` in it.
    """
    choices = composed.hydra.runtime.choices
    bare = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    plain = OmegaConf.to_container(bare, resolve=False)
    places = _repository(loader, composed)
    recipes = dict(_with_parents(places, "recipe", choices.get("recipe")))
    for group in CHECKED:
        for name, own in _with_parents(places, group, choices.get(group)):
            _check_strength(f"{group}={name}", own)
            others = [each for other, each in recipes.items() if (group, other) != ("recipe", name)]
            for stage, node in _stages(own).items():
                for argument, value in node.items():
                    read = [_stages(each)[stage].get(argument) for each in others if stage in _stages(each)]
                    found = next((match[1] for text in read if (match := READ.fullmatch(str(text)))), None)
                    if isinstance(value, dict) and found:
                        _check_merge(f"{group}={name}", f"recipe.{stage}.{argument}", value, found, plain)


def _repository(loader: ConfigLoader, composed: DictConfig) -> ConfigRepository:
    """Where YAMLs are looked for: where the loader does, and where the config says."""
    places = copy.deepcopy(loader.get_search_path())
    for path in composed.hydra.searchpath or ():
        places.append("hydra.searchpath", path)
    return ConfigRepository(places)


def _with_parents(places: ConfigRepository, group: str, name: str | None) -> Iterator[tuple[str, Yaml]]:
    """A choice of a group and those of the same group that its defaults name, by name."""
    own, parents = (None, []) if name is None else _loaded(places, f"{group}/{name}")
    if own is None:
        return
    yield name, own
    for parent in parents:
        yield from _with_parents(places, group, parent)


def _loaded(places: ConfigRepository, path: str) -> tuple[Yaml | None, list[str]]:
    """A YAML as it is written, and those of its group that it builds on; None where it cannot be read."""
    try:
        found = places.load_config(path)
        plain = None if found is None else OmegaConf.to_container(found.config, resolve=False)
    except (OmegaConfBaseException, HydraException, OSError, ValueError):
        return None, []
    if not isinstance(plain, dict):
        return None, []
    parents = [each.path for each in found.defaults_list or [] if isinstance(each, ConfigDefault)]
    return plain, [path for path in parents if path != "_self_"]


def _stages(own: Yaml) -> dict[str, Yaml]:
    """The nodes of a YAML's stages; what is no node is refused once all is composed."""
    recipe = own.get("recipe")
    return {name: node for name, node in recipe.items() if isinstance(node, dict)} if isinstance(recipe, dict) else {}


def _check_strength(where: str, own: Yaml) -> None:
    budget = own.get("budget")
    given = [name for name, value in budget.items() if value is not None] if isinstance(budget, dict) else []
    if given and own.get("sensitivity") is not None:
        raise ConfigError(
            f"{where} gives both sensitivity={own['sensitivity']} and budget.{given[0]}, which finds it: leave one of "
            "the two in its YAML"
        )


def _check_merge(where: str, key: str, value: Mapping[str, Any], read: str, composed: Mapping[str, Any]) -> None:
    node: Any = composed
    for part in read.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    missing = [name for name in node or {} if name not in value]
    if missing:
        first = next(iter(value), "")
        raise ConfigError(
            f"{where} sets {key}.{first} beside what the stage reads from {read}, so that nothing typed for {read} "
            f"would count: set {read}.{first} there, or give all of {', '.join(node)}"
        )
