"""What a file holds: every dict of named tensors in it, read without executing code."""

import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sparsity.errors import WeightsError, reason
from sparsity.tensors import Tensors
from sparsity.weights import inert
from sparsity.weights.foreign import SAVE, begins_as_safetensors, is_foreign, no_file

log = logging.getLogger("sparsity")

DEEPEST = 5  # dicts in dicts that are looked into
MANY = 100  # dicts that are looked through for what to name


@dataclass(frozen=True)
class States:
    """Named tensors of a file."""

    keys: tuple[str, ...]  # under which they lie in it
    tensors: Tensors
    others: dict[str, str] = field(default_factory=dict)  # what lies beside them under a name, and what it is


def read_states(path: str | Path, key: str = "model.weights") -> list[States]:
    """Every dict of named tensors in a safetensors file or a file of torch.save's, outer ones first.

    A training checkpoint may hold several (`model`, `ema`, `optimizer`); other objects beside them are passed over, and
    no code of theirs is looked up. Raises a WeightsError that says what the file is where it holds none.
    """
    path = Path(path)
    trouble = no_file(path)
    if trouble is not None:
        raise WeightsError(f"{key}={path} {trouble}")
    try:
        content = _content(path, key)
    except OSError as error:
        raise WeightsError(f"{key}={path} cannot be read: {error.strerror or reason(error)}") from error
    found = list(_states(content, (), set()))
    if not found:
        raise WeightsError(f"{key}={path} {_nothing(content)}")
    return found


def _content(path: Path, key: str) -> Any:
    if begins_as_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            line = f"{key}={path} is damaged or cut short ({reason(error)}): take another copy"
            raise WeightsError(line) from error
    trouble = is_foreign(path)
    if trouble is not None:
        raise WeightsError(f"{key}={path} {trouble}")
    return _read_torch(path, key)


def _read_torch(path: Path, key: str) -> Any:
    """The content of a file of torch.save's: as torch reads it safely, or with stand-ins where it refuses to."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old formats
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            file.seek(0)
        except Exception as error:  # the unpickler raises whatever a damaged file makes it trip over
            raise _damaged(path, key, error) from error
        try:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert)
        except inert.ExecutesCode as error:
            raise WeightsError(
                f"{key}={path} would execute code when loaded ({error}): nothing of it was run; have it made again, "
                "by torch.save(model.state_dict(), …)"
            ) from error
        except Exception as error:
            raise _damaged(path, key, error) from error


def _damaged(path: Path, key: str, error: Exception) -> WeightsError:
    return WeightsError(f"{key}={path} is damaged or cut short ({reason(error)}): take another copy")


def _states(content: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[States]:
    if not isinstance(content, Mapping) or id(content) in seen or len(keys) > DEEPEST:
        return
    seen.add(id(content))
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield States(keys, tensors, {name: _what(value) for name, value in named.items() if name not in tensors})
    for name, value in named.items():
        yield from _states(value, (*keys, name), seen)


def _what(value: Any) -> str:
    if isinstance(value, inert.Inert):
        return f"a whole {value.name}" if value.is_module else f"an object of {value.name}"
    return f"a {type(value).__name__}"


def _objects(content: Any, seen: set[int]) -> Iterator[tuple[str, inert.Inert]]:
    """The objects in a dict, and in those dicts of it that are no objects, under their names."""
    if isinstance(content, Mapping) and id(content) not in seen and len(seen) < MANY:
        seen.add(id(content))
        for name, value in content.items():
            if isinstance(value, inert.Inert):
                yield str(name), value
            else:
                yield from _objects(value, seen)


def _nothing(content: Any) -> str:
    """What a file without named tensors holds, and the remedy."""
    if isinstance(content, inert.Inert):
        return f"holds {_what(content)}, which only its own code could read: {SAVE}"
    if isinstance(content, Mapping):
        objects = sorted(_objects(content, set()), key=lambda entry: not entry[1].is_module)
        if objects:
            name, value = objects[0]
            return f"holds no state_dict, and {name} is {_what(value)}: {SAVE}"
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return f"holds no state_dict: its tensors have no names but {next(iter(content))!r}, …; {SAVE}"
        shown = ", ".join(str(name)[:40] for name in list(content)[:8])
        return f"holds no state_dict{f', only {shown}' if shown else ''}: {SAVE}"
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return f"holds no state_dict but a {type(content).__name__} of {len(content)}: {SAVE}"
    return f"holds no state_dict but a {type(content).__name__}: {SAVE}"
