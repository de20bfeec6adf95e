"""Loss functions: against torch's own, finite at every scale, and the same for members together and alone."""

import pytest
import torch
from conftest import ROOT, choices, compose, slow
from omegaconf import OmegaConf
from torch.nn import functional as F

from sparsity import config, losses, nodes
from sparsity.errors import ConfigError
from sparsity.nodes import Loss
from sparsity.stages.training import loss_of

LABELS = torch.arange(12) % 5


def outputs(scale=1.0, members=None):
    torch.manual_seed(0)
    shape = (12, 5) if members is None else (members, 12, 5)
    return torch.randn(shape) * scale


def shipped(name, **numbers):
    """The node of a loss, whoever its teacher may be."""
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "loss" / f"{name}.yaml"))
    node.pop("defaults")
    return config.check("loss", {**node, "function": {**node["function"], **numbers}}, nodes.Loss)


def with_teacher(node, scale=1.0, shape=(12, 5)):
    """What a loss is given beside outputs, labels and its numbers."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    return {"teacher": noise} if node.asks_for_teacher else {}


def test_cross_entropy_is_torchs():
    assert torch.equal(losses.cross_entropy(outputs(), LABELS), F.cross_entropy(outputs(), LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_torchs(smoothing):
    found = losses.label_smoothing(outputs(), LABELS, smoothing=smoothing)
    torch.testing.assert_close(found, F.cross_entropy(outputs(), LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.5), (4.0, 0.9), (20.0, 1.0), (3.0, 0.0)])
def test_distillation_is_hintons(temperature, share):
    teacher = with_teacher(shipped("distill"))["teacher"]
    found = losses.distill(outputs(), LABELS, teacher, temperature=temperature, share=share)
    soft = F.softmax(teacher / temperature, 1), F.log_softmax(outputs() / temperature, 1)
    divergence = F.kl_div(soft[1], soft[0], reduction="batchmean") * temperature**2
    torch.testing.assert_close(found, (1 - share) * F.cross_entropy(outputs(), LABELS) + share * divergence)


def test_there_is_nothing_to_learn_from_a_teacher_that_says_the_same():
    """Up to what softmax leaves out, as of networks that end in it and those that do not."""
    given = outputs().requires_grad_()
    value = losses.distill(given, LABELS, outputs().log_softmax(1) + 3, temperature=4.0, share=1.0)
    assert abs(float(value.detach())) < 1e-6 and float(torch.autograd.grad(value, given)[0].abs().max()) < 1e-6


@pytest.mark.parametrize("name", choices("loss"))
def test_every_gradient_is_right_in_double_precision(name):
    node = shipped(name)
    loss, more = loss_of([node], torch.device("cpu")), with_teacher(node)
    named = {key: each.double() for key, each in more.items()}
    named |= {key: number[0].double() for key, number in loss.numbers.items()}
    function = lambda outputs: loss.function(outputs=outputs, labels=LABELS, **named)  # noqa: E731
    assert torch.autograd.gradcheck(function, outputs().double().requires_grad_())


@pytest.mark.parametrize("name", choices("loss"))
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e36])
def test_every_loss_is_finite_with_its_gradient(name, scale):
    node = shipped(name)
    loss, more = loss_of([node], torch.device("cpu")), with_teacher(node, scale)
    given = outputs(scale).requires_grad_()
    named = {key: number[0] for key, number in loss.numbers.items()}
    value = loss.function(outputs=given, labels=LABELS, **named, **more)
    value.backward()
    assert value.shape == () and value.isfinite() and given.grad.isfinite().all()


@pytest.mark.parametrize("name", choices("loss"))
def test_every_loss_maps_over_members(name):
    floats = [key for key, number in shipped(name).function.numbers.items() if isinstance(number, float)]
    members = [shipped(name, **dict.fromkeys(floats, 0.2 + 0.3 * member)) for member in range(3)]
    loss = loss_of(members, torch.device("cpu"))
    given, labels = outputs(members=3), LABELS.repeat(3, 1)
    named = loss.numbers | with_teacher(members[0], shape=(3, 12, 5))

    def one(outputs, labels, named):
        return loss.function(outputs=outputs, labels=labels, **named)

    together = torch.vmap(one)(given, labels, named)
    alone = [one(given[m], LABELS, {key: each[m] for key, each in named.items()}) for m in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=label_smoothing", "loss.function.smoothing=1"], "smoothing must be a number ≥ 0 and < 1, got 1"),
        (["loss.function.smoothing=0.1"], "smoothing is no key"),
        (["loss=hinge"], "loss=hinge is no choice: loss has cross_entropy, distill, label_smoothing"),
        (
            ["loss=distill"],
            "loss.teacher is missing: distill learns from the outputs of a trained network: give the fo",
        ),
        (["loss=distill", "loss.function.temperature=0"], "loss.function.temperature must be a number ≥ 0.01 and ≤ 10"),
        (["loss=distill", "loss.function.share=1.1"], "loss.function.share must be a number ≥ 0 and ≤ 1, got 1.1"),
        (["loss=distill", "loss.function.teacher=1"], "teacher"),
        (["loss=distill", "loss.teacher=3"], "loss.teacher must be text, got 3"),
        (
            ["loss=distill", "loss.teacher=nowhere"],
            "loss.teacher=nowhere is not there: give the folder of a run, or a ",
        ),
        (["loss.teacher_model=lenet5"], "a choice of a group is typed model@loss.teacher_model=lenet5"),
        *slow((["model@loss.teacher_model=lenet5"], "loss.teacher_model does nothing without loss.teacher=FILE: give")),
        (["loss.function._target_=sparsity.losses.nothing"], "is no function of sparsity.losses: it has cross_entropy"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.read(compose(overrides)[0], typed=overrides)


@pytest.mark.slow
def test_a_run_says_what_it_was_trained_by(run):
    small = ("model=mlp", "model.factory.hidden=[8]", "plots=false", "stages=[pretrain]")
    plain, smooth = run(*small), run(*small, "loss=label_smoothing")
    assert (plain["name"]["loss"], smooth["name"]["loss"]) == ("cross_entropy", "label_smoothing")
    assert plain["keys"]["pretrain"] != smooth["keys"]["pretrain"]
    assert (plain["training"], smooth["training"]) == ({}, {"loss": "label_smoothing"})
    assert isinstance(shipped("label_smoothing", smoothing=0.3), Loss)


def test_a_loss_of_ones_own_that_gives_no_scalar_is_refused(run, monkeypatch, tmp_path):
    (tmp_path / "own_losses.py").write_text("def each(outputs, labels): return outputs.sum(1)\n")
    monkeypatch.setenv("SPARSITY_TRUST", "own_losses")
    with pytest.raises(ConfigError, match=r"loss.function must give a scalar, got one of shape \[2\]"):
        run("model=mlp", "model.factory.hidden=[8]", "loss.function._target_=own_losses.each")
