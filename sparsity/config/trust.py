"""What a config may call, and the code from outside that the user admits."""

import inspect
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from sparsity.config.signatures import arguments
from sparsity.errors import ConfigError, nearest
from sparsity.nodes import Methods

VARIABLES = "hydra.job.env_set"  # which code can be run by


def may_call(trust: Sequence[str]) -> list[str]:
    """Hydra's patterns for what Hydra itself may call while it starts: our callback, and what the user admits."""
    return ["sparsity.callbacks.Sweep", *patterns(trust)]


def admitted(arguments: Sequence[str]) -> list[str]:
    """The modules whose code the user admits: `trust=` of a command line, and SPARSITY_TRUST.

    To be asked before Hydra composes: a YAML can set variables and overrides, and must not admit code.
    """
    given = [argument.lstrip("+") for argument in arguments]
    named = [name for argument in given if argument.startswith("trust=") for name in _named(argument)]
    named += [VARIABLES for argument in given if argument.startswith(VARIABLES)][:1]
    return named + [entry for entry in os.environ.get("SPARSITY_TRUST", "").split(",") if entry]


def _named(override: str) -> list[str]:
    """The modules of an override; what is no list of them is refused when it is composed and read."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except Exception:  # whatever the grammar raises
        return []
    return [str(entry) for entry in value] if isinstance(value, list) else []


def patterns(trust: Sequence[str]) -> list[str]:
    """Hydra's patterns for modules and functions."""
    bare = [entry.removesuffix(".*") for entry in trust]
    return [pattern for entry in bare if _is_path(entry) for pattern in (entry, f"{entry}.*")]


def check_variables(own: DictConfig, admitted: Sequence[str]) -> None:
    """Refuses variables of the environment that a YAML sets: they choose programs, such as the compiler, that are run.

    own: the config of Hydra; admitted: from `admitted`, which names VARIABLES where the command line sets them.
    """
    if own.job.env_set and VARIABLES not in admitted:
        name = next(iter(own.job.env_set))
        raise ConfigError(f"{VARIABLES}.{name} stands in a YAML: set it on the command line, or {name}=… before it")


def check_trust(trust: Sequence[str], admitted: Sequence[str]) -> None:
    """Refuses what stands in a YAML, and what names no module."""
    for entry in (*trust, *admitted):
        if entry not in admitted:
            raise ConfigError(f"trust=[{entry}] stands in a YAML: give it on the command line or in SPARSITY_TRUST")
        if not _is_path(entry.removesuffix(".*")):
            raise ConfigError(f"trust=[{entry}] is the name of no module, such as my_package or my_package.networks")


def _is_path(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def locate(key: str, target: str, methods: Methods, admitted: Sequence[str]) -> Callable[..., Any]:
    """The function or class that a key names: a public one that its module defines, or code that the user admits.

    admitted: Hydra's patterns.
    """
    if any(target == each or (each.endswith(".*") and target.startswith(each[:-1])) for each in admitted):
        return _from_outside(key, target, admitted)
    module, package = methods.module, target.partition(".")[0]
    if not _is_path(target):
        raise ConfigError(f"{key}._target_={target!r} is the name of no function, such as {module}.NAME")
    if package not in ("sparsity", module.partition(".")[0]):
        raise ConfigError(
            f"{key}._target_={target} is code from outside: admit it by trust=[{package}] on the command line or "
            f"SPARSITY_TRUST={package}"
        )
    home = import_module(module)
    found = _own(home, target)
    if found is None:
        each = {name: _own(home, f"{module}.{name}") for name in dir(home)}
        names = [
            name
            for name, method in each.items()
            if method and (taken := arguments(method, methods)) and taken.is_method
        ]
        close = nearest(target.rpartition(".")[2], names)
        meant = f"did you mean {module}.{close}?" if close else f"it has {', '.join(names)}"
        raise ConfigError(f"{key}._target_={target} is no function of {module}: {meant}")
    return found


def _own(home: ModuleType, target: str) -> Any:
    """What a target names in a module or below it, if it is public and defined there."""
    path, _, name = target.rpartition(".")
    if not f"{path}.".startswith(f"{home.__name__}.") or name.startswith("_"):
        return None
    found = getattr(home, name, None)
    is_method = inspect.isfunction(found) or inspect.isclass(found)
    if not is_method or not f"{found.__module__}.".startswith(f"{home.__name__}."):
        return None
    return found if path in (home.__name__, found.__module__) else None


def _from_outside(key: str, target: str, admitted: Sequence[str]) -> Callable[..., Any]:
    try:
        return instantiate({"_target_": target, "_partial_": True}, _execution_whitelist_=admitted).func
    except InstantiationException as error:
        raise ConfigError(f"{key}._target_={target} cannot be used: {str(error).splitlines()[0]}") from error
