"""The training loop: masks hold, epochs are selected on validation, divergence is caught, runs repeat bit for bit."""

from dataclasses import replace
from functools import partial

import pytest
import sample_networks
import torch
from conftest import slow

from sparsity import training
from sparsity.data import Images, Splits
from sparsity.evaluation import evaluate
from sparsity.models import build
from sparsity.nodes import Average
from sparsity.population import Population, stack
from sparsity.schedules import learning_rate
from sparsity.stages.regularizing import total_penalty
from sparsity.step import Loss, Penalty, try_step
from sparsity.training import Loop, train


def splits(num=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = (images.float().mean((1, 2, 3)) > 127).long()
    part = Images(images, labels)
    return Splits(part, part.take(torch.arange(20)), part.take(torch.arange(num - 20, num)), 2)


def network(seed=0):
    factory = partial(sample_networks.Normalised, width=4)
    return build(factory, (1, 6, 6), 2, seed)


def loop(epochs=2, lr=1e-2, optimizer=torch.optim.Adam, **more):
    rate = partial(learning_rate, lr=lr, shape="constant", warmup=0.0)
    return Loop(epochs, 16, rate, partial(optimizer, lr=lr, **more))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def linear(num_members=1):
    return stack([build(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)), (1, 6, 6), 2, seed)
                  for seed in range(num_members)])  # fmt: skip


def test_one_member_is_what_a_plain_loop_computes():
    population, data = linear(), splits()
    trained = train(population, data, loop(), generators(3)).last
    module = torch.nn.Linear(36, 2)
    module.load_state_dict({"weight": population.parameters["1.weight"][0], "bias": population.parameters["1.bias"][0]})
    optimizer, generator = torch.optim.Adam(module.parameters(), lr=1e-2), generators(3)[0]
    for _ in range(2):
        for index in torch.randperm(64, generator=generator).split(16):
            optimizer.zero_grad()
            outputs = module(data.train.images[index].flatten(1).float() / 255)
            torch.nn.functional.cross_entropy(outputs, data.train.labels[index]).backward()
            optimizer.step()
    torch.testing.assert_close(trained.parameters["1.weight"][0], module.weight.detach())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_pruned_entries_stay_exactly_zero(optimizer):
    population = linear()
    mask = torch.rand(1, 2, 36, generator=torch.Generator().manual_seed(1)) < 0.3
    parameters = {**population.parameters, "1.weight": population.parameters["1.weight"] * mask}
    pruned = Population(population.module, population.layouts, parameters, {}, {"1.weight": mask})
    for more in ({}, {"weight_decay": 0.1}):
        weight = train(pruned, splits(), loop(optimizer=optimizer, **more), generators(0)).last.parameters["1.weight"]
        assert torch.equal(weight[~mask], torch.zeros_like(weight[~mask]))
        assert (weight[mask] != parameters["1.weight"][mask]).all()


def test_a_penalty_moves_no_pruned_entry():
    population = linear()
    mask = torch.rand(1, 2, 36, generator=torch.Generator().manual_seed(1)) < 0.3
    parameters = {**population.parameters, "1.weight": population.parameters["1.weight"] * mask}
    pruned = replace(population, parameters=parameters, masks={"1.weight": mask})
    function = total_penalty(lambda view: (view - 1).square().sum(), population.layouts, ["1.weight"])
    penalty = Penalty(function, torch.tensor([0.1]), {})
    weight = train(pruned, splits(), loop(), generators(0), penalty=penalty).last.parameters["1.weight"]
    assert not weight[~mask].any() and (weight[mask] > parameters["1.weight"][mask]).float().mean() > 0.9


def test_training_leaves_its_argument_alone():
    population = stack([network()])
    before = population.clone()
    train(population, splits(), loop(), generators(0))
    for name in before.parameters:
        assert torch.equal(population.parameters[name], before.parameters[name])
    for name in before.buffers:
        assert torch.equal(population.buffers[name], before.buffers[name])


def test_batch_normalisation_keeps_statistics_of_each_member():
    members = [network(0), network(1)]
    plain = loop(optimizer=torch.optim.SGD)  # Adam would blow up the noise in the gradient of a bias before a norm
    together = train(stack(members), splits(), plain, generators(5, 6)).last
    for index, module in enumerate(members):
        alone = train(stack([module]), splits(), plain, generators(5 + index)).last
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            torch.testing.assert_close(together.buffers[name][index], alone.buffers[name][0], rtol=1e-4, atol=1e-5)
        assert together.buffers["norm.num_batches_tracked"][index] == 8


def test_same_seed_same_bits_and_another_seed_others():
    def weights(seed):
        return train(stack([network()]), splits(), loop(), generators(seed)).last.parameters["first.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_dropout_repeats_too():
    module = build(sample_networks.WithDropout, (1, 6, 6), 2, 0)
    state = torch.get_rng_state()
    weights = [train(stack([module]), splits(), loop(), generators(0)).last.parameters["out.weight"] for _ in range(2)]
    assert torch.equal(*weights)
    assert torch.equal(state, torch.get_rng_state())


def test_decay_multiplies_the_penalty_and_members_have_their_own():
    population = linear(2)
    function = total_penalty(lambda view: view.square().sum(), population.layouts, ["1.weight"])
    penalty = Penalty(function, torch.tensor([0.0, 10.0]), {})
    trained = train(population, splits(), loop(epochs=5), generators(0, 0), penalty=penalty)
    weight = trained.last.parameters["1.weight"]
    assert weight[1].abs().mean() < 0.3 * weight[0].abs().mean()
    row = trained.history[-1]
    assert row.objective == pytest.approx([row.loss[0], row.loss[1] + 10 * row.penalty[1]], rel=1e-5)


def test_selection_takes_the_earliest_best_validation_epoch():
    trained = train(linear(), splits(), loop(epochs=6, lr=0.05), generators(0), select=True)
    validation = [row.validation[0] for row in trained.history]
    assert [row.epoch for row in trained.history] == list(range(7))
    assert trained.selected_epoch == [validation.index(max(validation))]
    data = splits()
    assert evaluate(trained.selected, data.validation, data) == [max(validation)]
    assert evaluate(trained.last, data.validation, data) == [validation[-1]]


def scripted(monkeypatch, validation, test, data):
    """Has evaluation give these accuracies, one row an epoch and one entry a member."""
    rows = {id(data.validation): iter(validation), id(data.test): iter(test)}
    monkeypatch.setattr(training, "evaluate", lambda population, part, splits, at_once: next(rows[id(part)]))


def test_selection_is_on_validation_and_takes_the_earliest_of_equals(monkeypatch):
    population, data = linear(2), splits()
    scripted(monkeypatch, [[0.5, 0.5], [0.7, 0.4], [0.7, 0.6], [0.6, 0.6]], [[0.1, 0.1]] * 3 + [[0.9, 0.9]], data)
    chosen = train(population, data, loop(epochs=3), generators(3, 4), select=True)
    assert chosen.selected_epoch == [1, 2]
    for epochs, member in ((1, 0), (2, 1)):
        then = train(population, replace(data, validation=None), loop(epochs=epochs), generators(3, 4)).last
        assert torch.equal(chosen.selected.parameters["1.weight"][member], then.parameters["1.weight"][member])


def test_what_has_diverged_is_not_selected(monkeypatch):
    population, data = linear(2), splits()
    scripted(monkeypatch, [[0.5, 0.5], [0.6, 0.9], [0.7, 0.9]], [[0.5, 0.5]] * 3, data)
    function = total_penalty(lambda view: view.square().sum(), population.layouts, ["1.weight"])
    penalty = Penalty(function, torch.tensor([0.0, 3e38]), {})
    chosen = train(population, data, loop(), generators(0, 0), penalty=penalty, select=True)
    assert chosen.diverged == [None, 1] and chosen.selected_epoch == [2, 0]
    assert torch.equal(chosen.selected.parameters["1.weight"][1], population.parameters["1.weight"][1])


class Breaking(torch.optim.SGD):
    """An optimizer that breaks the weights of one member."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter[1].fill_(torch.inf)


def test_weights_that_are_not_finite_are_divergence_whatever_the_loss_was():
    population, once = linear(2), replace(loop(epochs=1, optimizer=Breaking), batch_size=64)  # one batch
    trained = train(population, splits(), once, generators(0, 1))
    assert trained.diverged == [None, 1] and torch.tensor(trained.history[0].objective).isfinite().all()
    assert torch.equal(trained.last.parameters["1.weight"][1], population.parameters["1.weight"][1])
    assert not torch.equal(trained.last.parameters["1.weight"][0], population.parameters["1.weight"][0])


class Noisy(torch.nn.Module):
    """Draws one number a batch, whatever the images and their order."""

    def __init__(self, num_classes):
        super().__init__()
        self.out = torch.nn.Linear(36, num_classes)

    def forward(self, images):
        return self.out(images.flatten(1)) * torch.rand(1)


def test_what_a_module_draws_follows_from_its_members_seed():
    population = stack([build(Noisy, (1, 6, 6), 2, 0)])
    whole = Loop(3, 64, loop().learning_rate, partial(torch.optim.SGD, lr=1e-2))  # the order changes only roundings
    one, same, other = (
        train(population, splits(), whole, generators(seed)).last.parameters["out.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and (one - other).abs().max() > 1e-4


def test_the_learning_rate_moves_with_every_batch():
    asked = []
    rated = replace(loop(), learning_rate=lambda progress: asked.append(progress) or 1e-3)
    train(linear(), splits(), rated, generators(0))
    assert asked == [index / 8 for index in range(8)]


def test_an_epochs_loss_is_the_mean_over_its_images():
    population, data = linear(2), splits(40)  # batches of 16, 16 and 8
    still = replace(loop(epochs=1, optimizer=torch.optim.SGD), learning_rate=lambda progress: 0.0)
    losses = train(population, data, still, generators(0, 1)).history[0].loss
    for member, loss in enumerate(losses):
        weight, bias = (population.parameters[f"1.{name}"][member] for name in ("weight", "bias"))
        outputs = torch.nn.functional.linear(data.train.images.flatten(1).float() / 255, weight, bias)
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(outputs, data.train.labels).item(), rel=1e-5)


def test_without_validation_nothing_is_selected():
    data = splits()
    data = Splits(data.train, None, data.test, 2)
    trained = train(linear(), data, loop(), generators(0), select=True)
    assert trained.selected_epoch is None and trained.selected is trained.last
    assert trained.history[-1].validation is None and trained.history[-1].test is not None


def test_divergence_ends_training_and_keeps_the_last_good_state():
    population = linear()
    trained = train(population, splits(), loop(epochs=50, lr=1e38, optimizer=torch.optim.SGD), generators(0))
    assert trained.diverged[0] is not None and len(trained.history) == trained.diverged[0]
    assert all(tensor.isfinite().all() for tensor in trained.last.parameters.values())


def test_zero_epochs_change_nothing():
    population = linear()
    trained = train(population, splits(), loop(epochs=0), generators(0), select=True)
    assert torch.equal(trained.selected.parameters["1.weight"], population.parameters["1.weight"])
    assert trained.selected_epoch == [0]


def test_evaluation_counts_what_a_plain_loop_counts():
    data, module = splits(), network()
    images = data.test.images.float() / 255
    expected = (module.eval()(images).argmax(1) == data.test.labels).float().mean().item()
    assert evaluate(stack([module, module]), data.test, data) == pytest.approx([expected] * 2)


def test_bfloat16_trains_float32_weights():
    rate = partial(learning_rate, lr=1e-2, shape="constant", warmup=0.0)
    half = Loop(2, 16, rate, partial(torch.optim.Adam, lr=1e-2), precision=torch.bfloat16)
    weight = train(linear(), splits(), half, generators(0)).last.parameters["1.weight"]
    whole = train(linear(), splits(), loop(), generators(0)).last.parameters["1.weight"]
    assert weight.dtype is torch.float32 and not torch.equal(weight, whole)
    torch.testing.assert_close(weight, whole, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_learning_rates(shape):
    rate = partial(learning_rate, lr=2.0, shape=shape, warmup=0.25)
    assert rate(0.0) == 0 and rate(0.125) == pytest.approx(1.0) and rate(0.25) == pytest.approx(2.0)
    assert rate(1.0) == pytest.approx(2.0 if shape == "constant" else 0.0)
    assert rate(0.625) == pytest.approx({"constant": 2.0}.get(shape, 1.0))
    assert learning_rate(0.0, lr=2.0, shape=shape, warmup=0.0) == 2.0


def test_a_last_batch_of_one_joins_the_one_before():
    data = splits(33)
    assert [batch.labels.shape[1] for batch in data.train.batches(torch.arange(33)[None], 16)] == [16, 17]
    trained = train(stack([network()]), data, loop(), generators(0)).last
    assert trained.buffers["norm.num_batches_tracked"].item() == 4


class Odd(torch.nn.Module):
    """A frozen layer, an unused one, and a parameter without axes."""

    def __init__(self, num_classes):
        super().__init__()
        self.frozen, self.unused = torch.nn.Linear(36, 8), torch.nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.out = torch.nn.Linear(8, num_classes)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return self.scale * self.out(self.frozen(images.flatten(1)).relu())


@pytest.mark.parametrize("num_members", [1, 2])
def test_frozen_unused_and_scalar_parameters(num_members):
    population = stack([build(Odd, (1, 6, 6), 2, seed) for seed in range(num_members)])
    masks = {"unused.weight": torch.ones_like(population.parameters["unused.weight"], dtype=torch.bool)}
    population = replace(population, masks=masks)
    trained = train(population, splits(), loop(), generators(*range(num_members))).last
    assert torch.equal(trained.parameters["frozen.weight"], population.parameters["frozen.weight"])
    for name in ("out.weight", "frozen.bias", "scale"):
        assert not torch.equal(trained.parameters[name], population.parameters[name]), name


def test_a_tied_weight_is_saved_under_each_name():
    class Tied(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.one, self.two = torch.nn.Linear(36, 36), torch.nn.Linear(36, 36)
            self.two.weight = self.one.weight
            self.out = torch.nn.Linear(36, num_classes)
            self.register_buffer("passing", torch.ones(3), persistent=False)

        def forward(self, images):
            return self.out(self.two(self.one(images.flatten(1)).relu()).relu())

    module = build(Tied, (1, 6, 6), 2, 0)
    trained = train(stack([module]), splits(), loop(), generators(0)).last
    state = trained.state(0)
    assert state.keys() == module.state_dict().keys()
    assert torch.equal(state["one.weight"], state["two.weight"])


def test_lazy_modules_are_drawn_by_their_seed():
    def lazy():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))

    one, same, other = (stack([build(lazy, (1, 6, 6), 2, seed)]).parameters["1.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_cannot_be_mapped_over_members_is_found_out():
    class Functional(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.out = torch.nn.Linear(36, num_classes)

        def forward(self, images):
            return torch.nn.functional.dropout(self.out(images.flatten(1)), 0.5, self.training)

    members = [build(Functional, (1, 6, 6), 2, seed) for seed in (0, 1)]
    try_step(stack(members[:1]), splits(), torch.float32)
    with pytest.raises(RuntimeError):
        try_step(stack(members), splits(), torch.float32)


def averaged(kind, start=0.0, decay=0.9, epochs=3, **more):
    plan = replace(loop(epochs), average=Average(kind, start, decay))
    return train(stack([network()]), splits(), plan, generators(0), **more)


def test_the_mean_is_that_of_the_weights_after_each_of_the_last_epochs():
    each = [train(stack([network()]), splits(), loop(4), generators(0), stop=stop).last for stop in range(1, 5)]
    found = averaged("mean", start=0.5, epochs=4).last
    for key, value in found.parameters.items():
        torch.testing.assert_close(value, (each[2].parameters[key] + each[3].parameters[key]) / 2)
    key = next(key for key, buffer in found.buffers.items() if buffer.is_floating_point())
    torch.testing.assert_close(found.buffers[key], (each[2].buffers[key] + each[3].buffers[key]) / 2)


def test_an_average_that_forgets_is_moved_at_every_step(monkeypatch):
    seen, run = [], training._run_epoch
    monkeypatch.setattr(
        training._Averaging, "after",
        lambda self, done, plain=training._Averaging.after: (
            seen.append({name: p.detach().clone() for name, p in self.population.parameters.items()}), plain(self, done)
        ),
    )  # fmt: skip
    found = averaged("ema", decay=0.7, epochs=2).last
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.7 * value + 0.3 * now[name] for name, value in expected.items()}
    assert len(seen) == 8 and run is training._run_epoch
    for key, value in found.parameters.items():
        torch.testing.assert_close(value, expected[key])


def test_training_goes_on_from_the_weights_and_not_from_their_average():
    plain = train(stack([network()]), splits(), loop(3), generators(0))
    found = averaged("mean", start=0.5)
    assert [row.loss for row in found.history] == [row.loss for row in plain.history]
    assert not torch.equal(next(iter(found.last.parameters.values())), next(iter(plain.last.parameters.values())))


def test_what_is_masked_has_an_average_of_zero():
    population = stack([network()])
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in population.parameters.items() if p.ndim > 2}
    parameters = {name: p * masks[name] if name in masks else p for name, p in population.parameters.items()}
    population = replace(population, parameters=parameters, masks=masks)
    plan = replace(loop(3), average=Average("ema", 0.0, 0.9))
    found = train(population, splits(), plan, generators(0), select=True)
    for state in (found.last, found.selected):
        assert all(not state.parameters[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("way", ["eager", "recorded", *slow("compiled")])
def test_a_decay_rises_from_nothing_over_its_share_of_training(way):
    """Of a penalty that is the sum of the weights: plain descent moves each weight by rate · decay a step."""
    population = linear(3)
    names = ["1.weight"]
    function = total_penalty(lambda view: view.sum(), population.layouts, names)
    decay, rise = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.0, 0.5, 1.0])
    plan = replace(loop(2, optimizer=torch.optim.SGD, fused=True), way=way)
    none = Loss(lambda outputs, labels: outputs.sum() * 0)
    penalty = Penalty(function, decay, {}, rise)
    trained = train(population, splits(), plan, generators(0, 1, 2), loss=none, penalty=penalty)
    moved = (population.parameters["1.weight"] - trained.last.parameters["1.weight"]).mean((1, 2))
    steps = torch.arange(8) / 8  # the share of training before each of eight steps
    shares = torch.stack([torch.ones(8), (steps / 0.5).clamp(max=1), steps]).sum(1)
    torch.testing.assert_close(moved, 0.1 * 1e-2 * shares, rtol=1e-3, atol=1e-7)
    assert decay.tolist() == pytest.approx([0.1] * 3)
