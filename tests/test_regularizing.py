"""Regularizers over units, and those that shrink: what is regularized together is what is removed together."""

from dataclasses import replace

import pytest
import torch
from conftest import slow
from test_training import generators, network, splits

from sparsity import config, models
from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.models import build
from sparsity.population import stack
from sparsity.stages.regularizing import penalty_of, shrink_of
from sparsity.tensors import to_view
from sparsity.training import Loop, train


def regularizer(*overrides, **changes):
    composed, _ = config.compose(list(overrides))
    return replace(config.read(composed).reg, **changes)


@pytest.fixture(scope="module")
def residual():
    """ResNet-20 on small images, its graph's units, and as a population."""
    module = build(models.resnet20, (3, 8, 8), 10, 0)
    return stack([module]), trace(module, torch.rand(2, 3, 8, 8)).units


FIRST = ["conv.weight", *(f"blocks.{number}.conv2.weight" for number in range(9))]  # they write the sums
READ_IT = [*(f"blocks.{number}.conv1.weight" for number in range(9)), "fc.weight"]


def sizes(parameter, axes):
    return parameter[0].square().sum(axes)


@pytest.mark.parametrize("name", ["l1", "hs"])
def test_coupled_channels_are_one_group_through_all_layers(name, residual):
    population, units = residual
    node = regularizer(f"reg={name}", "reg/unit=coupled", apply_to=["weight"])
    value = penalty_of([node], population, units).function({n: p[0] for n, p in population.parameters.items()})
    own, inner = population.parameters, []
    writes, reads = torch.zeros(64), torch.zeros(64)  # of the sums: shortcuts add channels behind those that there are

    def add(total, found):
        total[: len(found)] += found

    add(writes, sizes(own["conv.weight"], (1, 2, 3)))
    add(reads, sizes(own["fc.weight"], 0))
    for number in range(9):
        first, second = (own[f"blocks.{number}.conv{place}.weight"] for place in (1, 2))
        add(reads, sizes(first, (0, 2, 3)))
        add(writes, sizes(second, (1, 2, 3)))
        inner.append((sizes(first, (1, 2, 3)), sizes(second, (0, 2, 3))))  # channels of that block alone
    written, read = ([sums, *each] for sums, each in zip((writes, reads), zip(*inner)))
    norms = [torch.cat(each).sqrt() for each in (written, read)]
    totals = {"l1": [each.sum() for each in norms], "hs": [each.sum() ** 2 / each.square().sum() for each in norms]}
    torch.testing.assert_close(value, sum(totals[name]), rtol=1e-4, atol=0)


def test_shrinking_takes_a_coupled_channel_from_all_layers_that_share_it(residual):
    population, units = residual
    weak = {name: parameter.clone() for name, parameter in population.parameters.items()}
    for name in FIRST:
        weak[name][:, 3] *= 1e-3
    for name in READ_IT:
        weak[name][:, :, 3] *= 1e-3
    node = regularizer("reg=proximal_lasso", "reg/unit=coupled")
    shrunk = shrink_of([node], population, units).function({n: p[0] for n, p in weak.items()}, torch.tensor(0.05))
    for name in FIRST:
        rows = shrunk[name].flatten(1).abs().amax(1)
        assert rows[3] == 0 and rows[:3].all() and rows[4:].all(), name
    for name in READ_IT:
        assert not shrunk[name][:, 3].any() and shrunk[name][:, 2].any(), name
    assert shrunk["blocks.4.conv1.weight"].flatten(1).any(1).all()


def test_a_filter_that_shrinks_keeps_its_direction():
    population = stack([network()])
    node = regularizer("reg=proximal_lasso", "reg/unit=filter")
    name = next(iter(name for name, layout in population.layouts.items() if layout.kind == "weight"))
    before = to_view(population.parameters[name][0], population.layouts[name])
    function = shrink_of([node], population).function
    after = function({n: p[0] for n, p in population.parameters.items()}, torch.tensor(0.1))[name]
    after = to_view(after, population.layouts[name])
    norms = before.square().sum((2, 3)).sqrt()
    torch.testing.assert_close(after.square().sum((2, 3)).sqrt(), (norms - 0.1).clamp_min(0))
    torch.testing.assert_close(torch.cosine_similarity(before.flatten(2), after.flatten(2), 2), torch.ones_like(norms))


@pytest.mark.parametrize(
    "overrides",
    [
        ["reg=p_decay"],
        *slow((["reg=proximal_l1"],), (["reg=proximal_lasso"],), (["reg=hs", "reg/unit=coupled"],)),
        *slow((["reg=l1", "reg/unit=block"],), (["reg=transformed_l1", "reg/unit=kernel", "reg.rise=0.5"],)),
    ],
)
def test_members_together_are_members_alone(overrides):
    modules = [network(seed=seed) for seed in range(2)]
    nodes = [regularizer(*overrides, decay=decay) for decay in (0.5, 2.0)]
    units = trace(modules[0], splits().example()).units
    loop = Loop(2, 10, lambda progress: 0.01, lambda tensors: torch.optim.SGD(tensors, lr=0.01))

    def trained(members):
        population = stack([modules[member] for member in members])
        own = [nodes[member] for member in members]
        added = {"penalty": penalty_of(own, population, units), "shrink": shrink_of(own, population, units)}
        return train(population, splits(), loop, generators(*members), **added).last

    together = trained([0, 1])
    for member in range(2):
        for name, parameter in trained([member]).parameters.items():
            torch.testing.assert_close(parameter[0], together.parameters[name][member], rtol=1e-4, atol=1e-5)


def test_shrinking_follows_the_optimizers_step():
    """By the learning rate times the decay, which itself rises."""
    population = stack([network()])
    name = next(iter(name for name, layout in population.layouts.items() if layout.kind == "weight"))
    shrink = shrink_of([regularizer("reg=proximal_l1", decay=1e6)], population)
    loop = Loop(1, 10, lambda progress: 0.01, lambda tensors: torch.optim.SGD(tensors, lr=0.01))
    ended = train(population, splits(), loop, generators(0), shrink=shrink).last
    assert not ended.parameters[name].any()
    rising = shrink_of([regularizer("reg=proximal_l1", decay=1e-9, rise=1.0)], population)
    assert rising.decay_at(0.0) == 0 and rising.decay_at(0.5) == pytest.approx(5e-10)


@pytest.mark.slow
def test_exact_zeros_are_counted_and_held(run):
    result = run("reg=proximal_l1", "reg.decay=0.3", "stages=[pretrain,regularize,prune,finetune]", "sensitivity=0")
    assert result["compression"]["weights"] > 1.15 and result["accuracy"]["dense"]["test"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [
                "reg.unit.function._target_=sparsity.pruning.unit.n_of_m",
                "+reg.unit.function.n=2",
                "+reg.unit.function.m=4",
            ],
            "reg/unit=n_of_m",
        ),
        (["reg=proximal_l1", "+reg.penalty={_target_: sparsity.regularizers.l1, _partial_: true}"], "two regularizers"),
        (["reg=p_decay", "reg.shrink.p=3"], "reg.shrink.p must be a number ≥ 0 and ≤ 2"),
        (["reg/unit=filter", "reg.apply_to=[bias]"], "no weights to part"),
    ],
)
def test_what_does_nothing_is_refused(overrides, words, run):
    with pytest.raises(ConfigError, match=words):
        run(*overrides)
