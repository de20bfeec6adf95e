"""Budgets: the number of a rule that leaves just so much, whatever the rule, the limit and the network."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import compose, context_of, rule_node, shipped_rule, slow, some_slow
from torch import nn

from sparsity import stages
from sparsity.accounting import account
from sparsity.budgets import check_reachable, counts, least_left, meet
from sparsity.config import read
from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.kinds import Range
from sparsity.limits import Budget, Counts, Limits, PartOfBudget, part
from sparsity.models import lenet5
from sparsity.population import stack
from sparsity.stages.pruning import Pruner
from sparsity.stages.rules import AppliedRule, Method, Pool, masks_of

SMALLEST = 2.0**-149  # of float32: a denormal
FROM_ZERO, SHARE = Range(0), Range(0, 1)


class Shipped(NamedTuple):
    """What a shipped rule's YAML says of it."""

    interval: Range
    kinds: tuple[str, ...]
    whole: bool = False
    structural: bool = False


RULES = {
    "threshold": Shipped(FROM_ZERO, ("weight", "bias")),
    "std": Shipped(FROM_ZERO, ("weight", "bias")),
    "percentile": Shipped(SHARE, ("weight",), whole=True),
    "group_threshold": Shipped(FROM_ZERO, ("weight",), structural=True),
    "group_std": Shipped(FROM_ZERO, ("weight",), structural=True),
}


class Net(nn.Module):
    """Two convolutions, the second in groups, with batch normalisation, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.fc1, self.fc2 = nn.Linear(12 * 4, 20), nn.Linear(20, 5)

    def forward(self, images):
        maps = self.norm(self.conv1(images)).relu()
        return self.fc2(self.fc1(self.conv2(maps).relu().flatten(1)).relu())


class Case:
    """A population, its graph, and a rule on it."""

    def __init__(self, rule, modules, shape, exclude=(), own=None):
        """own: a parameter with a number of its own, and the number."""
        images = torch.rand(2, *shape)
        self.shipped, self.population = RULES[rule], stack(modules, "cpu", images)
        self.graph, self.own, layouts = trace(modules[0], images), own, self.population.layouts
        names = [name for name, layout in layouts.items() if layout.kind in self.shipped.kinds]
        excluded = frozenset(name for name in layouts if name.rpartition(".")[0] in exclude)
        self.names = [name for name in names if name not in excluded]
        node = shipped_rule(rule)[1]
        assert (node.scope == "network", node.structural) == (self.shipped.whole, self.shipped.structural)
        methods = (Method(each.function.function) for each in (node.importance, node.unit, node.cut))
        self.rule = AppliedRule(*methods, self.shipped.whole, self.shipped.structural, [], excluded)

    def masks_of(self, numbers, own=True):
        """The rule's masks."""
        pools = [Pool(self.names, numbers)]
        if self.own and own:
            name, number = self.own
            rest = [each for each in self.names if each != name]
            pools = [Pool(rest, numbers), Pool([name], torch.full_like(numbers, number))]
        return masks_of(self.population, replace(self.rule, pools=pools), self.graph.units)

    def meet(self, *budgets):
        """What comes of a budget for each member."""
        return meet(self.population, self.masks_of, self.shipped.interval, budgets, self.graph)

    def check(self, *budgets):
        """Whether it can be met."""
        both = lambda numbers: self.masks_of(numbers, own=False)  # noqa: E731
        check_reachable(self.population, both, self.shipped.interval, budgets, self.graph)

    def reports(self, masks):
        """The report on each member with the masks applied."""
        for member in range(self.population.num_members):
            parameters = {
                name: parameter[member] * masks[name][member] if name in masks else parameter[member]
                for name, parameter in self.population.parameters.items()
            }
            buffers = {name: buffer[member] for name, buffer in self.population.buffers.items()}
            yield account(parameters, self.population.layouts, self.graph, buffers=buffers)


def nets(num_members=1):
    """Networks whose layers are of one scale, and whose filters are of many."""
    torch.manual_seed(3)
    modules = [Net() for _ in range(num_members)]
    with torch.no_grad():
        for module in modules:
            for layer in (module.conv1, module.conv2, module.fc1, module.fc2):
                layer.weight.copy_(torch.randn_like(layer.weight))
                layer.weight.mul_(torch.randn(len(layer.weight), *[1] * (layer.weight.ndim - 1)).exp())
    return modules


def keeps(budget, report):
    """Whether a report is within a budget, by the words of the budget alone."""
    weights, macs = report.nonzero["weights"], report.macs["removable"]
    return (
        (budget.nonzero is None or weights <= budget.nonzero)
        and (budget.compression is None or report.total["weights"] / max(weights, 0.5) >= budget.compression)
        and (budget.macs is None or macs <= budget.macs)
        and (budget.macs_reduction is None or report.macs["dense"] / max(macs, 0.5) >= budget.macs_reduction)
    )


BUDGETS = [
    Budget(nonzero=700),
    Budget(compression=2.5),
    Budget(macs=2500),
    Budget(macs_reduction=1.75),
    Budget(compression=1.5, nonzero=900, macs=3500, macs_reduction=1.4),
]


@pytest.mark.parametrize("exclude", [(), ("conv2",)], ids=["all", "excluded"])
@pytest.mark.parametrize("budget", [*BUDGETS[:1], *slow(*BUDGETS[1:4]), *BUDGETS[4:]])
@pytest.mark.parametrize("rule", RULES)
def test_a_budget_holds_and_at_the_next_smaller_number_it_does_not(rule, budget, exclude):
    case = Case(rule, nets(), (1, 6, 6), exclude)
    met = case.meet(budget)
    (reached,) = met.reached
    (report,) = case.reports(met.masks)
    assert reached.is_met and not reached.is_idle
    assert keeps(budget, report)
    assert reached.left.nonzero == report.nonzero["weights"] > 0
    assert reached.number == met.numbers.item()
    assert reached.record()["compression"] == report.compression["weights"]
    assert reached.left.macs == (report.macs["removable"] if budget.limits_macs else None)
    again = case.masks_of(met.numbers)
    assert all(torch.equal(mask, met.masks[name]) for name, mask in again.items())
    smaller = torch.nextafter(met.numbers, torch.tensor(-torch.inf))
    (before,) = case.reports(case.masks_of(smaller))
    assert not keeps(budget, before)
    assert reached.other.nonzero == before.nonzero["weights"]
    if exclude:
        assert all(name.rpartition(".")[0] not in exclude for name in met.masks)


@pytest.mark.parametrize("rule", ["threshold", "std", "percentile"])
def test_rules_on_entries_leave_exactly_what_is_allowed(rule):
    case = Case(rule, nets(), (1, 6, 6))
    for budget in (Budget(nonzero=321), Budget(compression=case.meet(Budget(nonzero=1)).reached[0].left.total / 321)):
        (reached,) = case.meet(budget).reached
        assert reached.left.nonzero == 321 and reached.other.nonzero == 322 and reached.words() is None


@pytest.mark.parametrize("rule", some_slow(list(RULES), "threshold", "percentile", "group_threshold", "group_std"))
def test_members_find_together_what_each_finds_alone(rule):
    budgets = [Budget(nonzero=300), Budget(macs=2500), Budget(compression=3.0, macs_reduction=1.5)]
    budgets.append(Budget(nonzero=10**6))
    modules = nets(4)
    together = Case(rule, modules, (1, 6, 6)).meet(*budgets)
    for member, (module, budget) in enumerate(zip(modules, budgets)):
        alone = Case(rule, [module], (1, 6, 6)).meet(budget)
        assert alone.reached[0].left == together.reached[member].left
        assert alone.reached[0].is_met == together.reached[member].is_met
        assert alone.numbers[0] == pytest.approx(together.numbers[member].item(), rel=1e-6)
        assert all(torch.equal(mask[0], together.masks[name][member]) for name, mask in alone.masks.items())
    assert [each.is_idle for each in together.reached] == [False, False, False, True]


def test_group_rules_say_by_how_much_they_fall_short():
    case = Case("group_threshold", nets(), (1, 6, 6))
    (reached,) = case.meet(Budget(nonzero=400)).reached
    left, more = reached.left.nonzero, reached.other.nonzero
    assert left < 400 < more
    assert reached.words() == (
        f"budget.nonzero=400 is not used up: {left} non-zero weights are left, {400 - left} fewer than it allows; "
        f"one step of the rule less leaves {more:,} non-zero weights"
    )
    (exact,) = case.meet(Budget(nonzero=left)).reached
    assert exact.left.nonzero == left and exact.words() is None


def test_of_several_limits_the_one_that_binds_is_told():
    case = Case("group_threshold", nets(), (1, 6, 6))
    (reached,) = case.meet(Budget(nonzero=10**6, macs_reduction=1.75)).reached
    assert (
        reached.words().startswith("budget.macs_reduction=1.75 is not used up: ") and "; budget" not in reached.words()
    )


def linear(weights, bias=True):
    module = nn.Linear(weights.shape[1], weights.shape[0], bias=bias)
    with torch.no_grad():
        module.weight.copy_(weights)
    return module


def test_ties_go_together():
    weights = torch.tensor([[1.0, 2, 2, 2, 3, 3]])
    case = Case("threshold", [linear(weights.repeat(2, 1))], (6,))
    found = {n: case.meet(Budget(nonzero=n)).reached[0] for n in (4, 5, 9, 10, 11)}
    assert [each.left.nonzero for each in found.values()] == [4, 4, 4, 10, 10]
    after_two = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0)).item()
    after_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    assert [each.number for each in found.values()] == [after_two] * 3 + [after_one] * 2
    assert "5 fewer" in found[9].words() and found[4].words() is None


@pytest.mark.parametrize("rule", ["threshold", "percentile"])
def test_a_rule_that_leaves_too_much_or_nothing_is_not_met(rule):
    case = Case(rule, [linear(torch.ones(3, 4))], (4,))
    met = case.meet(Budget(nonzero=5))
    (reached,) = met.reached
    assert not reached.is_met and not reached.is_idle
    assert reached.left.nonzero == 12 and reached.other.nonzero == 0 and met.masks["weight"].all()
    assert (
        reached.words()
        == "budget.nonzero=5 is not met: the rule leaves 12 non-zero weights at the least, or nothing at all"
    )


def test_what_no_number_takes_is_not_met():
    case = Case("std", [linear(torch.ones(3, 4))], (4,))  # its standard deviation is 0
    (reached,) = case.meet(Budget(compression=2.0)).reached
    assert not reached.is_met and reached.left.nonzero == 12 and reached.other is None
    assert torch.isfinite(torch.tensor(reached.number))
    assert reached.words() == (
        "budget.compression=2 is not met: the rule leaves 12 non-zero weights (compression 1) at the least"
    )


def test_layers_of_another_number_keep_theirs():
    case = Case("threshold", nets(), (1, 6, 6), own=("fc1.weight", 1.0))
    met = case.meet(Budget(nonzero=700))
    assert met.reached[0].left.nonzero == 700
    assert torch.equal(met.masks["fc1.weight"], case.population.parameters["fc1.weight"].abs() >= 1.0)
    (reached,) = case.meet(Budget(nonzero=100)).reached
    assert not reached.is_met
    kept = int(met.masks["fc1.weight"].sum())
    assert reached.left.nonzero == kept and f"leaves {kept} non-zero weights at the least" in reached.words()


def test_a_budget_above_what_is_there_takes_nothing():
    case = Case("threshold", nets(), (1, 6, 6))
    met = case.meet(Budget(nonzero=10**6, macs_reduction=1.0))
    (reached,) = met.reached
    assert reached.is_met and reached.is_idle and reached.number == 0
    assert all(mask.all() for mask in met.masks.values())
    total = reached.left.total
    assert reached.words() == (
        f"budget.nonzero=1000000 is above what is there, {total:,} non-zero weights: nothing had to go for it; "
        f"budget.macs_reduction=1 is above what is there, {reached.left.macs:,} MACs (reduction 1): "
        "nothing had to go for it"
    )


def test_of_a_network_of_zeros_no_budget_is_met():
    case = Case("threshold", [linear(torch.zeros(3, 4))], (4,))
    (reached,) = case.meet(Budget(nonzero=5)).reached
    assert not reached.is_met and reached.words() == "budget.nonzero=5 is not met: 0 non-zero weights is all there is"


@pytest.mark.parametrize("rule", ["threshold", "percentile"])
@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_are_weights(rule, flushed):
    sizes = (SMALLEST * torch.arange(12, dtype=torch.float64)).float().view(3, 4)
    case = Case(rule, [linear(sizes)], (4,))
    torch.set_flush_denormal(flushed)
    try:
        met = case.meet(Budget(nonzero=5))
        assert met.reached[0].left == Counts(5, 12)
        assert met.reached[0].other == Counts(6, 12)
        idle = case.meet(Budget(nonzero=11)).reached[0]
        assert bool(torch.ones((), dtype=torch.int32).view(torch.float32) != 0) is not flushed  # as before
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(met.masks["weight"][0], sizes >= 7 * SMALLEST)
    assert idle.is_idle and idle.left.nonzero == 11
    if rule == "threshold":
        assert met.numbers.item() == 7 * SMALLEST


def test_numbers_below_zero_and_open_ends_are_searched():
    case = Case("threshold", [linear(torch.tensor([[-3.0, -1, 0.5, 2]]), bias=False)], (4,))
    asked = []

    def masks_of(numbers):
        asked.append(numbers.item())
        return {"weight": case.population.parameters["weight"] > numbers}

    def found(interval, nonzero):
        (reached,) = meet(case.population, masks_of, interval, [Budget(nonzero=nonzero)], case.graph).reached
        return reached

    assert found(Range(), 3).number == -3 and found(Range(), 2).number == -1
    low = found(Range(-2, above=True), 3)
    assert low.is_idle and -2 < low.number < -1.9999998
    high = found(Range(-2, 0.5, below=True), 1)
    assert not high.is_met and high.left.nonzero == 2
    assert 0.4999999 < high.number < 0.5
    asked.clear()
    found(Range(-2, 0.5), 1)
    assert min(asked) >= -2 and max(asked) == 0.5 and len(asked) < 40


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0, 10 / 3, 7.1, 49.0, 50.0, 1e6, float("inf")])
@pytest.mark.parametrize("total", [1, 10, 147, 266_200])
def test_a_ratio_is_the_largest_count_that_reaches_it(ratio, total):
    limit = Budget(compression=ratio).limits(Counts(0, total)).nonzero
    assert limit == 0 or total / limit >= ratio
    assert total / (limit + 1) < ratio
    assert Budget(macs_reduction=ratio).limits(Counts(0, 0, 0, total)).macs == limit


def test_the_tighter_of_two_limits_on_one_count_holds():
    dense = Counts(1000, 1000, 500, 500)
    limits = Budget(nonzero=300, compression=5.0, macs=100, macs_reduction=2.0).limits(dense)
    assert limits == Limits(200, 100)
    assert Budget().limits(dense) == Limits(None, None) and not Budget().given and Budget(macs=1).given


@pytest.mark.parametrize(("way", "half"), [("linear", 550), ("geometric", 316)])
def test_a_budget_is_held_part_of_the_way(way, half):
    start, budget = Counts(1000, 1000), Budget(compression=10.0)
    assert part(budget, 0.5, start, way=way) == Budget(nonzero=half)
    assert part(budget, 0.0, start, way=way) == Budget(nonzero=1000)
    assert part(budget, 1.0, start, way=way) is budget
    left = [part(budget, share / 20, start, way=way).nonzero for share in range(20)]
    assert left == sorted(left, reverse=True)


def test_part_of_the_way_is_of_macs_too():
    start = Counts(1000, 1000, 400, 400)
    assert part(Budget(macs_reduction=4.0), 0.5, start, way="geometric") == Budget(macs=200)
    assert part(Budget(nonzero=2000, macs=200), 0.5, start, way="linear") == Budget(nonzero=2000, macs=300)


def test_what_is_excluded_alone_is_refused():
    case = Case("threshold", nets(), (1, 6, 6), exclude=("fc1",))
    kept = case.population.parameters["fc1.weight"].numel()
    case.check(Budget(nonzero=kept))
    with pytest.raises(ConfigError) as error:
        case.check(Budget(nonzero=kept - 1))
    assert str(error.value) == (
        f"budget.nonzero={kept - 1} cannot be met: {kept} non-zero weights are left at the least, when all goes that "
        "may: raise it, or exclude less by prune.exclude"
    )
    with pytest.raises(ConfigError, match=r"budget\.compression=1\.9 cannot .*: lower it, or exclude less"):
        case.check(Budget(nonzero=10**6, compression=1.9))


def test_layers_of_another_number_are_not_taken_for_excluded():
    case = Case("threshold", nets(), (1, 6, 6), own=("fc1.weight", 1.0))
    case.check(Budget(nonzero=100))


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_that_leaves_nothing_is_refused(rule):
    case = Case(rule, [linear(torch.ones(3, 4))], (4,))  # equal entries, that only ∞ takes
    case.check(Budget(nonzero=1, compression=12.0))
    with pytest.raises(
        ConfigError, match=r"^budget\.compression=12\.5 leaves nothing at all of the network: lower it$"
    ):
        case.check(Budget(compression=12.5))


def test_the_macs_of_one_channel_are_the_least():
    torch.manual_seed(0)
    shape = (1, 28, 28)
    case = Case("threshold", [lenet5(input_shape=shape, num_classes=10)], shape)
    least = 25 * 24**2 + 25 * 8**2 + 16 + 10  # a channel is 16 inputs of fc1; outputs stay
    case.check(Budget(macs=least))
    with pytest.raises(ConfigError, match=f"{least:,} MACs are left at the least, when all goes that may: raise it$"):
        case.check(Budget(macs=least - 1))
    case = Case("threshold", [lenet5(input_shape=shape, num_classes=10)], shape, exclude=("conv1", "conv2"))
    least = 20 * 25 * 24**2 + 20 * 25 * 8**2 + 16 + 10
    with pytest.raises(ConfigError, match=f"^budget.macs=30000 cannot be met: {least:,} MACs.*prune.exclude$"):
        case.check(Budget(macs=30000))


def test_what_branches_has_no_least_macs():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, images):
            units = self.first(images).relu()
            return self.last(units + self.second(units))

    case = Case("threshold", [Branches()], (4,))
    (least,) = least_left(case.population, case.masks_of, FROM_ZERO, [Budget(macs=1)], case.graph)
    assert (least.nonzero, least.macs) == (0, 0)
    case.check(Budget(macs=1))


def test_counts_of_a_population_as_it_stands():
    case = Case("threshold", [linear(torch.tensor([[0.0, 1], [2, 3]])), linear(torch.tensor([[0.0, 1], [0, 3]]))], (2,))
    assert counts(case.population, case.graph, [Budget(nonzero=1)] * 2) == [Counts(3, 4), Counts(2, 4)]
    assert counts(case.population, case.graph, [Budget(macs=1)] * 2) == [Counts(3, 4, 4, 4), Counts(2, 4, 2, 4)]


def test_a_part_of_a_budget_is_on_the_way_from_the_dense_network():
    dense = Counts(700, 1000, None, 300)
    assert PartOfBudget(nonzero=10, share=0.5).limits(dense) == Limits(100, None)
    assert PartOfBudget(nonzero=10, macs_reduction=3.0, share=0.5, way="linear").limits(dense) == Limits(505, 200)
    assert PartOfBudget(nonzero=10, share=1.0).limits(dense) == Budget(nonzero=10).limits(dense)
    halfway = part(PartOfBudget(nonzero=10, share=0.5), 0.5, dense, way="linear")
    assert halfway == Budget(nonzero=400)  # from what there is to the part of the budget
    assert [key for key, _ in PartOfBudget(nonzero=10, share=0.5).alone()] == ["50% of the way to budget.nonzero=10"]
    (_, alone), _ = PartOfBudget(nonzero=10, macs=9, share=0.5).alone()
    assert alone == PartOfBudget(nonzero=10, share=0.5)


def test_what_suffices_ends_the_search_early():
    case = Case("threshold", nets(), (1, 6, 6))
    asked = []

    def noted(numbers):
        asked.append(numbers)
        return case.masks_of(numbers)

    for enough in (None, 700, 665):
        asked.clear()
        limits = [Limits(enough, None)]
        met = meet(case.population, noted, FROM_ZERO, [Budget(nonzero=700)], case.graph, enough=limits)
        assert (enough or 700) <= met.reached[0].left.nonzero <= 700
    assert len(asked) < 25


@pytest.fixture
def pruned():
    """What pruning to budgets comes to, one a member."""

    def prune(*budgets, change=list, **rule):
        images, modules = torch.rand(2, 1, 6, 6), change(nets(len(budgets)))
        population, graph = stack(modules, "cpu", images), trace(modules[0], images)
        node = rule_node("threshold", **rule)
        return stages.prune(population, context_of(graph), rule=[node] * len(budgets), budget=list(budgets))

    return prune


def test_a_stage_tells_the_number_that_was_found_and_what_was_reached(pruned):
    outcome = pruned(Budget(nonzero=300), Budget(compression=2.0))
    total = sum(mask.numel() for name, mask in outcome.population.masks.items() if name.endswith("weight")) // 2
    for member, most in enumerate((300, total // 2)):
        left = sum(int(mask[member].sum()) for mask in outcome.population.masks.values())
        note = outcome.notes[member]
        assert left == note["budget"]["nonzero"] == most and note["budget"]["compression"] == total / left
        assert note["sensitivity"] > 0 and note["said"] == [] and outcome.errors[member] is None
    idle = pruned(Budget(nonzero=10**6)).notes[0]
    assert idle["sensitivity"] == 0 and "nothing had to go for it" in idle["said"][0]


def test_zeros_that_meet_a_budget_by_themselves_are_held(pruned):
    total = sum(module.weight.numel() for module in nets()[0].children() if module.weight.ndim > 1)

    def with_zeros(modules):
        for module in modules:
            module.fc1.weight.data[:, ::2] = 0
        return modules

    half = nets()[0].fc1.weight.numel() // 2
    tight, loose = (pruned(Budget(nonzero=most), change=with_zeros) for most in (total - half, total))
    for outcome, is_held in ((tight, True), (loose, False)):
        mask = outcome.population.masks["fc1.weight"][0]
        assert outcome.notes[0]["sensitivity"] == 0 and bool(mask[:, ::2].any()) != is_held and mask[:, 1::2].all()
        assert outcome.population.masks["conv1.bias"].all() if "conv1.bias" in outcome.population.masks else True


def test_a_budget_that_turns_out_not_to_be_met_fails_its_member_alone(pruned):
    kept = nets()[0].fc1.weight.numel()
    outcome = pruned(Budget(nonzero=kept - 1), Budget(nonzero=kept), exclude=["fc1"])
    assert f"budget.nonzero={kept - 1} is not met: the rule leaves {kept} non-zero weights" in str(outcome.errors[0])
    assert outcome.errors[1] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.nonzero=1000", "prune.exclude=[fc1]"], "budget.nonzero=1000 cannot be met: 23,520 non-zero weights"),
        *slow((["budget.compression=500", "prune.exclude=[fc1]"], "budget.compression=500 cannot be met")),
    ],
)
def test_what_no_rule_can_reach_is_refused_before_training(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run("model=mlp", "model.factory.hidden=[30]", "schedule.pretrain.epochs=1000", *overrides)


def test_own_sensitivities_do_not_stand_in_a_budgets_way_before_training(run):
    small = ("model=mlp", "model.factory.hidden=[30]", "stages=[pretrain,prune]", "plots=false")
    result = run(*small, "budget.nonzero=20000", "prune.layers.fc2=0.001", "prune.exclude=[fc1.bias]")
    assert result["nonzero"]["weights"] == 20000 and result["stages_run"][1]["budget"]["nonzero"] == 20000


def test_a_typed_strength_beats_that_of_a_yaml():
    assert read(compose(["budget.compression=5"])[0]).sensitivity is None
    run_ = read(compose(["+budget.compression=5", "sensitivity=0.5"])[0], typed=["sensitivity=0.5"])  # as of a YAML
    assert run_.sensitivity == 0.5 and run_.budget == Budget()


@pytest.mark.parametrize("rule", RULES)
def test_what_went_on_the_way_to_a_budget_stays_gone(rule):
    shipped, images, modules = RULES[rule], torch.rand(2, 1, 6, 6), nets(2)
    population, graph = stack(modules, "cpu", images), trace(modules[0], images)
    node = rule_node(rule)
    budgets = [Budget(nonzero=400), Budget(compression=2.0)]
    pruner = Pruner([node] * 2, None, budgets, population, context_of(graph))
    total = sum(p[0].numel() for name, p in population.parameters.items() if population.layouts[name].kind == "weight")
    before = None
    for share in (0.0, 0.3, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        masks = pruner.masks(population, share)
        assert before is None or all(not (masks[name] & ~before[name]).any() for name in before)
        before, kept = (
            masks,
            [torch.where(masks[name], p, 0) if name in masks else p for name, p in population.parameters.items()],
        )
        population = replace(population, parameters=dict(zip(population.parameters, kept)))
    weights = {name: mask for name, mask in before.items() if population.layouts[name].kind == "weight"}
    for member, most in enumerate((400, total // 2)):
        left = sum(int(mask[member].sum()) for mask in weights.values())
        assert left == pruner.notes()[member]["budget"]["nonzero"] <= most
        assert left == most or shipped.structural


BYTES = [
    (["budget.bytes=20000", "stages=[pretrain,prune]"], 20_000),
    *slow(
        (["budget.bytes=30000", "model=lenet5", "recipe=iterative", "rounds=2"], 30_000),
        (["budget.bytes=20000", "budget.compression=30", "stages=[pretrain,prune]"], 20_000),
        (["budget.bytes=60000", "model=lenet5", "prune=group_std", "stages=[pretrain,prune]"], 60_000),
        (["budget.bytes=30000", "model=lenet5", "recipe=gradual"], 30_000),
    ),
]


@pytest.mark.parametrize(("overrides", "most"), BYTES, ids=str)
def test_the_file_is_as_large_as_was_counted(run, tmp_path, overrides, most):
    """At most 64 bytes smaller, by the digits of what its header says, and never larger."""
    result = run(*overrides, "plots=false", "compact=true")
    found = [stage["budget"] for stage in result["stages_run"] if stage["budget"]]
    (path,) = tmp_path.rglob("compact.safetensors")
    counted = found[-1]["bytes"]
    assert counted <= most and counted - 64 <= path.stat().st_size <= counted
    if "rounds=2" in overrides:
        assert found[0]["bytes"] > 2 * most  # on the way
    if "budget.compression=30" in overrides:
        assert found[0]["compression"] >= 30


def test_bytes_that_cannot_be_reached_are_refused_before_training(run):
    with pytest.raises(
        ConfigError, match=r"^budget.bytes=900 cannot be met: [\d,]+ bytes are left at the least, .*: raise it$"
    ):
        run("budget.bytes=900", "plots=false")


def test_bytes_as_a_limit():
    dense = Counts(1000, 1000, None, None, 9000, 9000)
    limits = Budget(bytes=1000).limits(dense)
    assert limits == Limits(None, None, 1000)
    assert limits.hold(Counts(5, 1000, bytes=1000)) and not limits.hold(Counts(5, 1000, bytes=1001))
    assert part(Budget(bytes=1000), 0.5, dense, way="linear") == Budget(bytes=5000)
    assert part(Budget(bytes=1000), 0.5, dense, way="geometric") == Budget(bytes=3000)
    assert PartOfBudget(bytes=1000, share=0.5).limits(dense) == Limits(None, None, 3000)
    assert Budget(bytes=1000).turned(pruning="less") == "raise budget.bytes=1000"
