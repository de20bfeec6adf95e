"""Weights files as runs write them, whole or not at all, and the networks that are made of them again."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from sparsity import files, models
from sparsity.errors import WeightsError, reason
from sparsity.tensors import Tensors
from sparsity.weights.fitting import fill
from sparsity.weights.foreign import begins_as_safetensors
from sparsity.weights.reading import read_states

log = logging.getLogger("sparsity")

METADATA_KEY = "sparsity"  # in a safetensors file's metadata: JSON of what rebuilds the module
NETWORK = "model.safetensors"  # in the folder of a run: what it came to


def write_state(path: Path, state: Tensors, description: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a safetensors file of a state, with a description in its metadata; returns its size and its hash."""
    metadata = {METADATA_KEY: json.dumps(description)}  # one entry: several would be written in any order
    content = safetensors.torch.save(state, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def load(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """The network of a file that a run wrote (`model.safetensors`, `stages/*.safetensors`), in evaluation mode.

    For the factories of the group `model` the file knows how to rebuild it; for a class of your own, give `module`,
    into which any file is read that `model.weights` takes. Its input is images in [0, 1], normalised as the file's
    metadata says where the run normalised.
    """
    states = read_states(path, key="path")
    if module is None:
        module = _rebuild(path)
    filled = fill(module, states, path, key="path")
    for line in filled.warnings:
        log.warning(f"warning: {line}")
    return filled.module.eval()


def _rebuild(path: str | Path) -> nn.Module:
    """The network that the file's metadata describe, if it is one of this package's."""
    about = described(path)
    if about is None:
        raise WeightsError(f"path={path} does not say which network it is of: give load(path, module=…)")
    numbers = dict(about["factory"])
    package, _, name = numbers.pop("_target_").rpartition(".")
    data = {"input_shape": tuple(about["input_shape"]), "num_classes": about["num_classes"]}
    factory = vars(models).get(name)
    if package != models.__name__ or getattr(factory, "__module__", None) != package:
        raise WeightsError(f"path={path} is of {package}.{name}, not of this package: give load(path, module=…)")
    try:
        return factory(**numbers, **data)
    except Exception as error:  # whatever numbers of a changed file may lead to
        raise WeightsError(f"path={path} describes a network that cannot be built: {reason(error)}") from error


def described(path: str | Path, key: str = "path") -> dict[str, Any] | None:
    """What a weights file says of its network, if a run wrote it: factory, input_shape, num_classes, classes, …

    None of any other file; refuses a file that says what no run writes.
    """
    metadata: dict[str, str] = {}
    if begins_as_safetensors(Path(path)):
        with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        return None
    try:
        about = json.loads(metadata[METADATA_KEY])
        is_known = isinstance(about["factory"]["_target_"], str) and isinstance(about["num_classes"], int)
        if is_known and all(isinstance(size, int) for size in about["input_shape"]):
            return about
    except (ValueError, TypeError, KeyError):
        pass
    other = "load(path, module=…)" if key == "path" else "another"
    raise WeightsError(f"{key}={path} describes its network by what no run writes: give {other}")
