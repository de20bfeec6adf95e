"""The stage that rewinds: the weights of an earlier state, pruned as they are now."""

from dataclasses import replace

import torch

from sparsity.nodes import State
from sparsity.population import Population
from sparsity.stages.context import Context, Outcome


def rewind(population: Population, context: Context, *, to: State) -> Outcome:
    """The parameters and buffers of an earlier state, zero where the masks of now are 0; Frankle et al., 2020.

    to: `start`, an earlier stage, or one of its epochs, such as pretrain@2.
    """
    state = context.states[to]
    parameters = {
        name: torch.where(population.masks[name], parameter, 0) if name in population.masks else parameter.clone()
        for name, parameter in state.parameters.items()
    }
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    return Outcome(replace(population, parameters=parameters, buffers=buffers))
