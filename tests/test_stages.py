"""What the stages make of populations, without the pipeline around them."""

from dataclasses import replace

import pytest
import torch
from conftest import context_of, rule_node
from test_training import splits
from torch import nn

from sparsity import stages
from sparsity.graph import trace
from sparsity.nodes import Call, StageSchedule
from sparsity.population import stack
from sparsity.pruning.unit import Groups
from sparsity.stages.holding import holding, holding_zeros

SMALLEST = 2.0**-149  # of float32: a denormal


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_compared_as_numbers_where_they_are_flushed(threads):
    population = stack([nn.Linear(500, 200)])
    sizes = (SMALLEST * torch.arange(4, dtype=torch.float64)).float().repeat(200, 125)
    population.parameters["weight"] = sizes.unsqueeze(0)
    rule = rule_node("threshold")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        pruned = stages.prune(population, context_of(), rule=[rule], sensitivity=[2 * SMALLEST]).population
        held = holding_zeros(pruned)
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


def group_pruned(module, shape, rule="group_threshold", sensitivity=0.01, excluded=(), **more):
    images = torch.rand(2, *shape)
    population = stack([module], "cpu", images)
    node, graph = rule_node(rule, exclude=list(excluded), **more), trace(module, images)
    return stages.prune(population, context_of(graph), rule=[node], sensitivity=[sensitivity]).population, graph


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


@pytest.mark.parametrize("rule", ["group_threshold", "group_std"])
def test_what_belongs_to_a_filter_goes_with_it(rule):
    module = shrunk(Separable(), {"conv.weight": [0, 3]})
    population, _ = group_pruned(module, (1, 8, 8), rule)
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


@pytest.mark.parametrize("rule", ["group_threshold", "group_std"])
def test_group_rules_leave_outputs_alone(rule):
    module = shrunk(Separable(), {"one.weight": [1, 2], "two.weight": [2], "one.bias": [0]})
    with torch.no_grad():
        module.one.weight[:, 3] *= 1e-4
    population, _ = group_pruned(module, (1, 8, 8), rule)
    for head in ("one", "two"):
        assert population.parameters[f"{head}.weight"][0].any(1).all()
        assert torch.equal(population.parameters[f"{head}.bias"][0], module.get_parameter(f"{head}.bias"))
    assert not population.parameters["one.weight"][0][:, 3].any()  # its columns may go


def test_units_that_do_not_ask_which_filters_stay_leave_outputs_alone_too():
    def rows(scores):
        return [Groups(scores.amax((2, 3), keepdim=True), 1, lambda each: each.expand_as(scores))]

    module = shrunk(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5)), {"0.weight": [1], "2.weight": [0, 4]})
    population, _ = group_pruned(module, (4,), unit=rows)
    assert population.parameters["0.weight"][0].any(1).tolist() == [True, False, True]
    assert population.parameters["2.weight"][0].any(1).all()


def test_what_went_with_a_filter_is_held_at_zero():
    module = shrunk(Separable(), {"conv.weight": [0, 3]})
    population, graph = group_pruned(module, (1, 8, 8))
    held = holding_zeros(population, graph.units).masks
    given = replace(population, masks={})  # as from a file
    again = holding_zeros(given, graph.units).masks
    for masks in (held, again):
        assert not masks["norm.weight"][0, [0, 3]].any() and not masks["norm.bias"][0, [0, 3]].any()
        assert masks["norm.weight"].sum() == masks["norm.bias"].sum() == 4


def test_zeros_of_a_normalisation_that_hears_something_are_trained():
    module = Separable()
    nn.init.zeros_(module.norm.weight)
    images = torch.rand(2, 1, 8, 8)
    masks = holding_zeros(stack([module], "cpu", images), trace(module, images).units).masks
    assert "norm.weight" not in masks or masks["norm.weight"].all()


# --- rounds ----------------------------------------------------------------------------------------------------------


def linear(*sizes, masks=None):
    """A population of one linear layer with weights of some sizes."""
    population = stack([nn.Linear(len(sizes), 1, bias=False)])
    masks = {} if masks is None else {"weight": torch.tensor([[masks]], dtype=torch.bool)}
    return replace(population, parameters={"weight": torch.tensor([[sizes]])}, masks=masks)


@pytest.mark.parametrize("rule", ["std", "group_std"])
def test_a_multiple_of_the_standard_deviation_is_of_what_is_left(rule):
    given = linear(1.0, 3.0, 0.0, 0.0, masks=[1, 1, 0, 0])
    node = rule_node(rule)
    images = torch.rand(2, 4)
    context = context_of(trace(given.module, images))
    outcome = stages.prune(given, context, rule=[node], sensitivity=[2.0])
    assert outcome.notes[0]["stds"] == {"weight": 1.0} and outcome.notes[0]["thresholds"] == {"weight": 2.0}
    whole = stages.prune(replace(given, masks={}), context, rule=[node], sensitivity=[2.0])
    assert whole.notes[0]["stds"] == {"weight": pytest.approx(1.5**0.5)}
    if rule == "std":
        assert outcome.population.parameters["weight"].tolist() == [[[0, 3, 0, 0]]]
        assert outcome.population.masks["weight"].tolist() == [[[False, True, False, False]]]


@pytest.mark.parametrize("rule", ["threshold", "group_threshold"])
def test_what_was_pruned_before_stays_pruned_whatever_it_is_now(rule):
    given = linear(5.0, 3.0, 4.0, masks=[0, 1, 1])
    context = context_of(trace(given.module, torch.rand(2, 3)))
    after = stages.prune(given, context, rule=[rule_node(rule)], sensitivity=[3.5]).population
    assert after.masks["weight"].tolist() == [[[False, False, True]]]
    assert after.parameters["weight"].tolist() == [[[0, 0, 4]]] and after.masks["weight"].dtype is torch.bool


def test_rewinding_gives_an_earlier_state_pruned_as_now():
    torch.manual_seed(0)
    start, now = (stack([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))]) for _ in range(2))
    now = replace(now, masks={"0.weight": torch.rand(1, 4, 3) > 0.5})
    now.buffers["1.running_mean"].fill_(7)
    context = replace(context_of(), states={"start": start, "other": now})
    after = stages.rewind(now, context, to="start").population
    mask = now.masks["0.weight"]
    assert torch.equal(after.parameters["0.weight"], start.parameters["0.weight"] * mask) and not mask.all()
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after.parameters[name], start.parameters[name])
    assert not after.buffers["1.running_mean"].any() and torch.equal(after.masks["0.weight"], mask)
    for name, buffer in after.buffers.items():
        buffer.add_(1)
        assert not torch.equal(buffer, start.buffers[name])  # the state itself is still of use


def test_what_a_stage_holds():
    population = stack([nn.Linear(3, 2)])
    population.parameters["weight"][0, 0, 0] = 0  # never pruned
    population.parameters["bias"][0, 1] = 0
    pruned = replace(population, masks={"weight": torch.tensor([[[True, True, False], [True, True, True]]])})
    pruned.parameters["weight"][0, 0, 2] = 0
    assert holding(pruned, "masks", None).masks == pruned.masks
    zeros = holding(pruned, "zeros", None).masks
    assert zeros["weight"].tolist() == [[[False, True, False], [True, True, True]]]
    assert zeros["bias"].tolist() == [[True, False]]
    assert holding(pruned, "none", None).masks == {}


@pytest.mark.parametrize("hold", ["masks", "zeros", "none"])
def test_training_holds_what_its_node_says(hold):
    data = splits()
    given = stack([nn.Sequential(nn.Flatten(), nn.Linear(36, 2))], "cpu", data.example())
    weight, bias = given.parameters["1.weight"], given.parameters["1.bias"]
    weight[0, 0, :20], bias[0, 0] = 0, 0
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0, 0, :10] = False
    given = replace(given, masks={"1.weight": mask})
    context = context_of(trace(given.module, data.example()), data, stage="tune")
    schedule = StageSchedule(epochs=2, lr=0.01, shape="constant", warmup=0.0, weight_decay=0.0)
    adam = Call("optimizer", "torch.optim.Adam", torch.optim.Adam, {})
    outcome = stages.train(given, context, schedule=schedule, batch_size=16, optimizer=adam, hold=hold)
    after = outcome.population
    is_zero = after.parameters["1.weight"][0, 0, :20] == 0
    assert is_zero[:10].all() == (hold != "none") and is_zero[10:].all() == (hold == "zeros")
    assert (after.parameters["1.bias"][0, 0] == 0) == (hold == "zeros") and outcome.did == ()
    assert (after.masks == {}) == (hold == "none")  # and later stages hold nothing either
