"""Code from outside the package: found where a person puts it, in the folder that the command is typed in."""

import functools
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsity.errors import ConfigError, reason

log = logging.getLogger("sparsity")


def bring_in(node: Any, trust: Sequence[str], folder: str | Path | None = None) -> None:
    """Imports the modules of every `_target_` that the user admits, or says where they were looked for, and what fails.

    node: a plain config; trust: modules from `admitted`; folder: the one that the command was typed in, or None for the
    current one. It comes last on the path, and only where an admitted module lies in it that is found nowhere else.
    """
    folder = Path(folder or os.getcwd())
    admitted = [entry.removesuffix(".*") for entry in trust]
    for key, target in _targets(node):
        if any(target == entry or target.startswith(f"{entry}.") for entry in admitted):
            try:
                _find(target, folder)
            except ConfigError as error:
                raise ConfigError(f"{key}={target} cannot be used: {error}") from error


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in children:
        inner = f"{key}.{name}" if key else str(name)
        if name == "_target_" and isinstance(value, str):
            yield inner, value
        yield from _targets(value, inner)


def _find(target: str, folder: Path) -> None:
    """Imports the module of a target, or raises what keeps it from being used."""
    package, _, rest = target.partition(".")
    here = _spec_in(package, folder)
    _put_on_path(package, here, folder)
    path, _, name = target.rpartition(".") if rest else (package, "", "")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ConfigError(_nowhere(package, folder)) from error
        above, _, missing = (error.name or "").rpartition(".")
        if f"{path}.".startswith(f"{error.name}.") and above in sys.modules:
            if hasattr(sys.modules[above], missing):
                return  # a class in a class
            raise ConfigError(_lacks(sys.modules[above], missing)) from error
        raise ConfigError(f"{path} cannot be imported: {reason(error)}") from error
    except (Exception, SystemExit) as error:  # whatever a custom module may raise
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {reason(error)}") from error
    hidden = _hidden(sys.modules[package], here)
    if name and not hasattr(module, name):
        raise ConfigError(f"{_lacks(module, name)}{hidden and f'; {hidden}'}")
    if hidden:
        _warn_once(hidden)


def _spec_in(package: str, folder: Path) -> ModuleSpec | None:
    """A module as it lies in a folder, whatever comes before it on the path."""
    importlib.invalidate_caches()  # it may just have been written
    try:
        return PathFinder.find_spec(package, [str(folder)])
    except (ImportError, ValueError):
        return None


def _put_on_path(package: str, here: ModuleSpec | None, folder: Path) -> None:
    """The folder, as the last one on the path, if a module lies in it that is not found without."""
    if here is None or package in sys.modules or str(folder) in sys.path:
        return
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:  # no more than a folder of the name
        sys.path.append(str(folder))


def _nowhere(package: str, folder: Path) -> str:
    try:
        names = sorted({path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()})
    except OSError:
        names = []
    close = get_close_matches(package, names, n=1)
    return (
        f"no module {package} lies in {folder}, where the command was typed, and none is installed: put {package}.py "
        f"or a folder {package}/ there" + (f"; {close[0]} lies there" if close else "")
    )


def _lacks(module: ModuleType, name: str) -> str:
    """That a module has no such name, where it lies, and the nearest name or those that it defines."""
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    public = [each for each in vars(module) if not each.startswith("_")]
    own = [each for each in public if getattr(vars(module)[each], "__module__", None) == module.__name__]
    own += [each.name for each in pkgutil.iter_modules(getattr(module, "__path__", []))]
    close = get_close_matches(name, own, n=1) or get_close_matches(name, public, n=1)
    meant = f"did you mean {close[0]}?" if close else f"it has {', '.join(own[:8]) or 'nothing'}"
    return f"{module.__name__} ({place}) has no {name}: {meant}"


def _hidden(package: ModuleType, here: ModuleSpec | None) -> str:
    """A line where another module of the same name was found than the one in the folder."""
    found = getattr(package, "__file__", None)
    if here is None or here.origin is None or found is None or os.path.realpath(found) == os.path.realpath(here.origin):
        return ""
    return f"{package.__name__} is {found}, which hides {here.origin}: rename that to use it"


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(f"warning: {line}")
