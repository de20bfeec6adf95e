"""Training steps as machine code: C++ written from a network's recorded functions, compiled once and kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsity.data import Splits
from sparsity.kernels.accuracy import accuracies
from sparsity.kernels.calls import is_readable
from sparsity.kernels.chain import Chain, UnsupportedError, chain_of, check_supported
from sparsity.kernels.library import Library, library_of
from sparsity.kernels.step import KernelStep
from sparsity.losses import cross_entropy
from sparsity.population import Population

__all__ = ["Chain", "KernelStep", "Kernels", "Library", "UnsupportedError", "accuracies", "kernels_of"]


@dataclass(frozen=True)
class Kernels:
    """A network's layers, and their compiled library."""

    chain: Chain
    library: Library
    measures: bool  # whether the network computes the same where it is measured as in training

    def accuracies(self, population: Population, images: Any, splits: Splits) -> list[float] | None:
        """The accuracy of every member on a set, in [0, 1]; None where there are no kernels for it."""
        if not self.measures or not is_readable(images):
            return None
        return accuracies(population, images, splits, self.chain, self.library)


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
    if library is None:
        return None
    try:
        measures = chain_of(population.module, splits.example()[:1], training=False) == chain
    except UnsupportedError:
        measures = False
    return Kernels(chain, library, measures)
