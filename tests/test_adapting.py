"""A decay that is found while it acts, such that a rule then leaves what the budget allows."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import context_of, shipped_rule, slow
from test_training import generators, linear, loop, splits

from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.limits import Budget
from sparsity.nodes import Adapt
from sparsity.stages.adapting import adaptation_of
from sparsity.stages.regularizing import total_penalty
from sparsity.step import CROSS_ENTROPY, Penalty
from sparsity.training import Adaptation, train

WEIGHT = "1.weight"


def adaptation(population, compression=4.0, sensitivity=0.05, every=4):
    adapts = [Adapt(shipped_rule("threshold")[1], sensitivity, every)] * population.num_members
    context = context_of(trace(population.module, splits().example()), splits(), range(population.num_members))
    return adaptation_of(
        adapts, [Budget(compression=compression)] * population.num_members, population, context, CROSS_ENTROPY
    )


def test_excess_is_what_the_rule_would_leave_by_what_it_may():
    population = linear(2)
    left = (population.parameters[WEIGHT].abs() >= 0.05).sum((1, 2))
    assert adaptation(population).excess(population) == pytest.approx([int(count) / 18 for count in left])


def test_a_decay_rises_while_too_much_is_left_and_falls_after():
    change = Adaptation(lambda population: [], 10)
    slow_fall, fast_fall = ((0.1, 3.0), (0.2, 2.95)), ((0.1, 3.0), (0.2, 1.0))
    assert 1 < change.factor(*slow_fall) <= Adaptation.RISE
    assert Adaptation.FALL <= change.factor(*fast_fall) < 1
    assert change.factor((0.1, 0.5), (0.2, -0.1)) == Adaptation.FALL  # what is asked for is reached
    assert change.factor((0.1, 0.5), (0.2, 0.5)) == change.factor((0.1, 0.5), (0.2, 0.7)) == Adaptation.RISE
    assert change.factor((0.1, 0.5), (0.2, math.nan)) == 1.0  # of what has diverged


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", *slow("recorded")])
def test_decays_are_each_members_own(way):
    population = linear(2)
    function = total_penalty(lambda view: view.abs().sum(), population.layouts, [WEIGHT])
    how = replace(loop(epochs=60, fused=way == "recorded"), way=way)

    def trained(members):
        some = population.take(members)
        penalty = Penalty(function, torch.tensor([3e-3, 3e-2])[members], {})
        return train(some, splits(), how, generators(*members), penalty=penalty, adaptation=adaptation(some))

    together = trained([0, 1])
    assert together.scale[0] > together.scale[1] and together.scale[0] > 2
    assert max(adaptation(population).excess(together.last)) < 2 < min(adaptation(population).excess(population))
    for member in range(2):
        assert trained([member]).scale[0] == pytest.approx(together.scale[member], rel=1e-3)


@pytest.mark.slow
def test_as_typed(run):
    longer = ("schedule.regularize.epochs=35", "recipe.regularize.adapt.every=6", "data=digits")
    result = run("recipe=adapted", "budget.compression=20", "reg.decay=1e-5", *longer)
    stage, pruned = result["stages_run"][1:3]
    assert result["compression"]["weights"] == pytest.approx(20, rel=1e-3)
    assert stage["decay"] > 3e-5 and result["stages_run"][0]["decay"] is None
    given = run("budget.compression=20", "reg.decay=1e-5", *longer[::2])["stages_run"][2]
    default = shipped_rule("std")[0]
    assert abs(math.log(pruned["sensitivity"] / default)) < abs(math.log(given["sensitivity"] / default)) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reg=none"], "no regularizer whose decay it could find"),
        (["reg.decay=0"], "no regularizer whose decay it could find"),
        (["sensitivity=0.3"], "finds regularize's decay by a budget"),
        (["recipe.regularize.adapt.every=0"], "recipe.regularize.adapt.every must be a whole number ≥ 1"),
    ],
)
def test_what_does_nothing_is_refused_before_training(overrides, words, run):
    with pytest.raises(ConfigError, match=words):
        run("recipe=adapted", "data=digits", *overrides)
