"""Masks whose entries are exchanged while training, and weights that are trained under a mask straight through it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import context_of, slow
from safetensors.torch import load_file
from test_gradual import WEIGHT, gradual, moving
from test_step import check_same
from test_training import generators, linear, loop, splits

from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.nodes import Regrow
from sparsity.stages.regrowing import exchanged, regrowth_of
from sparsity.step import CROSS_ENTROPY, Step, leaves
from sparsity.training import train


def masked(num_members=1, density=0.3):
    population = linear(num_members)
    drawn = torch.rand(num_members, 2, 36, generator=torch.Generator().manual_seed(5))
    masks = {WEIGHT: drawn < density}
    parameters = population.parameters | {WEIGHT: population.parameters[WEIGHT] * masks[WEIGHT]}
    return replace(population, parameters=parameters, masks=masks)


def regrowth(population, by="gradient", share=0.5, until=0.75, every=3, seeds=None):
    seeds = seeds or tuple(range(population.num_members))
    context = context_of(trace(population.module, splits().example()), splits(), seeds, stage="train")
    return regrowth_of(Regrow(by, share, until, every), population, context, loop(), CROSS_ENTROPY)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_smallest_go_and_the_largest_gradients_come(share):
    generator = torch.Generator().manual_seed(0)
    weight, growth = (torch.randn(2, 6, 5, generator=generator) for _ in range(2))
    mask = torch.rand(2, 6, 5, generator=generator) < 0.4
    found = exchanged(mask, weight * mask, growth, share)
    for member in range(2):
        kept = set(mask[member].flatten().nonzero().flatten().tolist())
        count = int(len(kept) * share)
        sizes, slopes = weight[member].flatten().abs(), growth[member].flatten().abs()
        stays = set(sorted(kept, key=lambda place: -sizes[place])[: len(kept) - count])
        others = sorted(set(range(30)) - stays, key=lambda place: -slopes[place])
        assert set(found[member].flatten().nonzero().flatten().tolist()) == stays | set(others[:count])


def test_what_is_exchanged_falls_along_a_cosine_and_ends():
    shares = regrowth(masked(), share=0.4, until=0.5, every=5).shares(40)
    assert list(shares) == [5, 10, 15]
    assert shares[10] == pytest.approx(0.2) and shares[5] > 0.3 > shares[10] > 0.1 > shares[15] > 0


def gradient_at(population, member, seed):
    """Of the first batch that the member's generator draws, as plainly as it can be written."""
    context = context_of(None, splits(), (seed,), stage="train")
    index = torch.randperm(64, generator=context.generators()[0])[:16]
    images, labels = splits().train.images[index].flatten(1).float() / 255, splits().train.labels[index]
    weight = population.parameters[WEIGHT][member].clone().requires_grad_()
    outputs = images @ weight.T + population.parameters["1.bias"][member]
    return torch.autograd.grad(torch.nn.functional.cross_entropy(outputs, labels), weight)[0]


def test_gradients_are_dense_and_each_members_own():
    population = masked(2)
    found = regrowth(population).masks(population, 0.5)[WEIGHT]
    for member in range(2):
        slope, kept = gradient_at(population, member, member).abs(), population.masks[WEIGHT][member]
        came, out = found[member] & ~kept, ~found[member]
        assert came.sum() > 3 and slope[came].min() > slope[out].max() - 1e-6  # two classes have slopes of one size


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_as_many_entries_stay_and_what_comes_begins_at_zero(by, monkeypatch):
    population, seen, before = masked(2), [], Step.mask

    def watched(step, masks):
        old = step.population.masks[WEIGHT].clone()
        before(step, masks)
        new, now = step.population.masks[WEIGHT], step.population.parameters[WEIGHT].detach()
        came = new & ~old
        assert came.any() and not now[came].any() and not now[~new].any()
        state = step.optimizer.state[step.population.parameters[WEIGHT]]
        assert not state["exp_avg"][came].any() and not state["exp_avg_sq"][came].any()
        seen.append(new.clone())

    monkeypatch.setattr(Step, "mask", watched)
    trained = train(population, splits(), loop(epochs=3), generators(0, 1), gradual=regrowth(population, by))
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    for masks in (*seen, trained.last.masks[WEIGHT]):
        assert masks.sum((1, 2)).tolist() == population.masks[WEIGHT].sum((1, 2)).tolist()
    assert not trained.last.parameters[WEIGHT][~trained.last.masks[WEIGHT]].any()


@pytest.mark.parametrize("by", ["gradient", *slow("random")])
def test_members_together_are_members_alone(by):
    population = masked(2)
    together = train(population, splits(), loop(), generators(3, 4), gradual=regrowth(population, by, seeds=(3, 4)))
    for member in range(2):
        one = population.member(member)
        alone = train(one, splits(), loop(), generators(3 + member), gradual=regrowth(one, by, seeds=(3 + member,)))
        assert torch.equal(alone.last.masks[WEIGHT][0], together.last.masks[WEIGHT][member])
        torch.testing.assert_close(alone.last.parameters[WEIGHT][0], together.last.parameters[WEIGHT][member])


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [1, 2])
def test_a_recorded_step_reads_exchanged_masks_anew(num_members):
    population = masked(num_members)
    ways = (replace(loop(fused=True), way=way) for way in ("eager", "recorded"))
    check_same(
        *(
            train(population, splits(), way, generators(*range(num_members)), gradual=regrowth(population))
            for way in ways
        )
    )


# --- straight through ------------------------------------------------------------------------------------------------


def test_gradients_reach_what_the_mask_leaves_out():
    population = masked()
    dense = population.parameters | {WEIGHT: torch.randn(1, 2, 36, generator=torch.Generator().manual_seed(2))}
    population = leaves(replace(population, parameters=dense))
    step = Step(population, splits(), None, partial(torch.optim.SGD, lr=1.0), straight_through=True)
    (batch,) = step.batches(torch.arange(16)[None], 16)
    before = dense[WEIGHT].clone()
    step(*batch)
    images, labels = splits().train.images[:16].flatten(1).float() / 255, splits().train.labels[:16]
    weight = (before[0] * population.masks[WEIGHT][0]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(images @ weight.T + dense["1.bias"][0], labels)
    torch.testing.assert_close(
        before - population.parameters[WEIGHT].detach(), torch.autograd.grad(loss, weight)[0][None]
    )
    seen = step.masked(population).parameters[WEIGHT]
    assert torch.equal(seen != 0, population.masks[WEIGHT])


@pytest.mark.parametrize("way", ["eager", *slow("recorded")])
def test_what_is_measured_and_handed_back_is_masked(way):
    changing = replace(gradual(moving, "constant", until=1.0), straight_through=True)
    how = replace(loop(epochs=3, fused=way == "recorded"), way=way)
    trained = train(linear(2), splits(), how, generators(0, 1), gradual=changing, select=True)
    for population in (trained.last, trained.selected):
        assert torch.equal(population.parameters[WEIGHT] != 0, population.masks[WEIGHT])
    assert (~trained.last.masks[WEIGHT]).any()
    if way == "recorded":
        eager = loop(epochs=3, fused=True)
        check_same(train(linear(2), splits(), eager, generators(0, 1), gradual=changing, select=True), trained)


def test_what_goes_may_come_back_with_what_it_was():
    """Without it an entry that is left out becomes 0."""
    seen = []

    def masks(population, share):
        seen.append(population.parameters[WEIGHT].clone())
        return moving(population, share)

    for through in (True, False):
        changing = replace(gradual(masks, "constant", until=1.0), straight_through=through)
        train(linear(), splits(), loop(), generators(0), gradual=changing)
    half = len(seen) // 2
    assert all((state != 0).all() for state in seen[:half]) and not (seen[-1] != 0).all()


# --- as typed --------------------------------------------------------------------------------------------------------

SMALL = ("data=digits", "schedule.pretrain.epochs=5", "budget.compression=10", "recipe.train.regrow.every=4")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rigl", "set"])
def test_layers_keep_their_shares(recipe, run):
    result = run(f"recipe={recipe}", *SMALL)
    before, after = (
        load_file(Path(result["folder"]) / "stages" / f"{name}.safetensors") for name in ("prune", "train")
    )
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert 0 <= int((before[name] != 0).sum()) - int((after[name] != 0).sum()) <= (before[name] != 0).sum() * 0.03
    assert ((before["fc2.weight"] != 0) != (after["fc2.weight"] != 0)).sum() > 300
    assert result["accuracy"]["final"]["test"] > 0.6


@pytest.mark.slow
def test_a_pattern_of_n_in_m_is_trained_straight_through(run):
    few = ("schedule.pretrain.epochs=1", "schedule.regularize.epochs=2", "recipe.train.every=5")
    result = run("recipe=gradual", "prune=n_of_m", "+recipe.train.straight_through=true", "data=digits", *few)
    weight = load_file(Path(result["folder"]) / "model.safetensors")["fc1.weight"]
    assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2 and result["accuracy"]["final"]["test"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=rigl", "stages=[train]"], "regrow"),
        (["recipe=rigl", "prune/unit=filter"], "prune/unit=entry"),
        (["recipe=rigl", "recipe.train.regrow.by=magic"], "recipe.train.regrow.by must be"),
        (["recipe=rigl", "recipe.train.regrow.share=1.5"], "recipe.train.regrow.share must be a number > 0 and ≤ 1"),
        (["recipe=at_init", "+recipe.train.straight_through=true"], "straight_through"),
        (["recipe=gradual", "+recipe.train.regrow={by: random, share: 0.3, until: 0.5, every: 9}"], "regrow"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(overrides, words, run):
    with pytest.raises(ConfigError, match=words):
        run("data=digits", *overrides)
