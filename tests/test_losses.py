"""Loss functions: against torch's own, finite at every scale, and the same for members together and alone."""

import pytest
import torch
from conftest import choices, compose
from torch.nn import functional as F

from sparsity import config, losses
from sparsity.errors import ConfigError
from sparsity.nodes import Loss
from sparsity.stages.training import loss_of

LABELS = torch.arange(12) % 5


def outputs(scale=1.0, members=None):
    torch.manual_seed(0)
    shape = (12, 5) if members is None else (members, 12, 5)
    return torch.randn(shape) * scale


def loss_named(name, *overrides):
    return config.read(compose([f"loss={name}", *overrides])[0], choices={"loss": name}).loss


def test_cross_entropy_is_torchs():
    assert torch.equal(losses.cross_entropy(outputs(), LABELS), F.cross_entropy(outputs(), LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_torchs(smoothing):
    found = losses.label_smoothing(outputs(), LABELS, smoothing=smoothing)
    torch.testing.assert_close(found, F.cross_entropy(outputs(), LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize("name", choices("loss"))
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e36])
def test_every_loss_is_finite_with_its_gradient(name, scale):
    loss = loss_of([loss_named(name)], torch.device("cpu"))
    given = outputs(scale).requires_grad_()
    value = loss.function(outputs=given, labels=LABELS, **{key: number[0] for key, number in loss.numbers.items()})
    value.backward()
    assert value.shape == () and value.isfinite() and given.grad.isfinite().all()


@pytest.mark.parametrize("name", choices("loss"))
def test_every_loss_maps_over_members(name):
    loss = loss_of([loss_named(name)] * 3, torch.device("cpu"))
    given, labels = outputs(members=3), LABELS.repeat(3, 1)

    def one(outputs, labels, numbers):
        return loss.function(outputs=outputs, labels=labels, **numbers)

    together = torch.vmap(one)(given, labels, loss.numbers)
    alone = [one(given[m], LABELS, {key: number[m] for key, number in loss.numbers.items()}) for m in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=label_smoothing", "loss.function.smoothing=1"], "smoothing must be a number ≥ 0 and < 1, got 1"),
        (["loss.function.smoothing=0.1"], "smoothing is no key"),
        (["loss=hinge"], "loss=hinge is no choice: loss has cross_entropy, label_smoothing"),
        (["loss.function._target_=sparsity.losses.nothing"], "is no function of sparsity.losses: it has cross_entropy"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config.read(compose(overrides)[0], typed=overrides)


def test_a_run_says_what_it_was_trained_by(run):
    small = ("model=mlp", "model.factory.hidden=[8]", "plots=false", "stages=[pretrain]")
    plain, smooth = run(*small), run(*small, "loss=label_smoothing")
    assert (plain["name"]["loss"], smooth["name"]["loss"]) == ("cross_entropy", "label_smoothing")
    assert plain["keys"]["pretrain"] != smooth["keys"]["pretrain"]
    assert isinstance(loss_named("label_smoothing", "loss.function.smoothing=0.3"), Loss)


def test_a_loss_of_ones_own_that_gives_no_scalar_is_refused(run, monkeypatch, tmp_path):
    (tmp_path / "own_losses.py").write_text("def each(outputs, labels): return outputs.sum(1)\n")
    monkeypatch.setenv("SPARSITY_TRUST", "own_losses")
    with pytest.raises(ConfigError, match=r"loss.function must give a scalar, got one of shape \[2\]"):
        run("model=mlp", "model.factory.hidden=[8]", "loss.function._target_=own_losses.each")
