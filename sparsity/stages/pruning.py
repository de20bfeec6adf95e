"""The stage that prunes: a rule's mask at its sensitivity, or at the one that a budget asks for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsity import nodes
from sparsity.budgets import Met, Reached, counts, meet
from sparsity.errors import SparsityError, StageError
from sparsity.kinds import Range
from sparsity.limits import Budget, Counts, Limits, part
from sparsity.nodes import Each, sensitivity_range
from sparsity.population import Population
from sparsity.stages.context import MASKED, Context, Outcome
from sparsity.stages.regularizing import penalty_of
from sparsity.stages.rules import AppliedRule, Scores, masks_of, rule_of, scores_of, stds_of, thresholds_of
from sparsity.stages.scoring import computed
from sparsity.stages.sizing import size_of
from sparsity.step import CROSS_ENTROPY, Loss
from sparsity.tensors import Tensors, denormals_kept, nonzero


def prune(
    population: Population,
    context: Context,
    *,
    rule: Each[nodes.Rule],
    sensitivity: Each[float | None] | None = None,
    budget: Each[Budget | None] | None = None,
) -> Outcome:
    """The rule's masks, and zeros where they are 0; what earlier stages pruned stays pruned.

    sensitivity: the rule's number; null where a budget asks for as much as it takes.
    """
    pruner = Pruner(rule, sensitivity, budget, population, context)
    masks = pruner.masks(population, 1.0)
    after = _masked(population, masks)
    return Outcome(after, (MASKED,), pruner.notes(), errors=pruner.errors())


def _masked(population: Population, masks: Tensors) -> Population:
    """The population with the masks, and zeros where they are 0."""
    parameters = {
        name: torch.where(masks[name], parameter, 0) if name in masks else parameter
        for name, parameter in population.parameters.items()
    }
    return replace(population, parameters=parameters, masks=masks)


def scored(
    population: Population,
    rule: AppliedRule,
    importances: Sequence[nodes.Importance],
    context: Context,
    loss: Loss,
    generators: Sequence[torch.Generator],
) -> Scores:
    """What the parameters score that a rule is applied to, with all that its importance asks for; one node a member."""
    asked, names, first = rule.asks_for, rule.names, importances[0]
    added = [each.penalty for each in importances if each.penalty is not None]
    penalty = penalty_of(added, population, context.graph.units) if added else None
    found = computed(population, names, asked, first, context, loss, generators, penalty) if asked else {}
    with denormals_kept(), torch.no_grad():
        return scores_of(population, rule, context.graph.units, found)


class Pruner:
    """Remembers what a rule came to: the numbers that budgets asked for, and what the rule saw."""

    def __init__(
        self,
        rules: Sequence[nodes.Rule],
        sensitivities: Sequence[float | None] | None,
        budgets: Sequence[Budget | None] | None,
        population: Population,
        context: Context,
        loss: Loss = CROSS_ENTROPY,
        *,
        comes_back: bool = False,
    ):
        """comes_back: whether what masks left out once may be in later ones."""
        self.comes_back = comes_back
        self.context, self.layouts, self.loss = context, population.layouts, loss
        self.importances, self.generators = [rule.importance for rule in rules], context.generators()
        self.given = list(sensitivities or [None] * len(rules))
        self.rule = rule_of(rules, [number or 0.0 for number in self.given], population)
        self.interval = sensitivity_range(rules[0])
        self.budgets = [budget for budget in budgets or [] if budget is not None]
        self.size_of = size_of(population, context, self.budgets)
        self.masked = tuple(population.masks)
        self.start: list[Counts] = []  # what there was at first
        self.met: Met | None = None
        self.last: Tensors = {}
        self.seen: dict[str, dict[str, list[float]]] = {}
        self.densities: list[Tensors] = []  # of each weight, [members], after every change

    @property
    def names(self) -> list[str]:
        """The parameters that may be masked: all, where units take what belongs to them along."""
        return list(self.layouts) if self.rule.structural else list(dict.fromkeys([*self.rule.names, *self.masked]))

    def masks(self, population: Population, share: float) -> Tensors:
        """The masks at a share of the way to the rule's number, or from what there was at first to the budget.

        What they left out once stays out, unless it may come back.
        """
        population, rounds = population.map(Tensor.detach), self.importances[0].rounds
        for number in range(1, rounds + 1):
            scores = scored(population, self.rule, self.importances, self.context, self.loss, self.generators)
            with denormals_kept(), torch.no_grad():
                masks = self._masks(population, scores, share, number / rounds)
            population = _masked(population, masks)
        is_kept = {} if self.comes_back else self.last
        self.last |= {name: mask & is_kept[name] if name in is_kept else mask for name, mask in masks.items()}
        weights = [name for name, layout in self.layouts.items() if layout.kind == "weight" and name in self.last]
        self.densities.append({name: self.last[name].flatten(1).double().mean(1) for name in weights})
        return dict(self.last)

    def _masks(self, population: Population, scores: Scores, share: float, of_rounds: float) -> Tensors:
        """The masks by some scores; of_rounds: the share of the importance's rounds that this one completes."""
        units = self.context.graph.units
        numbers = torch.tensor([number or 0.0 for number in self.given], device=population.device) * share
        rule = self.rule.at(numbers if of_rounds == 1 else _part_of(numbers, of_rounds, self.interval))
        if self.budgets:
            self.met = self._meet(population, scores, share, of_rounds)
            rule = self.rule.at(self.met.numbers)
        self.seen = {"stds": stds_of(population), "thresholds": thresholds_of(population, rule, scores)}
        return self._held(population) if self.met else masks_of(population, rule, units, scores)

    def _meet(self, population: Population, scores: Scores, share: float, of_rounds: float) -> Met:
        graph = self.context.graph
        budgets, enough = self.budgets, None
        if share < 1 or of_rounds < 1:
            if not self.start:
                self.start = counts(population, graph, budgets, self.size_of)
            pairs = list(zip(budgets, self.start))
            budgets = [part(budget, share, start, way="linear") for budget, start in pairs]
            budgets = [part(budget, of_rounds, start, way="geometric") for budget, start in zip(budgets, self.start)]
            enough = [
                Limits(*map(_nearly, now.limits(start), budget.limits(start)))
                for now, (budget, start) in zip(budgets, pairs)
            ]
        return meet(
            population,
            lambda numbers: masks_of(population, self.rule.at(numbers), graph.units, scores),
            self.interval,
            budgets,
            graph,
            enough=enough,
            size_of=self.size_of,
        )

    def _held(self, population: Population) -> Tensors:
        """The masks of budgets; of a budget that zeros meet by themselves these go, or training would fill them."""
        by_zeros = torch.tensor([_holds_by_zeros(reached) for reached in self.met.reached], device=population.device)

        def held(name: str, mask: Tensor) -> Tensor:
            is_weight = population.layouts[name].kind == "weight"
            which = by_zeros.view(-1, *[1] * (mask.ndim - 1)) & is_weight
            return mask & (nonzero(population.parameters[name]) | ~which)

        return {name: held(name, mask) for name, mask in self.met.masks.items()} if by_zeros.any() else self.met.masks

    def notes(self, final_from: int = 0) -> list[dict[str, Any]]:
        """What there is to say of each member; final_from: the first epoch with the final masks."""
        return [
            {
                "final_from": final_from,
                **{kind: {name: each[member] for name, each in seen.items()} for kind, seen in self.seen.items()},
                **self._of_budget(member),
            }
            for member in range(len(self.given))
        ]

    def courses(self, steps: Sequence[int]) -> list[dict[str, Any]]:
        """The densities of each member on the way, where there are many changes of some; steps: of the changes."""
        found = list(zip(steps, self.densities))
        found = found[:: -max(1, -(-len(found) // MOST_CHANGES))][::-1]  # the last one among them
        names = found[-1][1] if found else ()
        each = {name: torch.stack([densities[name] for _, densities in found], 1).tolist() for name in names}
        places = [step for step, _ in found]
        return [
            {"steps": places, "densities": {name: own[member] for name, own in each.items()}}
            for member in range(len(self.given))
        ]

    def _of_budget(self, member: int) -> dict[str, Any]:
        """The sensitivity that a budget asked for, and what it came to."""
        if self.met is None:
            return {}
        reached = self.met.reached[member]
        words = reached.words()
        return {"sensitivity": reached.number, "budget": reached.record(), "said": [words] if words else []}

    def errors(self) -> list[SparsityError | None] | None:
        """The members whose budget cannot be met, and what could be reached."""
        if self.met is None:
            return None
        return [None if reached.is_met else StageError(reached.words()) for reached in self.met.reached]


def _part_of(numbers: Tensor, share: float, interval: Range) -> Tensor:
    """A rule's numbers a share of the way; of shares that go, so that as much of the rest goes every time."""
    return 1 - (1 - numbers) ** share if interval.high == 1 else numbers * share


MOST_CHANGES = 200  # whose densities are told

NEARLY = 0.002  # of a budget: what may be left unused on the way to it


def _nearly(now: int | None, end: int | None) -> int | None:
    """The count that is near enough to the one that a budget allows now, and never below the one in the end."""
    return None if now is None or end is None else min(now, max(end, int(now * (1 - NEARLY))))


def _holds_by_zeros(reached: Reached) -> bool:
    """Whether nothing had to go for a budget that the dense network is above."""
    left = reached.left
    limits = reached.budget.limits(left)
    above = [(limits.nonzero, left.total), (limits.macs, left.dense_macs), (limits.bytes, left.dense_bytes)]
    return reached.is_idle and any(limit is not None and limit < dense for limit, dense in above)
