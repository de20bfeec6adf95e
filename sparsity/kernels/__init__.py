"""Training steps as machine code: C++ written from a network's recorded functions, compiled once and kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsity.data import Splits
from sparsity.kernels.chain import Chain, UnsupportedError, check_supported
from sparsity.kernels.library import Library, library_of
from sparsity.kernels.step import KernelStep
from sparsity.losses import cross_entropy
from sparsity.population import Population

__all__ = ["Chain", "KernelStep", "Kernels", "Library", "UnsupportedError", "kernels_of"]


@dataclass(frozen=True)
class Kernels:
    """A network's layers, and their compiled library."""

    chain: Chain
    library: Library


def kernels_of(
    population: Population,
    splits: Splits,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[..., Any] = cross_entropy,
    **how: bool,
) -> Kernels | None:
    """The kernels of a population's network; None where they cannot be compiled, which is told once.

    Raises UnsupportedError where the network, or how it is trained, is none that there are kernels for.
    """
    chain = check_supported(population, splits, optimizer, loss=loss, **how)
    library = library_of(chain)
    return None if library is None else Kernels(chain, library)
