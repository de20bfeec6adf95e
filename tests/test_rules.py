"""Importance → unit → cut: each against its formula, in every combination, and members together as alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose, context_of, shipped_rule, slow
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from sparsity import config, models
from sparsity.data import Images, Splits
from sparsity.errors import ConfigError
from sparsity.graph import Facts, trace
from sparsity.limits import Budget
from sparsity.losses import cross_entropy
from sparsity.models import build
from sparsity.population import stack
from sparsity.pruning import cut, unit
from sparsity.stages.pruning import Pruner, scored
from sparsity.stages.rules import masks_of, rule_of
from sparsity.step import CROSS_ENTROPY, Loss
from sparsity.tensors import to_view


def parts(kind):
    return sorted(path.stem for path in (ROOT / "conf" / "prune" / kind).glob("*.yaml"))


IMPORTANCES, UNITS, CUTS = parts("importance"), parts("unit"), parts("cut")
FOR_FILTERS = {"slimming", "geometric_median"}
FOR_ENTRIES = {"grasp"}


class Net(nn.Module):
    """Two convolutions with normalisations behind them and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4, 3)

    def forward(self, images):
        maps = self.norm1(self.conv1(images)).relu()
        return self.fc(self.norm2(self.conv2(maps)).relu().flatten(1)).log_softmax(1)


def network(seed=0):
    module = build(Net, (1, 6, 6), 3, seed)
    generator = torch.Generator().manual_seed(seed)
    for norm in (module.norm1, module.norm2):
        norm.weight.data.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.1)
        norm.running_mean.copy_(torch.randn(norm.bias.shape, generator=generator) / 9)
    return module.eval()


def splits(num=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 1, 6, 6), dtype=torch.uint8, generator=generator)
    part = Images(images, torch.arange(num) % 3)
    return Splits(part, None, part, 3)


def stacked(*modules):
    return stack(list(modules), "cpu", torch.rand(2, 1, 6, 6))


def context(*modules, data=None, seeds=None):
    return context_of(trace(modules[0], torch.rand(2, 1, 6, 6)), data or splits(), seeds or range(len(modules)))


def node(importance="magnitude", unit="entry", cut="global", **more):
    exclude = {"exclude": ["fc"]} if importance == "slimming" else {}
    chosen = shipped_rule("percentile", f"prune/importance={importance}", f"prune/unit={unit}", f"prune/cut={cut}")[1]
    if importance == "synflow":  # fewer rounds
        chosen = replace(chosen, importance=replace(chosen.importance, rounds=3))
    return replace(chosen, **exclude, **more)


def scores(chosen, population, given, loss=CROSS_ENTROPY):
    rule = rule_of([chosen] * population.num_members, [0.5] * population.num_members, population)
    return rule, scored(population, rule, [chosen.importance] * population.num_members, given, loss, given.generators())


def whole_batch(chosen, batches=1):
    """The rule, reading all 32 images as so many batches, in whatever order."""
    return replace(chosen, importance=replace(chosen.importance, batches=batches, batch_size=32 // batches))


# --- importances -----------------------------------------------------------------------------------------------------


def loss_of(module, parameters, images, labels):
    return cross_entropy(functional_call(module, parameters, (images / 255,)), labels)


def expected(name, module, data):
    """Each importance of conv2.weight in a few lines, on the whole of train."""
    images, labels = data.train.images.float(), data.train.labels
    parameters = {key: p.detach().clone().requires_grad_() for key, p in module.named_parameters()}
    weight = parameters["conv2.weight"]
    if name == "synflow":
        inner = nn.Sequential(
            module.conv1, module.norm1, nn.ReLU(), module.conv2, module.norm2, nn.ReLU(), nn.Flatten()
        )
        inner = build(lambda: nn.Sequential(inner, module.fc), (1, 6, 6), 3, 0).double()
        inner.load_state_dict({key: v.abs() if "running" not in key else v for key, v in inner.state_dict().items()})
        inner.eval()(torch.ones(1, 1, 6, 6).double()).sum().backward()
        found = inner[0][3].weight
        return (found * found.grad).abs().detach().float()
    if name == "wanda":
        inputs = module.norm1(module.conv1(images / 255)).relu().square().sum((0, 2, 3)).sqrt()
        return weight.abs() * torch.cat([inputs[:3].expand(4, 3), inputs[3:].expand(4, 3)])[:, :, None, None]
    if name == "slimming":
        return module.norm2.weight.view(8, 1, 1, 1).expand_as(weight)
    if name == "geometric_median":
        rows = weight.flatten(1)
        return (
            torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
            .sum(1)
            .view(8, 1, 1, 1)
            .expand_as(weight)
        )
    loss = loss_of(module, parameters, images, labels)
    if name == "grasp":
        slopes = torch.autograd.grad(
            loss_of(module, parameters, images, labels), list(parameters.values()), create_graph=True
        )
        named = dict(zip(parameters, slopes))
        total = sum(
            (each * each.detach()).sum() for key, each in named.items() if key.endswith("weight") and "norm" not in key
        )
        return weight * torch.autograd.grad(total, weight)[0]
    (gradient,) = torch.autograd.grad(loss, weight)
    formulas = {
        "magnitude": lambda: weight.abs(),
        "taylor": lambda: (weight * gradient).abs(),
        "snip": lambda: (weight * gradient).abs(),
        "taylor_squared": lambda: (weight * gradient).square(),
    }
    return formulas[name]()


EXACT = [name for name in IMPORTANCES if name not in ("brain_damage", "random")]


@pytest.mark.parametrize("name", EXACT)
def test_an_importance_is_its_formula(name):
    module, data = network(), splits()
    chosen = node(name, "filter" if name in FOR_FILTERS else "entry")
    reads = {"batch_size": 32} | ({"batches": 1} if chosen.importance.batches else {})
    chosen = replace(chosen, importance=replace(chosen.importance, mode="eval", **reads))
    _, found = scores(chosen, stacked(module), context(module, data=data))
    mine = found.entries["conv2.weight"][0]  # groups, outputs, inputs, positions
    right = expected(name, module, data).detach().reshape(2, 4, 3, 9)
    torch.testing.assert_close(mine, right, rtol=2e-4, atol=1e-7 * float(right.abs().max()))


def test_squares_are_summed_over_batches():
    module, data = network(), splits()
    one = scores(whole_batch(node("taylor_squared"), 1), stacked(module), context(module, data=data))[1]
    two = scores(whole_batch(node("taylor_squared"), 2), stacked(module), context(module, data=data))[1]
    order = torch.randperm(32, generator=context(module).generators()[0])
    total = 0
    for index in order.split(16):
        parameters = {key: p.detach().clone().requires_grad_() for key, p in module.named_parameters()}
        loss = loss_of(module, parameters, data.train.images[index].float(), data.train.labels[index])
        weight = parameters["fc.weight"]
        total = total + (weight * torch.autograd.grad(loss, weight)[0]).square()
    torch.testing.assert_close(two.entries["fc.weight"][0, 0, ..., 0], total.detach(), rtol=1e-3, atol=1e-9)
    assert not torch.allclose(one.entries["fc.weight"], two.entries["fc.weight"])


@pytest.mark.slow
def test_curvature_is_the_gauss_newton_diagonal():
    """Of a linear layer under softmax it is Σ x² p (1 - p) / n, which draws of labels come near."""
    module = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), (1, 6, 6), 3, 0)
    data = splits()
    chosen = whole_batch(node("brain_damage"))
    total, draws = 0, 200
    for seed in range(draws):
        found = scores(chosen, stacked(module), context(module, data=data, seeds=[seed]))[1]
        total = total + found.entries["1.weight"][0, 0, ..., 0] / draws
    images = data.train.images.flatten(1).float() / 255
    shares = module(images).softmax(1)
    exact = torch.einsum("ni,no->oi", images.square(), shares * (1 - shares)) / len(images)
    ratio = total / (module[1].weight.square() * exact / 2).detach()
    assert 0.95 < float(ratio.mean()) < 1.05 and float((ratio - 1).abs().max()) < 0.6


def test_random_numbers_are_each_members_own():
    modules = [network(0), network(0)]
    _, found = scores(node("random"), stacked(*modules), context(*modules, seeds=[3, 4]))
    _, alone = scores(node("random"), stacked(modules[1]), context(modules[1], seeds=[4]))
    weights = found.entries["fc.weight"]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], alone.entries["fc.weight"][0])
    assert float(weights.min()) >= 0 and float(weights.max()) < 1 and abs(float(weights.mean()) - 0.5) < 0.1


@pytest.mark.parametrize("name", IMPORTANCES)
def test_members_together_score_as_alone(name):
    modules = [network(seed) for seed in range(3)]
    chosen = node(name, "filter" if name in FOR_FILTERS else "entry")
    _, together = scores(chosen, stacked(*modules), context(*modules))
    for member, module in enumerate(modules):
        _, alone = scores(chosen, stacked(module), context(module, seeds=[member]))
        for key, each in alone.entries.items():
            torch.testing.assert_close(together.entries[key][member], each[0], rtol=1e-3, atol=1e-6, msg=f"{key}")


@pytest.mark.parametrize("name", IMPORTANCES)
def test_zeros_and_scales_are_finite(name):
    chosen = node(name, "filter" if name in FOR_FILTERS else "entry")
    for scale in (0.0, 1e-20, 1e15):
        module = network()
        with torch.no_grad():
            for key in ("conv1.weight", "conv2.weight"):
                module.get_parameter(key).mul_(scale)
        population = stacked(module)
        rule, found = scores(chosen, population, context(module))
        assert all(each.isfinite().all() for each in found.entries.values()), scale
        assert all(mask.dtype is torch.bool for mask in masks_of(population, rule, None, found).values())


@pytest.mark.parametrize("name", [name for name in IMPORTANCES if name not in FOR_FILTERS])
def test_scoring_changes_nothing(name):
    module = network().train()
    population = stacked(module)
    before, given, mode = population.clone(), context(module), population.module.training
    state = torch.random.get_rng_state()
    scores(node(name), population, given)
    for part in ("parameters", "buffers"):
        assert all(torch.equal(each, getattr(before, part)[key]) for key, each in getattr(population, part).items())
    assert torch.equal(state, torch.random.get_rng_state()) and population.module.training is mode


def test_what_is_masked_goes_first():
    module = network()
    population = stacked(module)
    mask = torch.zeros_like(population.parameters["fc.weight"], dtype=torch.bool)
    mask[..., :8] = True
    population = replace(population, masks={"fc.weight": mask})
    for name in ("random", "grasp"):
        rule, found = scores(node(name, cut="layer"), population, context(module))
        masks = masks_of(population, rule.at(torch.tensor([0.75])), None, found)
        assert int(masks["fc.weight"].sum()) == 24 and not (masks["fc.weight"] & ~mask).any()


def test_the_loss_that_is_trained_by_is_the_one_that_is_scored_by():
    module = network()
    other = Loss(lambda outputs, labels: 2 * cross_entropy(outputs, labels))
    one = scores(node("taylor"), stacked(module), context(module))[1]
    two = scores(node("taylor"), stacked(module), context(module), other)[1]
    torch.testing.assert_close(two.entries["fc.weight"], 2 * one.entries["fc.weight"])


def test_the_penalty_may_be_in_the_gradient():
    module = network()
    reg = config.read(config.compose(["reg=l1", "reg.decay=0.01"])[0]).reg
    chosen = whole_batch(node("taylor"))
    both = replace(chosen, importance=replace(chosen.importance, penalty=reg))
    population = stacked(module)
    plain, added = (scores(each, population, context(module))[1].entries["fc.weight"] for each in (chosen, both))
    weight = to_view(population.parameters["fc.weight"][0], population.layouts["fc.weight"])
    data = splits().train
    parameters = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    loss = loss_of(module, parameters, data.images, data.labels)
    gradient = torch.autograd.grad(loss, parameters["fc.weight"])[0].view_as(weight)
    torch.testing.assert_close(plain[0], (weight * gradient).abs(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(added[0], (weight * (gradient + 0.01 * weight.sign())).abs(), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_the_penalty_in_the_gradient_as_typed(run):
    few = ("prune=percentile", "prune/importance=taylor", "data=digits", "budget.compression=10")
    one, other = (run(*few, f"prune.importance.penalty={text}") for text in ("null", "${reg}"))
    assert one["nonzero"]["weights"] == other["nonzero"]["weights"] and one["keys"] != other["keys"]
    with pytest.raises(ConfigError, match=r"prune.importance.penalty.* does nothing"):
        run("prune=percentile", "+prune.importance.penalty=${reg}")


# --- units -----------------------------------------------------------------------------------------------------------


def test_units_are_measured_by_the_root_mean_square():
    view = torch.arange(1.0, 25.0).reshape(1, 3, 4, 2)
    rms = lambda axes: view.square().mean(axes, keepdim=True).sqrt().expand_as(view)  # noqa: E731
    scored = lambda name, **more: unit.scores_of_entries(getattr(unit, name)(view, **more))  # noqa: E731
    torch.testing.assert_close(scored("filter"), rms((2, 3)))
    torch.testing.assert_close(scored("channel"), rms((1, 3)))
    torch.testing.assert_close(scored("kernel"), rms((3,)))
    torch.testing.assert_close(scored("filter_and_channel"), torch.minimum(rms((2, 3)), rms((1, 3))))
    assert scored("entry") is view
    fixed = torch.tensor([[False, True, False]])
    scores = scored("filter", fixed=fixed)
    assert scores[0, 1].isinf().all() and scores[0, 0].isfinite().all()


def test_blocks_at_the_edges_are_smaller():
    view = torch.rand(2, 5, 7, 3)
    found = unit.scores_of_entries(unit.block(view, rows=2, columns=4))
    for group in range(2):
        for row in range(0, 5, 2):
            for column in range(0, 7, 4):
                place = group, slice(row, row + 2), slice(column, column + 4)
                size = view[place].square().mean().sqrt()
                torch.testing.assert_close(found[place], size.expand_as(found[place]))


def test_n_of_m_leaves_n_of_every_m_inputs():
    view = torch.rand(1, 5, 10, 2)
    view[0, 0] = 1.0  # equal ones
    kept = unit.scores_of_entries(unit.n_of_m(view, n=2, m=4)) > -torch.inf
    assert (kept[:, :, :8].unflatten(2, (2, 4)).sum(3) == 2).all()
    assert kept[:, :, 8:].all()  # what is left over
    for group in (slice(0, 4), slice(4, 8)):
        least = torch.where(kept, view, torch.inf)[:, :, group].amin(2)
        most = torch.where(kept, -torch.inf, view)[:, :, group].amax(2)
        assert (least >= most).all()


class Residual(nn.Module):
    """A sum of two convolutions, and a depthwise one behind it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc = nn.Linear(6, 3)

    def forward(self, images):
        first = self.one(images).relu()
        maps = self.depthwise((first + self.two(first)).relu())
        return self.fc(maps.mean((2, 3)))


def test_coupled_channels_go_together():
    module = build(Residual, (1, 6, 6), 3, 0)
    population, given = stacked(module), context(module)
    with torch.no_grad():  # one of the two that are summed is large
        population.parameters["one.weight"][0, 2] *= 1e-3
        population.parameters["one.weight"][0, 4] *= 1e-3
        population.parameters["two.weight"][0, 4] *= 1e-3
        population.parameters["depthwise.weight"][0, 4] *= 1e-3
    chosen = node(unit="coupled", cut="threshold")
    rule, found = scores(chosen, population, given)
    masks = masks_of(population, rule.at(torch.tensor([0.01])), given.graph.units, found)
    for name in ("one.weight", "two.weight", "depthwise.weight"):
        assert masks[name][0].flatten(1).any(1).tolist() == [True, True, True, True, False, True], name
    assert not masks["two.weight"][0][:, 4].any() and not masks["fc.weight"][0][:, 4].any()  # what reads it, too
    assert masks["fc.weight"][0].any(1).all() and not masks["one.bias"][0, 4]


class Transformer(nn.Module):
    """Attention over 4 patches of 8 numbers, by 4 heads."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(9, 8)
        self.attend = nn.MultiheadAttention(8, 4, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        patches = self.embed(images.unfold(2, 3, 3).unfold(3, 3, 3).reshape(len(images), 4, 9))
        return self.fc((patches + self.attend(patches, patches, patches, need_weights=False)[0]).mean(1))


def test_a_head_goes_with_its_queries_keys_and_values_and_nothing_else_does():
    module = build(Transformer, (1, 6, 6), 3, 0)
    population, given = stack([module], "cpu", torch.rand(2, 1, 6, 6)), context(module)
    weak = [*range(2, 4), *range(10, 12), *range(18, 20)]  # of head 1: queries, keys, values
    population.parameters["attend.in_proj_weight"][0, weak] *= 0.1
    rule, found = scores(node(unit="head", cut="threshold"), population, given)
    masks = masks_of(population, rule.at(torch.tensor([0.1])), given.graph.units, found)
    assert (~masks["attend.in_proj_weight"][0].any(1)).nonzero().flatten().tolist() == weak
    assert (~masks["attend.out_proj.weight"][0].any(0)).nonzero().flatten().tolist() == [2, 3]
    assert masks["embed.weight"].all() and masks["fc.weight"].all()
    all_gone = masks_of(population, rule.at(torch.tensor([1e9])), given.graph.units, found)
    assert not all_gone["attend.in_proj_weight"].any() and all_gone["embed.weight"].all()


@pytest.mark.slow
def test_a_network_without_attention_has_no_heads(run):
    with pytest.raises(ConfigError, match=r"unit=head finds no heads of attention"):
        run("data=digits", "prune=coupled", "prune/unit=head")


@pytest.mark.parametrize("name", ["layer", "global", "std"])
def test_a_coupled_channel_goes_whole_whatever_the_cut(name):
    modules = [build(models.resnet20, (3, 8, 8), 3, seed) for seed in range(2)]
    population, images = stack(modules, "cpu", torch.rand(2, 3, 8, 8)), torch.rand(2, 3, 8, 8)
    given = context_of(trace(modules[0], images), splits(), range(2))
    chosen = node(unit="coupled", cut=name)
    rule, found = scores(chosen, population, given)
    masks = masks_of(
        population, rule.at(torch.tensor([0.3, 0.6] if name != "std" else [0.9, 1.0])), given.graph.units, found
    )
    for member in range(2):
        pruned = {key: torch.where(masks[key][member], p[member], 0) if key in masks else p[member]
                  for key, p in population.parameters.items()}  # fmt: skip
        facts = Facts({**pruned, **{key: b[member] for key, b in population.buffers.items()}})
        kept = given.graph.units.kept(facts)
        assert int((~kept).sum()) > 0
        for layer in given.graph.units.layers:  # rows are left of the units that stay alone, where inputs are left
            rows, stays = pruned[layer.weight].flatten(1).any(1), kept[given.graph.units.of[layer.outs]]
            assert torch.equal(rows, stays) or not rows.any(), layer.weight


def test_filters_stay_in_multiples():
    module = network()
    population, given = stacked(module), context(module)
    for share, left in ((0.05, 6), (0.3, 6), (0.6, 3), (0.99, 3), (1.0, 0)):
        rule, found = scores(node(unit="filter", cut="layer", round_to=3), population, given)
        masks = masks_of(population, rule.at(torch.tensor([share])), given.graph.units, found)
        assert int(masks["conv1.weight"][0].flatten(1).any(1).sum()) == left


# --- cuts ------------------------------------------------------------------------------------------------------------


def views():
    torch.manual_seed(0)
    return {"a": torch.rand(1, 20, 30, 1), "b": torch.rand(1, 5, 4, 9) * 3, "c": torch.rand(1, 3, 5, 1)}


def ordered(given):
    return {name: cut.in_order(each) for name, each in given.items()}


@pytest.mark.parametrize(("chosen", "times"), [("global", 1), ("layer", 3), ("lamp", 3)])
def test_a_budget_puts_scores_in_order_once(run, monkeypatch, chosen, times):
    calls = []
    monkeypatch.setattr("sparsity.stages.rules.in_order", lambda *each: calls.append(len(each)) or cut.in_order(*each))
    few = ("model=lenet300", "recipe=magnitude", "plots=false", "compact=false", "prune.apply_to=[weight]")
    run(*few, "prune=percentile", f"prune/cut={chosen}", "budget.compression=10")
    assert len(calls) == 3 * times  # of two checks beforehand, and of the pruning


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_shares_are_of_what_they_say(share):
    given, number = views(), torch.tensor(share, dtype=torch.float64)
    for each in given.values():
        least = cut.share_of_layer(each, sensitivity=number, ordered=cut.in_order(each))
        left = int((each >= least).sum())
        assert left == each.numel() - round(share * each.numel())
    least = cut.share_of_all(given, sensitivity=number, ordered=cut.in_order(*given.values()))
    total = sum(each.numel() for each in given.values())
    assert sum(int((each >= least).sum()) for each in given.values()) == total - round(share * total)


def test_erdos_renyi_shares_are_those_of_the_paper():
    given = views()
    found = cut.erdos_renyi(given, sensitivity=torch.tensor(0.7), ordered_each=ordered(given))
    density = {name: float((each >= found[name]).float().mean()) for name, each in given.items()}
    odds = {"a": 50 / 600, "b": (5 + 4 + 3 + 3) / 180, "c": (3 + 5) / 15}
    assert density["c"] == 1.0  # capped; the rest is shared by the others
    factor = (0.3 * 795 - 15) / (odds["a"] * 600 + odds["b"] * 180)
    for name in "ab":
        assert density[name] == pytest.approx(factor * odds[name], abs=0.51 / given[name].numel())


def test_lamp_is_its_formula():
    given = views()
    found = cut.lamp(given, sensitivity=torch.tensor(0.8), ordered_each=ordered(given))
    adapted = {}
    for name, each in given.items():
        flat = each.flatten().double()
        adapted[name] = torch.stack([w**2 / flat[flat >= w].square().sum() for w in flat]).view_as(each)
    least = torch.cat([each.flatten() for each in adapted.values()]).sort().values[round(0.8 * 795)]
    for name, each in given.items():
        assert torch.equal(each >= found[name], adapted[name] >= least), name
    nothing = cut.lamp(given, sensitivity=torch.tensor(1 - 3 / 795), ordered_each=ordered(given))
    assert all(int((each >= nothing[name]).sum()) == 1 for name, each in given.items())  # no layer goes whole


@pytest.mark.slow
def test_a_floor_keeps_a_share_of_every_layer(run):
    module = network()
    population = stacked(module)
    rule, found = scores(node(cut="global", keep_at_least=0.1), population, context(module))
    for name, mask in masks_of(population, rule.at(torch.tensor([1.0])), None, found).items():
        assert int(mask.sum()) == -(-mask.numel() // 10), name
    with pytest.raises(ConfigError, match=r"cannot be met: .* are left at the least"):
        run("prune.keep_at_least=0.2", "budget.compression=10")


# --- combinations ----------------------------------------------------------------------------------------------------


COMBINED = [(i, u, c) for i in IMPORTANCES for u in UNITS for c in CUTS]
COMBINED = [
    each for each in COMBINED
    if each[1] != "head"  # of networks with attention
    and (each[0] not in FOR_FILTERS or each[1] in ("filter", "filter_and_channel", "channel", "coupled"))
    and (each[0] not in FOR_ENTRIES or each[1] in ("entry", "kernel", "block", "n_of_m"))
    and (each[1] != "channel" or each[0] not in FOR_FILTERS)
]  # fmt: skip
FEW = [each for each in COMBINED if each[0] != "synflow"][::41]
MORE = [each for each in COMBINED[1::9] if each not in FEW]


@pytest.mark.parametrize("names", [*FEW, *slow(*((each,) for each in MORE))], ids="-".join)
def test_every_combination_prunes_members_together_as_alone(names):
    modules = [network(seed) for seed in range(2)]
    chosen, given = node(*names), context(*modules)
    numbers = [0.3, 0.6]
    together = Pruner([chosen] * 2, numbers, None, stacked(*modules), given).masks(stacked(*modules), 1.0)
    for member, module in enumerate(modules):
        alone = Pruner([chosen], [numbers[member]], None, stacked(module), context(module, seeds=[member]))
        masks = alone.masks(stacked(module), 1.0)
        apart = sum(int((mask[0] != together[name][member]).sum()) for name, mask in masks.items())
        assert apart <= 6  # scores that are equal up to rounding
    may_keep_all = names[1] == "coupled" and names[2] == "erdos_renyi"  # one of a unit's tensors may be whole
    if names[2] not in ("threshold", "std", "std_of_units") and not may_keep_all:
        assert 0 < sum(int(mask.sum()) for mask in together.values()) < sum(mask.numel() for mask in together.values())


@pytest.mark.parametrize("name", ["geometric_median", *slow("magnitude", "grasp", "wanda", "synflow")])
def test_every_importance_meets_a_budget(name, run):
    if name in FOR_FILTERS:
        budgets = [Budget(compression=1.5)]
        pruner = Pruner([node(name, "filter", "layer")], None, budgets, stacked(network()), context(network()))
        pruner.masks(stacked(network()), 1.0)
        assert pruner.errors() == [None] and pruner.notes()[0]["budget"]["compression"] >= 1.5
        return
    few = ["prune.importance.rounds=5"] if name == "synflow" else []
    result = run("prune=percentile", f"prune/importance={name}", "budget.compression=20", "recipe=magnitude", *few)
    assert result["compression"]["weights"] == pytest.approx(20, rel=1e-3)


@pytest.mark.slow
def test_rounds_score_what_the_rounds_before_left():
    module = network()
    chosen = node("synflow")
    assert shipped_rule("percentile", "prune/importance=synflow")[1].importance.rounds == 100
    chosen = replace(chosen, importance=replace(chosen.importance, rounds=100))
    one = replace(chosen, importance=replace(chosen.importance, rounds=1))
    many, few = (
        Pruner([each], [0.95], None, stacked(module), context(module)).masks(stacked(module), 1.0)
        for each in (chosen, one)
    )
    kept = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in (many, few)]
    assert sum(kept[0].values()) == pytest.approx(sum(kept[1].values()), abs=8) and kept[0] != kept[1]
    assert all(kept[0].values())  # no layer goes whole, which one round may do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prune/importance=slimming"], "slimming scores filters alone: take prune/unit=filter"),
        (
            ["prune/importance=slimming", "prune/unit=filter", "prune.apply_to=[weight]"],
            "there is none: leave it out by",
        ),
        (["prune/importance=grasp", "prune/unit=filter"], "grasp scores entries alone: take prune/unit=entry"),
        (["prune/importance=taylor", "prune.importance.batches=0"], "leaves taylor nothing to read"),
        (["prune.importance.batches=3"], "batches=3 does nothing: magnitude reads no images"),
        (["prune.round_to=8"], "round_to=8 does nothing: the unit is no filter"),
        (["prune=n_of_m", "budget.compression=2"], "n_of_m leaves its own share"),
        (["prune/importance=wanda"], "asks for the inputs of fc1.bias"),
        (["prune/unit=block", "prune.unit.function.rows=0"], "rows"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(overrides, words, run):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace(".", r"\.")):
        run(*overrides)


@pytest.mark.slow
def test_ones_own_parts_are_a_function_and_a_yaml(tmp_path, run, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "def last(weight):\n"
        "    '''Later entries matter more.'''\n"
        "    import torch\n"
        "    return torch.arange(1.0, weight.numel() + 1).view(weight.shape)\n"
    )
    (tmp_path / "own" / "prune" / "importance").mkdir(parents=True)
    (tmp_path / "own" / "prune" / "importance" / "last.yaml").write_text(
        "of: any\nbatches: 0\nbatch_size: 128\nmode: eval\nrounds: 1\n"
        "function:\n  _target_: my_parts.last\n  _partial_: true\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["trust=[my_parts]", f"hydra.searchpath=[file://{tmp_path / 'own'}]", "prune/importance=last"]
    result = run(*own, "prune=percentile", "prune/cut=layer", "sensitivity=0.5")
    assert result["compression"]["weights"] == pytest.approx(2, rel=1e-3)


OWN = '''
import torch
from sparsity.pruning.unit import Groups

def last(weight):
    """Later entries matter more."""
    return torch.arange(1.0, weight.numel() + 1).view(weight.shape)

def pair(entries):
    """Two inputs in a row, with all their outputs."""
    norms = entries.square().unflatten(2, (-1, 2)).sum((1, 3, 4), keepdim=True).sqrt()
    spread = lambda each: each.expand(-1, -1, -1, 2, -1).flatten(2, 3).expand_as(entries)
    return [Groups(norms, 2 * entries.shape[1] * entries.shape[3], spread)]

def middle(scores, *, sensitivity, more: float):
    """So far between the least and the most."""
    return scores.amin() + (scores.amax() - scores.amin()) * sensitivity * more

def squares(outputs, labels, *, weight: float):
    """Of the distance to the labels' corners."""
    return weight * (outputs.softmax(1) - torch.nn.functional.one_hot(labels, 10)).square().sum(1).mean()

def darker(images, draws, *, most: float):
    """Images of less light."""
    return images * (1 - most * draws.view(-1, 1, 1, 1))
'''
OWN_YAMLS = {
    "prune/importance": "of: any\nbatches: 0\nbatch_size: 8\nmode: eval\nrounds: 1\n"
    "function: {_target_: own_parts.last",
    "prune/unit": "structural: false\nfunction: {_target_: own_parts.pair",
    "prune/cut": "scope: tensor\ndefault: 0.5\nsearch: interval(0,1)\nfunction: {_target_: own_parts.middle, more: 1.0",
    "loss": "function: {_target_: own_parts.squares, weight: 2.0",
    "augment": "draws: 1\nfunction: {_target_: own_parts.darker, most: 0.3",
}


@pytest.mark.slow
def test_ones_own_parts_are_a_function_and_a_yaml_each(tmp_path, run, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    for group, text in OWN_YAMLS.items():
        (tmp_path / "own" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / group / "mine.yaml").write_text(f"{text}, _partial_: true}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["trust=[own_parts]", f"hydra.searchpath=[file://{tmp_path / 'own'}]", "prune=std", "prune.apply_to=[weight]"]
    result = run(*own, *(f"{group}=mine" for group in OWN_YAMLS), "prune.cut.function.more=1.2", "sensitivity=0.5")
    weight = load_file(Path(result["folder"]) / "model.safetensors")["fc1.weight"]
    live = weight.any(0).unflatten(0, (-1, 2))
    assert torch.equal(live[:, 0], live[:, 1]) and 0.3 < float(live.float().mean()) < 0.7
    assert result["accuracy"]["final"]["test"] > 0.25  # by few epochs, of the last inputs alone
    assert result["training"] == {"loss": "squares", "augment": "darker"}


@pytest.mark.slow
def test_the_rules_that_were_are_the_same_three_parts():
    for name, (importance, kind, threshold) in {
        "threshold": ("magnitude", "entry", "threshold"),
        "std": ("magnitude", "entry", "std"),
        "percentile": ("magnitude", "entry", "share_of_all"),
        "group_threshold": ("magnitude", "filter_and_channel", "threshold"),
        "group_std": ("magnitude", "filter_and_channel", "std"),
    }.items():
        chosen = config.read(compose([f"prune={name}"])[0]).prune
        found = [getattr(chosen, part).function.function.__name__ for part in ("importance", "unit", "cut")]
        assert found == [importance, kind, threshold]
