"""The command line, as typed: exit status, one line on stderr, sweeps."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, slow

MLP = (
    "data=digits",
    "schedule=smoke",
    "model=mlp",
    "model.factory.hidden=[20]",
    "plots=false",
    "threads=1",
    "store=null",
)


def main(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_help_explains_the_groups():
    done = main("--help")
    assert done.returncode == 0
    for line in (
        "model: custom, lenet300, lenet5, mlp, resnet20, torchvision",
        "prune: coupled, group_std, group_threshold",
    ):
        assert line in done.stdout


@pytest.mark.slow
def test_a_run(tmp_path):
    done = main(*MLP, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "after finetune" in done.stdout and "compression" in done.stdout.splitlines()[-1]
    for stage in ("pretrain", "regularize", "finetune"):
        assert f"{stage:<10} epoch 2/2 | loss" in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["threads"] == 1 and str(tmp_path) in done.stdout


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / "result.json").write_text("before")
    done = main(*MLP, "sensitivity=-1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == "sensitivity must be a number ≥ 0, got -1: prune=std\n"
    assert done.stdout.startswith("model=mlp data=digits reg=hs prune=std | ") and done.stdout.count("\n") == 1
    assert (tmp_path / "result.json").read_text() == "before"


@pytest.mark.slow
def test_a_mistake_in_full_on_request(tmp_path):
    done = main(*MLP, "sensitivity=-1", f"hydra.run.dir={tmp_path}", HYDRA_FULL_ERROR="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=lenet6"], "model=lenet6 is no choice: did you mean model=lenet5? model has custom, lenet300, "),
        *slow(
            (["reg.deacy=1"], "reg.deacy is no key: did you mean reg.decay?"),
            (["search=pareto"], "search=pareto needs a sweep: add -m"),
            (["seed=[1"], "seed=[1 cannot be read: a bracket is not closed"),
            (["trust=[os"], "trust=[os cannot be read: a bracket is not closed"),
            (["--mutlirun"], "--mutlirun is no option: did you mean --multirun?"),
            (["--help", "model=lenet6"], "model=lenet6 is no choice: did you mean model=lenet5?"),
        ),
    ],
)
def test_what_composition_refuses(arguments, line, tmp_path):
    done = main(*arguments, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    full = main(*arguments, f"hydra.run.dir={tmp_path}", HYDRA_FULL_ERROR="1")
    assert full.returncode == 2 and line in full.stderr and "Traceback" in full.stderr


@pytest.mark.slow
def test_a_grid_and_a_member_that_fails(tmp_path):
    done = main(*MLP, "-m", "stages=[pretrain,prune]", "schedule.pretrain.lr=1e-3,1e30", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2 and "the loss became NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "0" / "result.json").exists() and not (tmp_path / "1" / "result.json").exists()


@pytest.mark.slow
def test_a_search(tmp_path):
    studies = f"hydra.sweeper.storage=sqlite:///{tmp_path}/studies.db"
    done = main(*MLP, "-m", "search=pareto", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path}", studies)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / str(index) / "result.json").read_text()) for index in range(3)]
    assert len({result["config"]["reg"]["decay"] for result in results}) == 3
    refused = main(*MLP, "-m", "search=pareto", "data.validation=0", f"hydra.sweep.dir={tmp_path / 'no'}", studies)
    assert refused.returncode == 2 and "data.validation=0 leaves search=pareto nothing to select on" in refused.stderr


@pytest.mark.slow
def test_real_mnist(tmp_path, mnist_root):
    arguments = [
        "store=null",
        "schedule.pretrain.epochs=2",
        "schedule.regularize.epochs=3",
        "schedule.finetune.epochs=1",
    ]
    done = main(*arguments, f"hydra.run.dir={tmp_path}", f"data.root={mnist_root}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"]["dense"]["test"] > 0.96
    assert result["accuracy"]["selected"]["test"] > 0.95 and result["compression"]["weights"] > 2
