"""Hydra-configured sweeps for neural-network sparsity: pretrain → regularize → prune → finetune."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "run": "sparsity.experiment",
    "load": "sparsity.artifact",
    "SparsityError": "sparsity.errors",
    "ConfigError": "sparsity.errors",
    "DataError": "sparsity.errors",
    "WeightsError": "sparsity.errors",
    "DivergedError": "sparsity.errors",
}
__all__ = [*_PUBLIC, "csr"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: torch takes seconds, and `--help` needs none of it."""
    if name == "csr":
        return import_module("sparsity.csr")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparsity' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
