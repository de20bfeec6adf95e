"""Exchanges the entries that masks keep while training: the smallest go, and as many come back elsewhere."""

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.errors import ConfigError
from sparsity.nodes import Reading
from sparsity.population import Population
from sparsity.stages.context import Context
from sparsity.stages.scoring import computed
from sparsity.step import Loss
from sparsity.tensors import Tensors, from_view
from sparsity.training import Loop, Regrowth

ASKED = {"gradient": "gradient", "random": "noise"}  # by what entries come back: what is computed of each


def regrowth_of(node: nodes.Regrow, population: Population, context: Context, loop: Loop, loss: Loss) -> Regrowth:
    """Regrowth of the weights that are masked as training begins; refuses a population without any.

    Gradients are of one batch of train, drawn by the member's generator.
    """
    layouts, generators = population.layouts, context.generators()
    names = [name for name in population.masks if layouts[name].kind == "weight"]
    if not names or not loop.epochs:
        what = "no weight is masked before it" if not names else "its schedule has 0 epochs"
        raise ConfigError(f"{context.key('regrow')} of {context.stage} does nothing: {what}")
    reading = Reading(batches=1, batch_size=loop.batch_size, mode="train")

    def masks(population: Population, share: float) -> Tensors:
        asked = ASKED[node.by]
        views = computed(population, names, {asked}, reading, context, loss, generators)[asked]
        return {
            name: exchanged(population.masks[name], population.parameters[name], growth, share)
            for name, growth in _in_shape(population, views).items()
        }

    return Regrowth(masks, names, node.share, node.until, node.every)


def exchanged(mask: Tensor, weight: Tensor, growth: Tensor, share: float) -> Tensor:
    """The mask [members, *shape] that keeps as many entries of each member, a share of them others than before.

    The smallest |weight| go; where |growth| is largest among what is then masked, what just went included, entries come
    back.
    """
    kept, sizes, growth = (tensor.flatten(1) for tensor in (mask, weight.abs(), growth.abs()))
    count = kept.sum(1, keepdim=True)
    exchange = (count * share).long()
    stays = kept & (_ranks(torch.where(kept, sizes, -1.0)) < count - exchange)
    comes = _ranks(torch.where(stays, -1.0, growth)) < exchange
    return (stays | comes).view_as(mask)


def _ranks(scores: Tensor) -> Tensor:
    """The place of each entry [members, n] from the largest on; of equal ones the first comes first."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _in_shape(population: Population, views: Tensors) -> Tensors:
    """What was computed, [members, *view], in the shapes of the parameters."""
    return {
        name: torch.stack(
            [from_view(member, population.layouts[name], population.parameters[name].shape[1:]) for member in view]
        )
        for name, view in views.items()
    }
