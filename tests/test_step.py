"""A step that is recorded and replayed is the step itself, bit for bit; a compiled one up to the order of additions."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import sample_networks
import torch
from conftest import choices
from test_training import generators, network, splits

from sparsity import capture, config
from sparsity.models import build
from sparsity.population import stack
from sparsity.schedules import learning_rate
from sparsity.stages import total_penalty
from sparsity.step import Penalty
from sparsity.training import Loop, train

NETWORKS = {
    "normalised": network,
    "dropout": partial(build, sample_networks.WithDropout, (1, 6, 6), 2),
    "linear": partial(build, lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)), (1, 6, 6), 2),
}


def optimizer(name):
    composed, _ = config.compose([f"optimizer={name}"])
    return partial(config.read(composed).optimizer.partial(), lr=1e-2, weight_decay=1e-3)


def trained(way, members, optimize="adam", masked=False, name="hs"):
    population = stack(members)
    if masked:
        generator = torch.Generator().manual_seed(0)
        masks = {key: torch.rand(p.shape, generator=generator) < 0.5 for key, p in population.parameters.items()}
        population = replace(population, masks=masks)
    composed, _ = config.compose([f"reg={name}"])
    call = config.read(composed).reg.penalty
    numbers = {key: torch.full((len(members),), value) for key, value in call.numbers.items()}
    names = [key for key, layout in population.layouts.items() if layout.kind != "normalization"]
    function = total_penalty(call.function, population.layouts, names)
    penalty = Penalty(function, torch.linspace(1e-4, 1e-3, len(members)), numbers)
    rate = partial(learning_rate, lr=1e-2, shape="cosine", warmup=0.1)
    loop = Loop(3, 10, rate, optimizer(optimize), way=way)
    return train(population, splits(), loop, generators(*range(len(members))), penalty=penalty, select=True)


def check_same(one, other, close=torch.equal):
    for part in ("parameters", "buffers"):
        for name, tensor in getattr(one.last, part).items():
            assert close(tensor, getattr(other.last, part)[name]), name
    assert [row.validation for row in one.history] == [row.validation for row in other.history]


@pytest.fixture
def replays(monkeypatch):
    """How often something was recorded, and whether compiled."""
    found = []
    recorded, compiled = capture.recorded, capture._compiled
    monkeypatch.setattr(capture, "recorded", lambda *given: found.append("recorded") or recorded(*given))
    monkeypatch.setattr(capture, "_compiled", lambda graph: found.append("compiled") or compiled(graph))
    return found


@pytest.mark.parametrize("optimize", choices("optimizer"))
@pytest.mark.parametrize(("name", "num_pieces"), [("normalised", 4), ("dropout", 3)])
def test_a_recorded_step_is_the_step(name, num_pieces, optimize, replays):
    members = [NETWORKS[name](seed=0)]
    masked = name == "normalised"
    eager, recorded = (trained(way, members, optimize=optimize, masked=masked) for way in ("eager", "recorded"))
    check_same(eager, recorded)
    # gradients of a whole batch and of the last, smaller one; penalty, apart where there are convolutions; optimizer
    assert replays == ["recorded"] * num_pieces


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in choices("reg") if name != "none"])
def test_members_together_are_recorded_too(name, replays):
    members = [network(seed=0), network(seed=1)]
    eager, recorded = (trained(way, members, name=name, optimize="sgd") for way in ("eager", "recorded"))
    check_same(eager, recorded)
    assert replays == ["recorded"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize(("name", "num_compiled"), [("linear", 1), ("normalised", 1)])
def test_a_compiled_step_is_the_step(name, num_compiled, num_members, replays):
    members = [NETWORKS[name](seed=seed) for seed in range(num_members)]
    eager, compiled = (trained(way, members, optimize="sgd") for way in ("eager", "compiled"))
    close = partial(torch.allclose, rtol=1e-3, atol=1e-5)
    check_same(eager, compiled, close)
    assert replays.count("compiled") == num_compiled


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    class Branches(sample_networks.WithDropout):
        def forward(self, images):
            hidden = self.hidden(images.flatten(1))
            return self.out(hidden.relu() if hidden.sum() > 0 else hidden)

    members = [build(Branches, (1, 6, 6), 2, 0)]
    with caplog.at_level(logging.DEBUG):
        check_same(*(trained(way, members) for way in ("eager", "recorded")))
    assert "is not recorded" in caplog.text


def test_a_machine_without_a_compiler_records(monkeypatch, caplog):
    def refuse(graph, **options):
        def call(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    check_same(*(trained(way, [NETWORKS["linear"](seed=0)]) for way in ("eager", "compiled")))
    assert "the step is not compiled" in caplog.text and "no C++ compiler" in caplog.text


def test_an_optimizer_that_is_not_fused_is_not_recorded(replays, monkeypatch):
    monkeypatch.setitem(globals(), "optimizer", lambda name: partial(torch.optim.RMSprop, lr=1e-2))
    check_same(*(trained(way, [network()]) for way in ("eager", "recorded")))
    assert replays == []


def test_modules_of_others_may_branch():
    from torchvision.models import resnet18

    assert capture.is_known(resnet18()) and capture.is_known(build(partial(torch.nn.Linear, 3, 2), (3,), 2, 0))
    assert not capture.is_known(network())
