"""Masks that change while training: as the curve has them, in place, the optimizer forgetting, selected when final."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_step import check_same
from test_training import Breaking, generators, linear, loop, network, scripted, splits

from sparsity import capture, training
from sparsity.errors import ConfigError
from sparsity.models import build
from sparsity.population import stack
from sparsity.schedules import CURVES
from sparsity.step import Penalty, Step, leaves
from sparsity.training import Gradual, check_gradual, train

WEIGHT = "1.weight"  # of `linear`, [members, 2, 36]: 4 batches of 16 an epoch
FINAL = 0.75  # the share that is pruned in the end


def smallest(population, share, names=(WEIGHT,)):
    """Masks that leave out FINAL · share of each parameter's entries, the smallest first."""
    masks = {}
    for name in names:
        sizes = population.parameters[name].abs().flatten(1)
        order = sizes.argsort(dim=1, stable=True).argsort(dim=1)
        masks[name] = (order >= round(FINAL * share * sizes.shape[1])).view_as(population.parameters[name])
    return masks


def moving(population, share):
    """Masks that are drawn anew for every state, so that entries come back."""
    drawn = torch.frac(population.parameters[WEIGHT].double().sum((1, 2)) * 1e3)[:, None, None]
    return {WEIGHT: torch.frac(torch.arange(72).view(1, 2, 36) * 0.618 + drawn) >= FINAL * share}


def gradual(masks=smallest, curve="cubic", until=0.5, every=3, names=(WEIGHT,)):
    return Gradual(masks, names, CURVES[curve], until, every)


class Recording:
    """Remembers the states that masks were asked for, and what they were."""

    def __init__(self, masks=smallest):
        self.masks, self.seen = masks, []

    def __call__(self, population, share):
        found = self.masks(population, share)
        self.seen.append((share, population.clone(), found))
        return found


@pytest.mark.parametrize("name", CURVES)
def test_curves_rise_to_exactly_one(name):
    values = [CURVES[name](step / 8) for step in range(9)]
    assert values == sorted(values) and values[-1] == 1 and values[0] == (name == "constant")
    assert CURVES[name](0.5) == {"constant": 1, "linear": 0.5, "cubic": 0.875}[name]


def test_masks_change_from_step_0_and_last_at_the_end_of_the_span():
    cubic = [1 - (1 - step / 10) ** 3 for step in (0, 4, 8)]
    assert gradual(until=0.5, every=4).shares(20) == dict(zip((0, 4, 8), cubic)) | {10: 1.0}
    assert gradual(until=1, every=5).shares(10) == {0: 0.0, 5: 0.875, 10: 1.0}
    assert gradual(until=0).shares(20) == gradual(until=0.5).shares(0) == {0: 1.0}
    assert gradual(curve="constant", until=0.25, every=9).shares(20) == {0: 1.0, 5: 1.0}


@pytest.mark.parametrize("num_members", [1, 2])
def test_masks_are_those_of_the_curve(num_members):
    masks, population = Recording(), linear(num_members)
    trained = train(population, splits(), loop(epochs=3), generators(*range(num_members)), gradual=gradual(masks))
    assert [share for share, _, _ in masks.seen] == [*(1 - (1 - step / 6) ** 3 for step in (0, 3)), 1.0]
    for share, _, found in masks.seen:
        assert (~found[WEIGHT]).sum((1, 2)).tolist() == [round(FINAL * share * 72)] * num_members
    assert torch.equal(trained.last.masks[WEIGHT], masks.seen[-1][2][WEIGHT])
    assert torch.equal(trained.last.parameters[WEIGHT] != 0, trained.last.masks[WEIGHT])
    assert population.masks == {} and (population.parameters[WEIGHT] != 0).all()


def test_gradual_pruning_is_what_a_plain_loop_computes():
    population, data, masks = linear(), splits(), Recording(moving)
    plan = gradual(masks, curve="linear", until=0.75, every=2)
    trained = train(population, data, loop(), generators(3), gradual=plan).last
    module = torch.nn.Linear(36, 2)
    module.load_state_dict({"weight": population.parameters[WEIGHT][0], "bias": population.parameters["1.bias"][0]})
    optimizer, generator = torch.optim.Adam(module.parameters(), lr=1e-2), generators(3)[0]
    found = {step: mask[WEIGHT][0] for step, (_, _, mask) in zip((0, 2, 4, 6), masks.seen, strict=True)}
    before = mask = torch.ones(2, 36)
    batches = [index for _ in range(2) for index in torch.randperm(64, generator=generator).split(16)]
    for step, index in enumerate(batches):
        if step in found:
            before, mask = mask, found[step].float()
            state = optimizer.state[module.weight]
            for tensor in (module.weight.data, *(state[key] for key in ("exp_avg", "exp_avg_sq") if state)):
                tensor.mul_(mask * before)
        optimizer.zero_grad()
        outputs = module(data.train.images[index].flatten(1).float() / 255)
        torch.nn.functional.cross_entropy(outputs, data.train.labels[index]).backward()
        module.weight.grad.mul_(mask)
        optimizer.step()
    torch.testing.assert_close(trained.parameters[WEIGHT][0], module.weight.detach())


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "adam_decay": partial(torch.optim.Adam, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.5),
    "rprop": torch.optim.Rprop,
    "adafactor": partial(torch.optim.Adafactor, weight_decay=0.1),  # not entry by entry
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_between_changes_and_what_comes_back_moves(name):
    masks, population = Recording(moving), linear(2)
    plan = gradual(masks, curve="linear", until=0.75, every=2)
    trained = train(population, splits(), loop(epochs=3, optimizer=OPTIMIZERS[name]), generators(0, 1), gradual=plan)
    states = [(found[WEIGHT], state.parameters[WEIGHT]) for _, state, found in masks.seen]
    states.append((None, trained.last.parameters[WEIGHT]))
    came_back = 0
    for (before, _), (mask, _), (_, then) in zip(states, states[1:], states[2:]):
        assert not then[~mask].any()
        came_back += (then[mask & ~before] != 0).sum()
    assert came_back > 20
    assert trained.last.parameters[WEIGHT].isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_forgets_what_goes_and_what_comes_back(name):
    population = leaves(linear(2))
    ones = torch.ones(2, 2, 36, dtype=torch.bool)
    step = Step(replace(population, masks={WEIGHT: ones.clone()}), splits(), None, partial(OPTIMIZERS[name], lr=1e-2))
    weight = population.parameters[WEIGHT]
    (arguments,) = list(step.batches(torch.arange(32).repeat(2, 1), 32))

    def states():
        found = step.optimizer.state[weight]
        return {key: value for key, value in found.items() if value is not None and value.shape == weight.shape}

    def fresh(key):
        return {"step_size": 1e-2, "sum": 0.5}.get(key, 0)

    step.mask({WEIGHT: ones})  # before the optimizer remembers anything
    first = torch.rand(2, 2, 36, generator=torch.Generator().manual_seed(0)) < 0.5
    second = torch.rand(2, 2, 36, generator=torch.Generator().manual_seed(1)) < 0.5
    place = weight.data_ptr()
    for mask, stays in ((first, first), (second, first & second), (ones, second)):
        step(*arguments), step(*arguments)
        before, value = {key: state.clone() for key, state in states().items()}, weight.detach().clone()
        step.mask({WEIGHT: mask})
        assert torch.equal(weight, value * stays) and not weight.detach()[~stays].signbit().any()
        for key, state in states().items():
            assert (state[~stays] == fresh(key)).all() and torch.equal(state[stays], before[key][stays]), key
    assert weight.data_ptr() == place and step.optimizer.state[weight]


def test_a_regrown_entry_takes_the_first_step_of_a_fresh_one():
    """Of SGD with momentum, which corrects for no beginning: w = −lr · gradient, whatever there was before."""
    population = leaves(linear())
    masked = replace(population, masks={WEIGHT: torch.ones(1, 2, 36, dtype=torch.bool)})
    step = Step(masked, splits(), None, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    (arguments,) = list(step.batches(torch.arange(32)[None], 32))
    mask = torch.rand(1, 2, 36, generator=torch.Generator().manual_seed(0)) < 0.5
    for each in (mask, torch.ones_like(mask)):
        step(*arguments), step(*arguments)
        step.mask({WEIGHT: each})
    step(*arguments)
    weight = population.parameters[WEIGHT]
    torch.testing.assert_close(weight.detach()[~mask], -0.1 * weight.grad[~mask], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, fused=True),
                                       partial(torch.optim.SGD, momentum=0.9, fused=True)])  # fmt: skip
@pytest.mark.parametrize("num_members", [1, 2])
def test_a_recorded_step_reads_masks_anew(num_members, optimizer, monkeypatch):
    pieces, recorded = [], capture.recorded
    monkeypatch.setattr(capture, "recorded", lambda *given: pieces.append(given) or recorded(*given))
    assert_same_masks("recorded", num_members, optimizer)
    assert len(pieces) == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [1, 2])
def test_a_compiled_step_reads_masks_anew(num_members):
    optimizer = partial(torch.optim.SGD, momentum=0.9, fused=True)
    assert_same_masks("compiled", num_members, optimizer, partial(torch.allclose, rtol=1e-3, atol=1e-5))


def assert_same_masks(way, num_members, optimizer, close=torch.equal):
    """That a training is the same as op by op, with a penalty and masks that go by the step alone."""

    def masks(population, share):
        places = torch.arange(72).view(1, 2, 36) + 7 * round(1000 * share) + torch.arange(num_members)[:, None, None]
        return {WEIGHT: places % 12 >= 6 * share}

    def run(way):
        penalty = Penalty(lambda p: p[WEIGHT].abs().sum(), torch.linspace(1e-3, 2e-3, num_members), {})
        plan, data = gradual(masks, curve="linear", until=0.8, every=5), splits()
        some = replace(loop(epochs=6, optimizer=optimizer), way=way)
        seeds = generators(*range(num_members))
        return train(linear(num_members), data, some, seeds, penalty=penalty, gradual=plan, select=True)

    eager, other = run("eager"), run(way)
    check_same(eager, other, close)
    for state in ("last", "selected"):
        assert torch.equal(getattr(eager, state).masks[WEIGHT], getattr(other, state).masks[WEIGHT])
    assert eager.selected_epoch == other.selected_epoch


def test_members_together_have_the_masks_of_each_alone():
    plain = loop(epochs=2, optimizer=torch.optim.SGD)
    names = ("first.weight", "out.weight")
    plan = gradual(partial(smallest, names=names), names=names, every=2)
    members = [network(0), network(1)]
    together = train(stack(members), splits(), plain, generators(5, 6), gradual=plan, select=True)
    for index, module in enumerate(members):
        alone = train(stack([module]), splits(), plain, generators(5 + index), gradual=plan, select=True)
        assert together.selected_epoch[index] == alone.selected_epoch[0]
        for state in ("last", "selected"):
            one, other = getattr(together, state), getattr(alone, state)
            for name in names:
                assert torch.equal(one.masks[name][index], other.masks[name][0])
                assert 0 < one.masks[name][index].float().mean() < 0.3
                close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
                close(one.parameters[name][index], other.parameters[name][0])


@pytest.mark.parametrize("way", ["eager", "recorded"])
def test_masks_of_ones_change_no_number(way):
    def kept(population, share):
        return {}

    plain = replace(loop(epochs=2, optimizer=partial(torch.optim.Adam, fused=True)), way=way)
    one = train(linear(2), splits(), plain, generators(0, 1), select=True)
    other = train(linear(2), splits(), plain, generators(0, 1), select=True, gradual=gradual(kept, until=0))
    check_same(one, other)
    assert one.last.masks == {} and other.last.masks[WEIGHT].all()


def test_what_an_earlier_stage_masked_never_comes_back():
    population = linear(2)
    earlier = torch.rand(2, 2, 36, generator=torch.Generator().manual_seed(1)) < 0.5
    parameters = population.parameters | {WEIGHT: population.parameters[WEIGHT] * earlier}
    pruned = replace(population, parameters=parameters, masks={WEIGHT: earlier})
    masks = Recording(lambda population, share: {} if share < 1 else {WEIGHT: moving(population, 0.5)[WEIGHT]})
    trained = train(pruned, splits(), loop(), generators(0, 1), gradual=gradual(masks)).last
    for _, state, _ in masks.seen:
        assert torch.equal(state.masks[WEIGHT], earlier) and torch.equal(state.parameters[WEIGHT] != 0, earlier)
    assert torch.equal(trained.masks[WEIGHT], earlier & masks.seen[-1][2][WEIGHT])
    assert not trained.parameters[WEIGHT][~trained.masks[WEIGHT]].any() and 0 < trained.masks[WEIGHT].sum() < 60


def test_a_parameter_without_a_new_mask_is_whole_again():
    masks = Recording(lambda population, share: smallest(population, 1) if share < 1 else {})
    trained = train(linear(), splits(), loop(), generators(0), gradual=gradual(masks, until=1, every=4)).last
    assert not masks.seen[-1][1].parameters[WEIGHT].all() and trained.masks[WEIGHT].all()


def test_only_epochs_at_the_final_share_are_selected(monkeypatch):
    data = splits()
    scripted(monkeypatch, [[0.9], [0.95], [0.6], [0.5], [0.7], [0.7]], [[0.5]] * 6, data)
    masks = Recording()
    chosen = train(linear(), data, loop(epochs=5), generators(0), select=True, gradual=gradual(masks, until=0.4))
    assert chosen.selected_epoch == [4] and [row.validation[0] for row in chosen.history][1] == 0.95
    assert torch.equal(chosen.selected.masks[WEIGHT], masks.seen[-1][2][WEIGHT])
    assert torch.equal(chosen.selected.parameters[WEIGHT] != 0, chosen.selected.masks[WEIGHT])


def test_an_epoch_that_ends_with_the_last_change_may_be_selected(monkeypatch):
    data = splits()
    scripted(monkeypatch, [[0.9], [0.95], [0.6], [0.5]], [[0.5]] * 4, data)
    chosen = train(linear(), data, loop(epochs=3), generators(0), select=True, gradual=gradual(until=2 / 3))
    assert chosen.selected_epoch == [2]
    assert (chosen.selected.parameters[WEIGHT] != 0).sum() == 18  # a quarter


def test_a_selected_epoch_keeps_its_own_masks(monkeypatch):
    """By a curve that is at 1 from the start, masks move on; each member keeps those of its own epoch."""
    data = splits()
    scripted(monkeypatch, [[0.9, 0.1], [0.5, 0.5], [0.6, 0.6]], [[0.5, 0.5]] * 3, data)
    masks = Recording(moving)
    plan = gradual(masks, curve="constant", until=1, every=4)
    chosen = train(linear(2), data, loop(), generators(0, 1), select=True, gradual=plan)
    assert chosen.selected_epoch == [0, 2] and len(masks.seen) == 3
    first, last = masks.seen[0][2][WEIGHT], masks.seen[-1][2][WEIGHT]
    assert not torch.equal(first, last)
    assert torch.equal(chosen.selected.masks[WEIGHT], torch.stack([first[0], last[1]]))
    assert torch.equal(chosen.selected.parameters[WEIGHT] != 0, chosen.selected.masks[WEIGHT])
    assert torch.equal(chosen.last.masks[WEIGHT], last)


def test_masks_do_not_hide_divergence():
    """Weights that broke are broken still where masks leave them out; the last good state has its own masks."""
    masks = Recording(lambda population, share: {WEIGHT: population.parameters[WEIGHT].abs() < 1e3})
    once = loop(epochs=1, optimizer=Breaking)
    trained = train(linear(2), splits(), once, generators(0, 1), gradual=gradual(masks, until=1, every=1))
    assert trained.diverged == [None, 1]
    assert not masks.seen[-1][2][WEIGHT][1].any() and trained.last.masks[WEIGHT].all()


def test_no_epoch_at_the_final_share_is_refused_before_anything_trains(monkeypatch):
    monkeypatch.setattr(training, "Step", None)
    plan = gradual(until=0.6, every=3)
    check_gradual(loop(epochs=5), 4, plan)
    check_gradual(loop(epochs=5), 4, plan, stop=3)
    with pytest.raises(ConfigError, match=r"until=0.6 and every=3 .* step 12 of 5 epochs.* stops after epoch 2, at st"):
        check_gradual(loop(epochs=5), 4, plan, stop=2)
    with pytest.raises(ConfigError, match="no epoch ends at the final sparsity"):
        train(linear(), splits(), loop(epochs=5), generators(0), select=True, gradual=plan, stop=2)
    for wrong in (gradual(until=1.5), gradual(until=-0.1), gradual(until=float("nan")), gradual(every=0)):
        with pytest.raises(ConfigError, match=r"until=1.5|until=-0.1|until=nan|every=0"):
            train(linear(), splits(), loop(), generators(0), gradual=wrong)


class Keeping(training.Watcher):
    """Remembers the rows."""

    def __init__(self):
        self.rows = []

    def epoch(self, row):
        self.rows.append(row._replace(seconds=0))


@pytest.mark.parametrize("pruned", [False, True])
def test_stopping_gives_the_state_of_the_whole_schedule_there(pruned, monkeypatch):
    """Bit for bit what the whole run goes on from: its learning rates, orders and draws."""
    from sample_networks import WithDropout

    names = ("hidden.weight",)
    plan = gradual(partial(smallest, names=names), names=names, until=0.75, every=3) if pruned else None
    some = replace(loop(epochs=3), learning_rate=lambda progress: 1e-2 * (1 - progress))
    population = stack([build(WithDropout, (1, 6, 6), 2, 0)])
    add, states = training._Memory.add, {}

    def noted(self, row, population, watcher, **more):
        states[row.epoch] = population.clone()
        add(self, row, population, watcher, **more)

    monkeypatch.setattr(training._Memory, "add", noted)
    whole = Keeping()
    train(population, splits(), some, generators(0), gradual=plan, watcher=whole)
    for stop in (1, 2, 3):
        watcher, expected = Keeping(), states[stop]
        stopped = train(population, splits(), some, generators(0), gradual=plan, stop=stop, watcher=watcher).last
        assert watcher.rows == whole.rows[:stop]
        for part in ("parameters", "buffers", "masks"):
            for name, tensor in getattr(expected, part).items():
                assert torch.equal(getattr(stopped, part)[name], tensor), name


@pytest.mark.parametrize("stop", [0, 3, -1])
def test_stopping_past_the_end_or_before_the_first_epoch_is_refused(stop):
    with pytest.raises(ConfigError, match=f"2 epochs cannot stop after epoch {stop}: take 1 to 2"):
        train(linear(), splits(), loop(), generators(0), stop=stop)
