"""What is tried before training, what fails alone, and what a run that came to little ends with."""

import json
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import compose, slow
from test_launcher import run_jobs
from test_training import generators, linear, splits
from torch import nn
from torch.nn.utils import parametrizations

from sparsity import config
from sparsity.data import cut
from sparsity.errors import SparsityError, StageError
from sparsity.experiment.checks import batch_sizes
from sparsity.experiment.closing import closing_lines
from sparsity.population import stack
from sparsity.schedules import learning_rate
from sparsity.step import is_elementwise, is_finite, try_step
from sparsity.tensors import normalised
from sparsity.training import Loop, train

SMALL = ("model=mlp", "model.factory.hidden=[8]", "plots=false", "threads=1")


# --- networks of a user's own ----------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Batch normalisation, which needs two images to train on."""

    def __init__(self, num_classes):
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.out(self.norm(self.hidden(images.flatten(1))).relu())


class Squeezing(nn.Linear):
    """Gives one image's outputs without the axis of the batch."""

    def __init__(self, num_classes):
        super().__init__(784, num_classes)

    def forward(self, images):
        return super().forward(images.flatten(1)).squeeze()


class Normed(nn.Module):
    """A weight that torch makes anew in every pass."""

    def __init__(self, num_classes, how="weight_norm"):
        super().__init__()
        self.hidden = getattr(parametrizations, how)(nn.Linear(784, 8))
        self.out = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.out(self.hidden(images.flatten(1)).relu())


class Lengths(nn.Module):
    """A weight that is divided by its own rows' lengths, by hand."""

    def __init__(self, num_classes):
        super().__init__()
        self.direction, self.out = nn.Parameter(torch.randn(8, 784)), nn.Linear(8, num_classes)

    def forward(self, images):
        weight = self.direction / self.direction.square().sum(1, keepdim=True).sqrt()
        return self.out(F.linear(images.flatten(1), weight).relu())


class Scaled(nn.Module):
    """A weight of the network itself: one factor for each pixel."""

    def __init__(self, num_classes):
        super().__init__()
        self.factor, self.out = nn.Parameter(torch.full((28, 28), 1e-6)), nn.Linear(784, num_classes)

    def forward(self, images):
        return self.out((images * self.factor).flatten(1))


class Failing(nn.Module):
    """Fails in training where its seed says so, after a few batches."""

    def __init__(self, num_classes):
        super().__init__()
        self.out = nn.Linear(784, num_classes)
        self.register_buffer("left", torch.tensor(3 if self.out.bias[0] < -0.015 else 10**6))

    def forward(self, images):
        if self.training:
            self.left -= 1
            if self.left.item() < 0:
                raise RuntimeError("the user's module\nbroke")
        return self.out(images.flatten(1))


def own(name, *more):
    target = ("model=custom", f"model.factory._target_=test_closing.{name}", "trust=[test_closing]", "plots=false")
    return (*target, "threads=1", *more)


# --- before training -------------------------------------------------------------------------------------------------


def test_batch_sizes_are_those_that_are_cut():
    for num_images in range(1, 24):
        for batch_size in range(1, 8):
            sizes = {len(batch) for batch in cut(torch.empty(num_images), batch_size)}
            assert set(batch_sizes(num_images, batch_size)) == sizes, (num_images, batch_size)


def test_a_batch_is_tried_at_its_size():
    population = stack([nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.BatchNorm1d(2))])
    buffers = {name: buffer.clone() for name, buffer in population.buffers.items()}
    try_step(population, splits(), torch.float32, 16)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        try_step(population, splits(), torch.float32, 1)
    assert all(torch.equal(population.buffers[name], buffer) for name, buffer in buffers.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (own("Flat", "schedule.batch_size=1"), "schedule.batch_size=1: the model cannot train on a batch of 1 image: "),
        (own("Normed"), "hidden.parametrizations.weight.original1 cannot be pruned or penalised: "
         "torch.nn.utils.parametrizations.weight_norm makes"),
        (own("Normed", "+model.factory.how=orthogonal", "reg=none"), "leave it out by prune.exclude=[hidden]"),
        (own("Normed", "stages=[regularize]"), "take reg=none"),
        (own("Lengths", "reg=none"), "direction cannot be pruned: without one of its outputs the network gives NaN"),
    ],
    ids=["one image", "weight_norm", "orthogonal", "penalty", "by hand"],
)  # fmt: skip
def test_what_cannot_be_trained_or_pruned_is_refused(run, tmp_path, overrides, message):
    with pytest.raises(SparsityError) as error:
        run(*overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run0" / "stages").exists()


@pytest.mark.slow
def test_normalised_weights_may_be_left_out_or_only_trained(run):
    result = run(*own("Normed", "reg=none", "prune.exclude=[hidden]", "stages=[pretrain,prune]"))
    assert {row["name"]: row["kind"] for row in result["layers"]}["hidden.parametrizations.weight.original0"] == "scale"
    assert result["total"]["weights"] == 784 * 8 + 80


@pytest.mark.slow
def test_a_set_of_one_image_is_tried_as_such(run):
    with pytest.raises(SparsityError, match=r"Squeezing on one image, as the validation set is, does not fit the data"):
        run(*own("Squeezing", "data.validation=1"))


def test_every_normalisation_of_torch_is_known():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    modules = {
        "weight_v": old,
        "weight_orig": nn.utils.spectral_norm(nn.Linear(3, 2)),
        "parametrizations.weight.original1": parametrizations.weight_norm(nn.Conv2d(2, 3, 1)),
        "parametrizations.weight.original": parametrizations.spectral_norm(nn.Linear(3, 2)),
    }
    for name, module in modules.items():
        assert list(normalised(module)) == [name] and list(normalised(nn.Sequential(module))) == [f"0.{name}"]
        assert normalised(module)[name].startswith("torch.nn.utils.")
    assert normalised(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))) == {}


def test_gradients_that_are_not_finite_are_found():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 36))

        def forward(self, images):
            return F.linear(images.flatten(1), self.weight.square().sum().sqrt() + self.weight)

    images = torch.rand(2, 1, 6, 6)
    assert not is_finite(stack([Root()]), images) and is_finite(linear(), images)


# --- zeros -----------------------------------------------------------------------------------------------------------


class Noisy(torch.optim.SGD):
    """Moves what has no gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3 * torch.randn_like(parameter))


OWN = [Noisy, partial(Noisy, fused=True, momentum=0.9), partial(torch.optim.Adafactor, weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", OWN, ids=["eager", "recorded", "adafactor"])
@pytest.mark.parametrize("num_members", [1, 2])
def test_masked_entries_stay_under_an_optimizer_of_ones_own(optimizer, num_members):
    population = linear(num_members)
    mask = torch.rand(num_members, 2, 36, generator=torch.Generator().manual_seed(1)) < 0.3
    parameters = {**population.parameters, "1.weight": population.parameters["1.weight"] * mask}
    pruned = stack([population.module])
    pruned = type(pruned)(population.module, population.layouts, parameters, {}, {"1.weight": mask})
    rate = partial(learning_rate, lr=1e-2, shape="constant", warmup=0.0)
    loop = Loop(2, 16, rate, partial(optimizer, lr=1e-2), way="recorded")  # where it is fused
    weight = train(pruned, splits(), loop, generators(*range(num_members))).last.parameters["1.weight"]
    assert not weight[~mask].any() and (weight[mask] != parameters["1.weight"][mask]).all()
    assert not is_elementwise(optimizer([torch.zeros(2, 2, requires_grad=True)], lr=1e-2))


@pytest.fixture
def zero_head(tmp_path):
    """Weights of which the last layer is all zero."""
    module = nn.ModuleDict({"fc1": nn.Linear(784, 8), "fc2": nn.Linear(8, 10)})
    for parameter in module["fc2"].parameters():
        parameter.data.zero_()
    torch.save(module.state_dict(), tmp_path / "given.pth")
    return f"model.weights={tmp_path}/given.pth"


@pytest.mark.slow
def test_zeros_that_were_given_are_named_and_not_blamed_on_the_rule(run, zero_head):
    result = run(*SMALL, zero_head, "stages=[prune,finetune]", "prune=threshold", "sensitivity=0")
    assert not any("pruned all of" in line for line in result["warnings"])
    (line,) = [line for line in result["warnings"] if "all zero before finetune, which holds zeros" in line]
    assert "fc2.weight, fc2.bias cannot learn" in line


@pytest.mark.slow
def test_a_layer_that_the_rule_takes_is_blamed_once(run, zero_head):
    rule = ("prune=threshold", "sensitivity=0", "prune.layers.fc1.weight=100")
    result = run(*SMALL, zero_head, "stages=[prune,finetune]", *rule)
    assert [line for line in result["warnings"] if "prune.layers.fc1.weight=100 pruned all of fc1.weight" in line]
    (line,) = [line for line in result["warnings"] if "all zero before" in line]
    assert "fc1" not in line


@pytest.mark.slow
def test_the_remedy_names_a_parameter_of_the_network_itself(run, tmp_path):
    torch.save(Scaled(10).state_dict(), tmp_path / "given.pth")
    rule = ("prune=threshold", "sensitivity=1e-3", "prune.exclude=[out]")
    result = run(*own("Scaled", "stages=[prune]", f"model.weights={tmp_path}/given.pth", *rule))
    (line,) = [line for line in result["warnings"] if "pruned all of factor" in line]
    assert line.endswith("by prune.layers.factor")


# --- a member that fails ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, *slow(False)])
def test_a_member_that_fails_takes_no_other_down(tmp_path, stacked):
    overrides = ("data=digits", "schedule=smoke", "store=null", *own("Failing", "stages=[pretrain]", "reg=none"))
    found = run_jobs(
        tmp_path, overrides, [(f"seed={seed}",) for seed in range(4)], trust=["test_closing"], stacked=stacked
    )
    failed = [isinstance(each, Exception) for each in found]
    assert any(failed) and not all(failed)
    for number, outcome in enumerate(found):
        if failed[number]:
            assert isinstance(outcome, StageError) and str(outcome) == "pretrain: RuntimeError: the user's module broke"
            failure = json.loads((tmp_path / str(number) / "failure.json").read_text())
            assert failure["error"] == str(outcome)
        else:
            assert len(outcome) == 2


# --- the end of a run ------------------------------------------------------------------------------------------------


STANDARD = ("pretrain", "regularize", "prune", "finetune")
DID = {"pretrain": [], "regularize": ["penalized"], "prune": ["masked"], "finetune": ["selected"]}


def ended(final, compression=10.0, weights=None, reg=True, stages=STANDARD, **more):
    """The lines of a run whose stages came to some accuracies; given: that of its weights."""
    overrides = [f"stages=[{','.join(stages)}]", "sensitivity=0.3", *(["reg.decay=0.5"] if reg else ["reg=none"])]
    overrides += [f"model.weights={weights}"] if weights else []
    trained = [name for name in STANDARD if name != "prune"]
    overrides += [text for name in trained for text in (f"schedule.{name}.lr=0.1", f"schedule.{name}.epochs=5")]
    run = config.read(compose(overrides)[0])
    each = {"pretrain": 0.97, "regularize": 0.96, "prune": 0.5, "finetune": final, **more}
    measured = [
        {"name": name, "did": DID[name], "accuracy": {"validation": None, "test": each[name]}} for name in stages
    ]
    given = {"validation": None, "test": more["given"]} if weights else None
    return closing_lines(run, given, measured, compression, torch.arange(1000) % 10)


@pytest.mark.parametrize(("accuracy", "num_lines"), [(1.0, 0), (0.5, 1)])
def test_all_right_is_better_than_chance_of_two_images_too(accuracy, num_lines):
    stages = [{"name": "pretrain", "did": [], "accuracy": {"test": accuracy}}]
    run = config.read(compose(["stages=[pretrain]"])[0])
    assert len(closing_lines(run, None, stages, None, torch.tensor([0, 1]))) == num_lines


def of_rounds(accuracies, *overrides, compression=10.0):
    """The lines of a run of two rounds whose stages came to some accuracies, in order."""
    run = config.read(compose(["recipe=iterative", "rounds=2", *overrides])[0], typed=overrides)
    measured = [
        {"name": stage.name, "did": DID[stage.node], "accuracy": {"validation": None, "test": accuracy}}
        for stage, accuracy in zip(run.recipe, accuracies, strict=True)
    ]
    return closing_lines(run, None, measured, compression, torch.arange(1000) % 10)


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.1], ["is 10.00%: lower sensitivity=0.1 or reg.decay=0.0001"]),
        (
            [0.97, 0.96, 0.1, 0.9, 0.1, 0.1, 0.1],
            ["since regularize-2; lower reg.decay=0.0001 or schedule.regularize.lr"],
        ),
        (
            [0.97, 0.96, 0.1, 0.9, 0.9, 0.5, 0.1],
            ["since finetune-2; lower schedule.finetune.lr=", "or lower sensitivity"],
        ),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], ["since pretrain; lower schedule.pretrain.lr="]),
        ([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.5], ["pruning cost most of the accuracy, 96.00% before and 50.00% now"]),
    ],
)
def test_of_several_rounds_the_one_that_did_it_is_named(accuracies, words):
    (line,) = of_rounds(accuracies)
    assert all(each in line for each in words), line
    assert "budget.compression=9" in of_rounds([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.1], "budget.compression=9")[0]
    assert of_rounds([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.95]) == []


@pytest.mark.parametrize(
    ("budget", "less", "more"),
    [
        ("compression", "lower budget.compression=9", "raise budget.compression=9"),
        ("nonzero", "raise budget.nonzero=9", "lower budget.nonzero=9"),
        ("macs", "raise budget.macs=9", "lower budget.macs=9"),
        ("macs_reduction", "lower budget.macs_reduction=9", "raise budget.macs_reduction=9"),
    ],
)
def test_a_budget_is_turned_the_way_that_helps(budget, less, more):
    assert less in of_rounds([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.1], f"budget.{budget}=9")[0]
    assert less in of_rounds([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.5], f"budget.{budget}=9")[0]
    assert more in of_rounds([0.97] * 7, f"budget.{budget}=9", compression=1.0)[0]
    both = of_rounds([0.97, 0.96, 0.1, 0.9, 0.9, 0.1, 0.5], f"budget.{budget}=9", "budget.nonzero=8")[0]
    assert less.replace("nonzero=9", "nonzero=8") in both and "raise budget.nonzero=8" in both


def test_a_good_run_ends_without_a_word():
    assert ended(0.96) == [] and ended(0.6) == [] and ended(0.96, reg=False, compression=1.06) == []


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (
            {"pretrain": 0.1, "regularize": 0.1, "prune": 0.1},
            "lower schedule.pretrain.lr=0.1, or raise schedule.pretrain.epochs=5",
        ),
        ({"regularize": 0.1, "prune": 0.1}, "since regularize; lower reg.decay=0.5 or schedule.regularize.lr=0.1"),
        ({"regularize": 0.1, "prune": 0.1, "reg": False}, "since regularize; lower schedule.regularize.lr=0.1"),
        ({"prune": 0.1}, "lower sensitivity=0.3 or reg.decay=0.5"),
        ({"compression": None, "prune": 0.1}, "lower sensitivity=0.3 or reg.decay=0.5"),
        ({}, "since finetune; lower schedule.finetune.lr=0.1"),
        ({"weights": "my.pth", "given": 0.1, "prune": 0.1, "stages": ("prune", "finetune")}, "model.weights=my.pth"),
    ],
)
def test_chance_names_the_stage_and_its_key(more, key):
    (line,) = ended(0.095, **more)
    assert (
        line.startswith("the network is no better than chance, 9.50% where one class always is 10.00%") and key in line
    )


def test_what_pruning_cost_and_what_it_did_not_do():
    (line,) = ended(0.4)
    assert (
        line
        == "pruning cost most of the accuracy, 96.00% before and 40.00% now: lower sensitivity=0.3 or reg.decay=0.5"
    )
    (line,) = ended(0.96, compression=1.02, reg=False)
    assert line == "hardly anything is pruned, 2.0% of the weights: raise sensitivity=0.3"


@pytest.mark.slow
def test_a_run_at_chance_ends_with_a_line(run, caplog):
    with caplog.at_level(logging.INFO):
        result = run(*SMALL, "stages=[pretrain]", "schedule.pretrain.lr=100", "optimizer=adam")
    assert "lower schedule.pretrain.lr=100" in result["warnings"][-1]
    assert caplog.messages[-1] == f"warning: {result['warnings'][-1]}"
