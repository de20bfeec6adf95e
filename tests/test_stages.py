"""What the stages make of populations, without the pipeline around them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsity import pruning, stages
from sparsity.graph import trace
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


class Separable(nn.Module):
    """Batch normalisation, a depthwise convolution, slopes, and two heads whose outputs are summed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.slopes = nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6)
        self.point = nn.Conv2d(6, 5, 1)
        self.one, self.two = nn.Linear(5, 4), nn.Linear(6, 4)

    def forward(self, images):
        first = self.norm(self.conv(images)).relu()
        maps = self.point(self.slopes(self.depthwise(first))).relu()
        return self.one(maps.mean((2, 3))) + self.two(first.mean((2, 3)))


def group_pruned(module, shape, function=pruning.group_threshold, sensitivity=0.01, excluded=()):
    images = torch.rand(2, *shape)
    population = stack([module], "cpu", images)
    names = [name for name, layout in population.layouts.items() if layout.kind == "weight" and name not in excluded]
    rule = replace(rule_of(function, names, sensitivity, structural=True), excluded=frozenset(excluded))
    parts = stages.Ingredients(None, {}, None, rule, [0], lambda stage: None, trace(module, images).units)
    return stages.prune(population, parts).population, parts


def shrunk(module, rows):
    """The module with some rows of weights so small that a group rule takes them; normalisations speak."""
    with torch.no_grad():
        for name, which in rows.items():
            module.get_parameter(name)[which] *= 1e-4
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.bias.fill_(1)
                part.running_mean.fill_(0.3)
    return module


@pytest.mark.parametrize("function", [pruning.group_threshold, pruning.group_std])
def test_what_belongs_to_a_filter_goes_with_it(function):
    module = shrunk(Separable(), {"conv.weight": [0, 3]})
    population, _ = group_pruned(module, (1, 8, 8), function)
    kept = torch.tensor([False, True, True, False, True, True])
    for name in ("norm.weight", "norm.bias", "depthwise.weight", "depthwise.bias", "slopes.weight"):
        entries = population.parameters[name][0].flatten(1).any(1) if "depthwise.w" in name else None
        assert torch.equal(population.parameters[name][0] != 0 if entries is None else entries, kept), name
    assert torch.equal(population.buffers["norm.running_mean"][0], torch.full((6,), 0.3))  # statistics stay


def test_what_is_excluded_goes_with_nothing():
    module = shrunk(Separable(), {"conv.weight": [0]})
    population, _ = group_pruned(module, (1, 8, 8), excluded=["norm.bias"])
    assert (population.parameters["norm.bias"] == 1).all() and population.parameters["norm.weight"][0, 0] == 0
    assert (population.parameters["depthwise.bias"] != 0).all()  # what it hears is not 0


@pytest.mark.parametrize("function", [pruning.group_threshold, pruning.group_std])
def test_group_rules_leave_outputs_alone(function):
    module = shrunk(Separable(), {"one.weight": [1, 2], "two.weight": [2], "one.bias": [0]})
    with torch.no_grad():
        module.one.weight[:, 3] *= 1e-4
    population, _ = group_pruned(module, (1, 8, 8), function)
    for head in ("one", "two"):
        assert population.parameters[f"{head}.weight"][0].any(1).all()
        assert torch.equal(population.parameters[f"{head}.bias"][0], module.get_parameter(f"{head}.bias"))
    assert not population.parameters["one.weight"][0][:, 3].any()  # its columns may go


def test_rules_that_do_not_ask_which_filters_stay_leave_outputs_alone_too():
    def rows(weight, *, sensitivity):
        return (weight.abs().amax((2, 3), keepdim=True) >= sensitivity).expand_as(weight)

    module = shrunk(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5)), {"0.weight": [1], "2.weight": [0, 4]})
    population, _ = group_pruned(module, (4,), rows)
    assert population.parameters["0.weight"][0].any(1).tolist() == [True, False, True]
    assert population.parameters["2.weight"][0].any(1).all()


def test_what_went_with_a_filter_is_held_at_zero():
    module = shrunk(Separable(), {"conv.weight": [0, 3]})
    population, parts = group_pruned(module, (1, 8, 8))
    held = stages._holding_zeros(population, parts.units).masks
    given = replace(population, masks={})  # as from a file
    again = stages._holding_zeros(given, parts.units).masks
    for masks in (held, again):
        assert not masks["norm.weight"][0, [0, 3]].any() and not masks["norm.bias"][0, [0, 3]].any()
        assert masks["norm.weight"].sum() == masks["norm.bias"].sum() == 4


def test_zeros_of_a_normalisation_that_hears_something_are_trained():
    module = Separable()
    nn.init.zeros_(module.norm.weight)
    images = torch.rand(2, 1, 8, 8)
    masks = stages._holding_zeros(stack([module], "cpu", images), trace(module, images).units).masks
    assert "norm.weight" not in masks or masks["norm.weight"].all()
