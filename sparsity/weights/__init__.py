"""Weights files: read without executing code, fitted to a module, written whole or not at all."""

from sparsity.weights.files import METADATA_KEY, NETWORK, described, load, write_state
from sparsity.weights.fitting import Filled, fill
from sparsity.weights.reading import States, read_states

__all__ = ["METADATA_KEY", "NETWORK", "Filled", "States", "described", "fill", "load", "read_states", "write_state"]
