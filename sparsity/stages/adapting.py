"""Finds the decay of a regularizer while it acts: such that what a rule then leaves is what a budget allows."""

from collections.abc import Sequence

import torch

from sparsity import nodes
from sparsity.budgets import Left
from sparsity.limits import Budget
from sparsity.population import Population
from sparsity.stages.context import Context
from sparsity.stages.pruning import scored
from sparsity.stages.rules import masks_of, rule_of
from sparsity.stages.sizing import size_of
from sparsity.step import Loss
from sparsity.tensors import denormals_kept
from sparsity.training import Adaptation


def adaptation_of(
    adapts: Sequence[nodes.Adapt],
    budgets: Sequence[Budget | None] | None,
    population: Population,
    context: Context,
    loss: Loss,
) -> Adaptation:
    """The adaptation of the members' decays, one node and one budget a member."""
    limits, first, graph = [each for each in budgets or [] if each is not None], adapts[0], context.graph
    assert len(limits) == len(adapts), "a budget for each member"
    rule = rule_of([each.rule for each in adapts], [each.sensitivity for each in adapts], population)
    sizes = size_of(population, context, limits)
    importances, generators = [each.rule.importance for each in adapts], context.generators()

    def excess(population: Population) -> list[float]:
        scores = scored(population, rule, importances, context, loss, generators)
        with denormals_kept(), torch.no_grad():
            left = Left(population, graph, sizes)
            counts = left.counts(masks_of(population, rule, graph.units, scores), limits)
        found = []
        for limit, count in zip(left.limits(limits), counts):
            pairs = [(getattr(count, name), most) for name, most in limit._asdict().items()]
            found.append(max(have / max(most, 1) for have, most in pairs if most is not None))
        return found

    return Adaptation(excess, first.every)
