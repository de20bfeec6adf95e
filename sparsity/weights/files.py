"""Weights files as runs write them, whole or not at all, and the networks that are made of them again."""

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
from sparsity.errors import WeightsError
from sparsity.tensors import Tensors
from sparsity.weights.fitting import fill
from sparsity.weights.foreign import begins_as_safetensors
from sparsity.weights.reading import read_states

log = logging.getLogger("sparsity")

METADATA_KEY = "sparsity"  # in a safetensors file's metadata: JSON of what rebuilds the module


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
    described = None
    if begins_as_safetensors(Path(path)):
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    if described is None:
        raise WeightsError(f"path={path} does not say which network it is of: give load(path, module=…)")
    package, _, name = described["factory"].pop("_target_").rpartition(".")
    if package != models.__name__ or not callable(getattr(models, name, None)):
        raise WeightsError(f"path={path} is of {package}.{name}, not of this package: give load(path, module=…)")
    factory = getattr(models, name)
    return factory(
        **described["factory"],
        input_shape=tuple(described["input_shape"]),
        num_classes=described["num_classes"],
    )
