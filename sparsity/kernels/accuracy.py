"""Accuracy by a network's library: forward passes alone, of what masks have left."""

import ctypes

import torch

from sparsity.data import Images, Splits
from sparsity.kernels.calls import Source, parameters_of, side_by_side
from sparsity.kernels.chain import Chain
from sparsity.kernels.library import Library
from sparsity.population import Population


def accuracies(population: Population, images: Images, splits: Splits, chain: Chain, library: Library) -> list[float]:
    """The accuracy of every member on a set, in [0, 1], in float32."""
    source = Source(images, splits)
    tensors = {"value": population.parameters, "mask": population.masks}
    whole = {kind: {name: each.contiguous() for name, each in found.items()} for kind, found in tensors.items()}
    given = {"order": torch.arange(len(images)), "sizes": torch.tensor([len(images)])}

    def correct(member: int, threads: int) -> int:
        own = parameters_of(chain.parameters, member, **whole)
        network = library.functions.make()
        try:
            return library.functions.correct(network, ctypes.byref(source.arguments(own, threads, **given)))
        finally:
            library.functions.drop(network)

    return [count / len(images) for count in side_by_side(correct, population.num_members)]
