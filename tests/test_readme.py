"""What the README shows works as it stands there."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from sparsity import config

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_adding_a_regularizer_takes_one_function_and_one_yaml(tmp_path):
    function = re.search(r"```python\n(def capped_l1.*?)```", README, re.DOTALL)[1]
    yaml = re.search(r"```yaml\n(decay.*?)```", README, re.DOTALL)[1]
    for name in ("conf", "sparsity", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "sparsity" / "regularizers.py").open("a") as file:
        file.write(f"\n\n{function}")
    (tmp_path / "conf" / "reg" / "capped_l1.yaml").write_text(yaml)

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, said = python("-m", "pytest", "-n0", "-k", "capped_l1", "tests/test_methods.py", "tests/test_configs.py")
    assert status == 0 and int(re.search(r"(\d+) passed", said)[1]) > 40, said
    small = ("data=digits", "schedule=smoke", "plots=false", "threads=1", "store=null")
    status, said = python("main.py", "reg=capped_l1", "reg.penalty.cap=0.05", *small)
    assert status == 0, said
    status, said = python("main.py", "reg=capped_l1", "reg.penalty.cap=0", *small)
    assert status == 2 and said.splitlines()[1:] == ["reg.penalty.cap must be a number > 0, got 0"], said
    assert "capped_l1" in python("main.py", "--help")[1]


def test_every_choice_is_in_the_table():
    for group in (
        "model",
        "data",
        "reg",
        "prune",
        "schedule",
        "optimizer",
        "loss",
        "augment",
        "quantize",
        "recipe",
        "search",
        "experiment",
    ):
        row = re.search(rf"^\| `{group}` \|([^|]*)\|", README, re.MULTILINE)[1]
        assert sorted(re.findall(r"`(\w+)`", row)) == sorted(
            path.stem for path in (ROOT / "conf" / group).glob("*.yaml")
        )
    for part in (ROOT / "conf" / "prune").glob("*/"):
        row = re.search(rf"^\| `prune/{part.name}` \|([^|]*)\|", README, re.MULTILINE)[1]
        assert {path.stem for path in part.glob("*.yaml")} <= {*re.findall(r"`(\w+)`", row)}


def test_the_picture_is_there_and_small():
    (name,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    content = (ROOT / name).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 150_000


def commands():
    """What the README types after `python main.py`, without comments and what stands for something else."""
    lines = re.findall(r"^ +python main\.py([^#\n]*)", README, re.MULTILINE)
    return [shlex.split(line.replace("--cfg job", "")) for line in lines if line.strip()]


def test_commands_are_overrides():
    found = [[text for text in typed if not text.startswith("-")] for typed in commands()]
    assert len(found) > 10 and all(config.count_members(typed) != 0 for typed in found)
    first = found[0]  # the picture's
    assert config.count_members(first) == 12 and config.swept_keys(first) == ["reg.decay", "sensitivity"]


@pytest.mark.slow
def test_commands_compose():
    for typed in commands():
        if not {"--help", "--config-dir"} & set(typed) and "model=custom" not in typed:
            settings = [text for text in typed if not text.startswith("-")]
            config.compose([text for text in settings if not config.swept_keys([text])])


def test_the_recipe_that_it_shows_is_one(tmp_path):
    yaml = re.search(r"```yaml\n(# @package _global_\ndefaults: \[standard\].*?)```", README, re.DOTALL)[1]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "tuned_twice.yaml").write_text(yaml)
    where = [f"hydra.searchpath=[file://{tmp_path}]", "recipe=tuned_twice", "schedule.finetune.lr=0.5"]
    composed, hydra = config.compose(where)
    run = config.read(composed, choices=hydra.runtime.choices, typed=where)
    assert [stage.name for stage in run.recipe] == ["pretrain", "prune", "finetune", "prune-2", "finetune-2", "polish"]
    assert run.recipe[2].call.numbers["schedule"].lr == 0.5 and run.recipe[-1].call.numbers["schedule"].epochs == 5
