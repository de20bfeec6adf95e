"""Members trained together give each what it gets alone, whatever may differ between them."""

from dataclasses import replace

import pytest
import torch
from conftest import choices, some_slow
from test_configs import read

from sparsity import population
from sparsity.errors import DivergedError
from sparsity.experiment import Job, run_members

RULES = some_slow(choices("prune"), "threshold", "group_threshold", "percentile", "group_std")
REGULARIZERS = some_slow(choices("reg"), "none", "l1", "hoyer", "hs", "group_lasso", "transformed_l1")
# Adam would make much of the last bit of a gradient near 0; what is left of it is the sign of a weight near 0
SMALL = ("data=digits", "schedule=smoke", "plots=false", "store=null", "precision=float32")
SMOOTH = (*SMALL, "optimizer=sgd")
SMOOTH += tuple(f"schedule.{stage}.lr=0.05" for stage in ("pretrain", "regularize", "finetune"))
HIGH = {"percentile": 0.9, "threshold": 0.02, "group_threshold": 0.02}


def members(tmp_path, name, *overrides):
    """Three runs that differ in seed, decay and sensitivity, and their results together and alone."""
    base = (*SMOOTH, "model=mlp", "model.factory.hidden=[24,16]", *overrides)
    first = read(*base)
    sensitivity = HIGH.get(first.name["prune"], 0.5)
    runs = [
        read(
            *base,
            f"seed={index}",
            f"sensitivity={sensitivity * (1 + index / 20)}",
            f"reg.decay={first.reg.decay * (index + 1)}",
        )
        for index in range(3)
    ]
    together = run_members(
        [Job(run, tmp_path / "together" / str(index)) for index, run in enumerate(runs)], stacked=True
    )
    alone = [run_members([Job(run, tmp_path / "alone" / str(index))])[0] for index, run in enumerate(runs)]
    return together, alone


def assert_alike(tmp_path, together, alone, atol=1e-3):
    from safetensors.torch import load_file

    for index, (one, other) in enumerate(zip(together, alone)):
        assert one["nonzero"] == other["nonzero"]
        for name in ("dense", "regularized", "pruned", "last", "best"):
            assert one["accuracy"][name]["test"] == pytest.approx(other["accuracy"][name]["test"], abs=0.01)
        for file in ("stages/prune.safetensors", "model.safetensors"):
            left = load_file(tmp_path / "together" / str(index) / file)
            right = load_file(tmp_path / "alone" / str(index) / file)
            for name in left:
                assert torch.equal(left[name] != 0, right[name] != 0), name
                torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_regularizer(tmp_path, name):
    together, alone = members(tmp_path, name, f"reg={name}")
    assert_alike(tmp_path, together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_rule(tmp_path, name):
    together, alone = members(tmp_path, name, f"prune={name}", "prune.exclude=[fc3]")
    # whole units leave entries near 0 behind, of which the penalty's gradient, their sign, makes much
    assert_alike(tmp_path, together, alone, atol=1e-2 if name == "coupled" else 1e-3)
    counts = {str(result["nonzero"]) for result in together}
    assert len(counts) >= (2 if name == "coupled" else 3)  # each has a mask of its own; units are few


@pytest.mark.slow
def test_convolutions(tmp_path):
    overrides = ["model=lenet5", "stages=[pretrain,prune]"]
    runs = [replace(read(*SMALL, *overrides), seed=seed) for seed in (3, 4)]
    together = run_members(
        [Job(run, tmp_path / "together" / str(index)) for index, run in enumerate(runs)], stacked=True
    )
    for index, run in enumerate(runs):
        alone = run_members([Job(run, tmp_path / "alone" / str(index))])[0]
        assert alone["accuracy"]["dense"]["test"] == pytest.approx(
            together[index]["accuracy"]["dense"]["test"], abs=0.01
        )


@pytest.mark.slow
def test_a_member_that_diverges_fails_alone(tmp_path):
    base = (*SMALL, "model=mlp", "model.factory.hidden=[24]", "reg=l1")
    runs = [read(*base, *own) for own in ([], ["reg.decay=1e38"], ["seed=1"])]
    run = runs[0]
    outcomes = run_members([Job(each, tmp_path / str(index)) for index, each in enumerate(runs)], stacked=True)
    assert isinstance(outcomes[1], DivergedError)
    assert "regularize" in str(outcomes[1]) and "reg.decay=1e+38" in str(outcomes[1])
    assert not (tmp_path / "1" / "result.json").exists()
    alone = run_members([Job(run, tmp_path / "alone")])[0]
    assert outcomes[0]["nonzero"] == alone["nonzero"]
    assert outcomes[2]["accuracy"]["final"]["test"] > 0.7


@pytest.mark.slow
def test_members_with_dropout_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_TRUST", "sample_networks")
    overrides = ["model=custom", "model.factory._target_=sample_networks.WithDropout"]
    runs = [replace(read(*SMALL, *overrides), seed=seed) for seed in (0, 1)]
    together = run_members([Job(run, tmp_path / str(seed)) for seed, run in enumerate(runs)])
    again = run_members([Job(runs[1], tmp_path / "again")])[0]
    assert together[1]["accuracy"] == again["accuracy"]


def test_stack_and_member_agree():
    modules = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(3)]
    stacked = population.stack(modules)
    for index, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            assert torch.equal(stacked.state(index)[name], tensor)
            assert torch.equal(stacked.member(index).state(0)[name], tensor)
