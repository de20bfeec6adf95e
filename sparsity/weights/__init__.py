"""Weights files: read without executing code, fitted to a module, written whole or not at all."""

from sparsity.weights.files import METADATA_KEY, load, write_state
from sparsity.weights.fitting import Filled, fill
from sparsity.weights.reading import States, read_states

__all__ = ["METADATA_KEY", "Filled", "States", "fill", "load", "read_states", "write_state"]
