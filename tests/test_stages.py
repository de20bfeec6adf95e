"""What the stages make of populations, without the pipeline around them."""

import pytest
import torch
from torch import nn

from sparsity import pruning, stages
from sparsity.population import stack

SMALLEST = 2.0**-149  # of float32: a denormal


def rule_of(function, names, sensitivity, structural=False):
    pools = [(names, torch.tensor([sensitivity]))]
    return stages.Rule(stages.Method(function), None, False, structural, pools)


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_compared_as_numbers_where_they_are_flushed(threads):
    population = stack([nn.Linear(500, 200)])
    sizes = (SMALLEST * torch.arange(4, dtype=torch.float64)).float().repeat(200, 125)
    population.parameters["weight"] = sizes.unsqueeze(0)
    rule = rule_of(pruning.threshold, ["weight"], 2 * SMALLEST)
    parts = stages.Ingredients(None, {}, None, rule, [0], lambda stage: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        pruned = stages.prune(population, parts).population
        held = stages._holding_zeros(pruned)
        assert not bool(torch.ones((), dtype=torch.int32).view(torch.float32) != 0)  # flushed as before
        assert torch.get_num_threads() == threads
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert torch.equal(pruned.masks["weight"][0], sizes >= 2 * SMALLEST)
    assert torch.equal(pruned.parameters["weight"][0], sizes * (sizes >= 2 * SMALLEST))
    assert torch.equal(held.masks["weight"], pruned.masks["weight"])
