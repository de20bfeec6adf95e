"""On a GPU: what is trained there is what is trained anywhere, and a captured step is the step, bit for bit."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import choices
from test_augmentation import run as augmented
from test_rules import FOR_FILTERS, IMPORTANCES, UNITS
from test_step import check_same, trained
from test_teachers import taught, turned
from test_training import generators, linear, loop, network, splits

from sparsity import capture, models
from sparsity.data import Images, sets
from sparsity.evaluation import evaluate
from sparsity.experiment.machine import machine
from sparsity.population import stack
from sparsity.training import Gradual, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = "cuda:0"
WAYS = ("eager", "recorded")


@pytest.fixture(autouse=True)
def as_training_wants_it():
    with machine(1):
        yield


@pytest.fixture
def captured(monkeypatch):
    """What was captured; that something could not be is an error."""
    found = []
    capturing = capture.CudaGraphs.capture
    monkeypatch.setattr(capture.CudaGraphs, "capture", lambda *given: found.append(given) or capturing(*given))
    return found


@pytest.mark.parametrize("optimize", choices("optimizer"))
@pytest.mark.parametrize("num_members", [1, 3])
def test_a_captured_step_is_the_step(num_members, optimize, captured, caplog):
    members = [network(seed=seed) for seed in range(num_members)]
    recorded = trained("recorded", members, optimize=optimize, masked=True, device=GPU)
    assert len(captured) == 2 and not caplog.records  # of whole batches, and of the last, smaller one
    check_same(trained("eager", members, optimize=optimize, masked=True, device=GPU), recorded)


@pytest.mark.parametrize("way", ["eager", "recorded"])
def test_dropout_repeats_there(way):
    from test_step import NETWORKS

    one, other = (trained(way, [NETWORKS["dropout"](seed=0)], device=GPU) for _ in range(2))
    check_same(one, other)


@pytest.mark.parametrize("name", ["lenet300", "lenet5"])
def test_members_together_are_members_alone(name):
    members = [models.build(getattr(models, name), (1, 28, 28), 10, seed=seed) for seed in range(5)]
    images = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = Images(images, torch.arange(200) % 10)
    data = replace(splits(), train=part, validation=None, test=part, num_classes=10).to(GPU)
    run = partial(train, splits=data, loop=replace(loop(1, optimizer=torch.optim.SGD, fused=True), way="recorded"))
    together = run(stack(members, GPU), generators=generators(*range(5))).last
    for seed in range(5):
        alone = run(stack([members[seed]], GPU), generators=generators(seed)).last
        for key, value in alone.parameters.items():
            assert float((together.parameters[key][seed] - value[0]).norm() / value.norm()) < 1e-4, key


def test_there_and_here_are_the_same_up_to_rounding():
    data = splits()
    there = train(linear(3).to(GPU), data.to(GPU), loop(1, optimizer=torch.optim.SGD), generators(0, 1, 2)).last
    here = train(linear(3), data, loop(1, optimizer=torch.optim.SGD), generators(0, 1, 2)).last
    for key, value in here.parameters.items():
        torch.testing.assert_close(there.parameters[key].cpu(), value)


def test_masks_that_change_are_read_by_a_captured_step(captured):
    def half(population, share):
        p = population.parameters["1.weight"]
        return {"1.weight": p.abs() >= p.abs().flatten(1).quantile(share / 2, dim=1).view(-1, 1, 1)}

    gradual = Gradual(half, ["1.weight"], lambda progress: progress, 0.5, 2)
    results = []
    for way in ("eager", "recorded"):
        plan = replace(loop(6, optimizer=torch.optim.Adam, fused=True), way=way)
        results.append(train(linear(2).to(GPU), splits().to(GPU), plan, generators(0, 1), gradual=gradual))
    assert captured
    check_same(*results)
    assert [int((each != 0).sum()) for each in results[1].last.parameters["1.weight"]] == [36, 36]


def test_a_set_too_large_for_the_gpu_trains_the_same(monkeypatch):
    plan = replace(loop(3, optimizer=torch.optim.Adam, fused=True), way="recorded")
    resident = train(linear(2).to(GPU), splits().to(GPU), plan, generators(0, 1))
    monkeypatch.setattr(sets, "free_bytes", lambda device: 0)
    data = splits().to(GPU)
    assert data.train.images.device.type == "cpu"
    check_same(resident, train(linear(2).to(GPU), data, plan, generators(0, 1)))


def test_accuracy_is_what_is_counted_here():
    population, data = stack([network(seed) for seed in range(3)]), splits()
    assert evaluate(population.to(GPU), data.to(GPU).test, data.to(GPU)) == evaluate(population, data.test, data)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def captures(run, caplog):
    """Runs the pipeline there, every step captured."""
    caplog.set_level(logging.WARNING)

    def on_gpu(*overrides):
        result = run(f"device={GPU}", "step=recorded", *overrides)
        assert torch.device(result["environment"]["device"]).type == torch.device(GPU).type
        assert "cannot be recorded" not in caplog.text
        return result

    return on_gpu


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_runs_there(recipe, captures):
    least = {"at_init": 0.15, "rigl": 0.15, "set": 0.15, "adapted": 0.15}  # of two epochs at high sparsity
    assert captures(f"recipe={recipe}")["accuracy"]["final"]["test"] > least.get(recipe, 0.3)


@pytest.mark.parametrize("reg", choices("reg"))
def test_every_regularizer_runs_there(reg, captures):
    assert captures(f"reg={reg}", "prune=threshold")["accuracy"]["final"]["test"] > 0.3


@pytest.mark.parametrize("prune", choices("prune"))
def test_every_rule_leaves_there_about_what_it_leaves_here(prune, captures, run):
    there, here = captures(f"prune={prune}"), run(f"prune={prune}", "device=cpu", "precision=float32")
    assert there["nonzero"]["weights"] == pytest.approx(here["nonzero"]["weights"], rel=0.02)


@pytest.mark.parametrize("prune", [name for name in choices("prune") if name != "n_of_m"])
def test_a_budget_is_met_there(prune, captures):
    result = captures("budget.compression=10", f"prune={prune}", "recipe=magnitude")
    assert result["compression"]["weights"] >= 10


@pytest.mark.parametrize("name", [name for name in IMPORTANCES if name not in FOR_FILTERS])
def test_every_importance_scores_there(name, captures):
    result = captures("prune=percentile", f"prune/importance={name}", "recipe=magnitude", "budget.compression=5")
    assert result["compression"]["weights"] == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("unit", [name for name in UNITS if name != "head"])  # of which LeNet-5 has none
def test_every_unit_goes_there(unit, captures):
    result = captures("prune=percentile", f"prune/unit={unit}", "model=lenet5", "sensitivity=0.5")
    assert result["compression"]["weights"] > 1.2


@pytest.mark.parametrize("name", [name for name in choices("augment") if name != "none"])
def test_a_captured_step_augments_anew(name, captured, caplog):
    results = [augmented(name, [network(seed=seed) for seed in range(2)], range(2), way, 4, GPU) for way in WAYS]
    assert captured and "cannot be recorded" not in caplog.text
    check_same(*results)


@pytest.mark.parametrize("augment", [None, turned])
def test_a_captured_step_learns_from_a_teacher(augment, captured, caplog):
    members = [network(seed=seed) for seed in range(2)]
    results = [taught(members, way, augment, GPU, epochs=4) for way in WAYS]
    assert captured and "cannot be recorded" not in caplog.text
    check_same(*results)


def test_a_decay_that_rises_and_weights_that_are_averaged(captures):
    one, other = (captures("reg.rise=0.5", "average.kind=ema", "augment=digits", "model=lenet5") for _ in range(2))
    assert one["accuracy"] == other["accuracy"] and one["accuracy"]["final"]["test"] > 0.5


def test_a_run_repeats_there_bit_for_bit(captures):
    one, other = (captures("model=lenet5", "reg=group_hs") for _ in range(2))
    for key in ("accuracy", "nonzero", "macs", "keys"):
        assert one[key] == other[key]
    assert one["files"]["model.safetensors"] == other["files"]["model.safetensors"]
