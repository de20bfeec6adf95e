"""What training holds at zero: the entries that were pruned, every zero of weights and biases, or nothing."""

from dataclasses import replace
from typing import Literal

import torch

from sparsity.graph import Facts, Units
from sparsity.population import Population
from sparsity.tensors import nonzero

Hold = Literal["masks", "zeros", "none"]


def holding(population: Population, hold: Hold, units: Units | None) -> Population:
    """The population with the masks that hold what it is to hold.

    masks: the entries that earlier stages pruned; zeros: every zero of weights and biases too; none: no entry.
    """
    if hold == "none":
        return replace(population, masks={})
    return holding_zeros(population, units) if hold == "zeros" else population


def holding_zeros(population: Population, units: Units | None = None) -> Population:
    """The population with masks that hold every zero of weights and biases, and what the rule masked of others.

    Scale and shift of a normalisation are held where both are 0 and what they get is, such as behind a filter that an
    earlier run removed.
    """
    masks = dict(population.masks)
    for name, parameter in population.parameters.items():
        if population.layouts[name].kind in ("weight", "bias") and not (mask := nonzero(parameter)).all():
            masks[name] = mask
    norms = [name for name, layout in population.layouts.items() if layout.kind == "normalization"]
    if units is not None and any(not nonzero(population.parameters[name]).all() for name in norms):
        for member in range(population.num_members):
            tensors = {**population.parameters, **population.buffers}
            facts = Facts({name: tensor[member].detach() for name, tensor in tensors.items()})
            for name, silent in units.silent_norms(facts).items():
                if name in norms:
                    mask = masks[name].clone() if name in masks else torch.ones_like(population.parameters[name]).bool()
                    mask[member] &= ~silent.to(mask.device)
                    masks[name] = mask
    return replace(population, masks=masks)
