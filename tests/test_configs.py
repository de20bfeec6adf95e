"""Every YAML composes and builds; every mistake in a config is one line that names the key, the value, the remedy."""

import subprocess
import sys

import pytest
from conftest import ROOT, choices, slow

from sparsity import config
from sparsity.errors import ConfigError

GROUPS = [path.name for path in sorted((ROOT / "conf").iterdir()) if path.is_dir() and path.name != "hydra"]
CHOICES = [(group, choice) for group in GROUPS for choice in choices(group)]
NEEDED = {("model", "custom"): ["model.factory._target_=sparsity.models.lenet300"]}


def read(*overrides):
    composed, hydra = config.compose(overrides)
    return config.read(composed, trust=config.admitted(overrides), choices=hydra.runtime.choices)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_is_valid(group, choice):
    run = read(f"{group}={choice}", *NEEDED.get((group, choice), []))
    assert run.name[group] == choice


def test_defaults():
    run = read()
    names = {"model": "lenet300", "data": "mnist", "reg": "hs", "prune": "std", "schedule": "fast", "optimizer": "adam"}
    assert names.items() <= run.name.items()
    assert run.stages == ["pretrain", "regularize", "prune", "finetune"]


def test_paper_schedule_is_the_reference():
    schedule = read("schedule=paper").schedule
    assert (schedule.batch_size, schedule.pretrain.epochs, schedule.regularize.epochs) == (100, 250, 250)
    assert (schedule.finetune.epochs, schedule.finetune.lr, schedule.pretrain.lr) == (100, 1e-4, 1e-3)
    assert read("schedule=paper", "reg=hs").schedule.regularize.weight_decay == 0
    assert read("schedule=paper", "reg=group_hs").schedule.regularize.weight_decay == 1e-4


def test_layers_of_their_own_need_no_plus():
    run = read("prune.layers.fc3=0.1", "prune.layers.features.0=0.2", "prune.exclude=[fc1]")
    assert run.prune.layers == {"fc3": 0.1, "features.0": 0.2}
    assert run.prune.exclude == ["fc1"]


MISTAKES = [
    (["sensitivity=-1"], "sensitivity must be a number ≥ 0, got -1"),
    (["prune=percentile", "sensitivity=1.5"], "sensitivity must be a number ≥ 0 and ≤ 1, got 1.5"),
    (["reg.decay=nan"], "reg.decay must be a number ≥ 0, got nan"),
    (["reg.decay=inf"], "reg.decay must be a number ≥ 0, got inf"),
    (["reg.decay=abc"], "reg.decay must be a number ≥ 0, got 'abc'"),
    (["reg.decay=true"], "reg.decay must be a number ≥ 0, got True"),
    (["schedule.finetune.epochs=-3"], "schedule.finetune.epochs must be a whole number ≥ 0, got -3"),
    (["schedule.finetune.epochs=1.5"], "schedule.finetune.epochs must be a whole number ≥ 0, got 1.5"),
    (["schedule.batch_size=0"], "schedule.batch_size must be a whole number ≥ 1, got 0"),
    (["schedule.pretrain.lr=0"], "schedule.pretrain.lr must be a number > 0, got 0"),
    (["schedule.pretrain.shape=square"], "schedule.pretrain.shape must be one of constant, linear, cosine"),
    (["seed=-1"], "seed must be a whole number ≥ 0"),
    (["stages=[prune,regularize]"], "stages must be in the order"),
    (["stages=[prune,prune]"], "stages must be in the order"),
    (["stages=[prune]"], r"stages=\[prune\] needs a trained network: give model.weights=FILE"),
    (["stages=[]"], "needs a trained network"),
    (["stages=[train]"], r"stages\[0\] must be one of pretrain"),
    (["stages=prune"], r"stages must be a list, got 'prune': write stages="),
    (["model=custom"], "model.factory._target_ has no value"),
    (["model=mlp", "model.factory.hidden=[0]"], r"model.factory.hidden\[0\] must be a whole number ≥ 1, got 0"),
    (["+model.factory.hiden=[3]"], "model.factory.hiden is no setting"),
    (["+foo=1"], "foo is no setting"),
    (["~schedule.finetune.lr"], "schedule.finetune.lr is missing"),
    (["reg=transformed_l1", "reg.penalty.a=0"], "reg.penalty.a must be a number > 0, got 0"),
    (["reg=transformed_l1", "~reg.penalty.a"], "reg.penalty.a is missing"),
    (["reg.apply_to=[filter]"], r"reg.apply_to\[0\] must be one of weight, bias, normalization, scale, other"),
    (["prune.layers.fc1=-1"], "prune.layers.fc1 must be a number ≥ 0, got -1"),
    (["prune.layers.fc1=1", "prune.exclude=[fc1]"], "prune.layers.fc1 does nothing, as prune.exclude names fc1 too"),
    (["stages=[pretrain,prune]", "schedule.pretrain.epochs=0"], "nothing is trained before pruning"),
    (["prune.rule._target_=sparsity.regularizers.l1"], "is no pruning rule: it takes no sensitivity"),
    (["+model.factory.input_shape=[1,2,3]"], "model.factory.input_shape is passed by the pipeline"),
    (["threads=99999999"], "threads must be a whole number ≥ 1 and ≤ 1024, got 99999999"),
    (["schedule.batch_size=100000000000000000000"], "schedule.batch_size must be a whole number ≥ 1, and below"),
    (["precision=float8"], "precision must be one of auto, float32, bfloat16"),
    (["data.validation=-1"], "data.validation must be a number ≥ 0, got -1"),
    (["data.validation=1.5"], "data.validation must be a share below 1 or a whole number of images, got 1.5"),
    (["objectives=[speed]"], r"objectives\[0\] must be one of accuracy, compression, macs, nonzero"),
    (["+optimizer.foo=1"], "optimizer.foo is no setting"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["os.system", "sparsity.data.os.system", "builtins.eval", "collections.OrderedDict"])
def test_code_from_outside_is_refused(target):
    with pytest.raises(ConfigError, match=f"model.factory._target_={target}"):
        read("model=custom", f"model.factory._target_={target}")


def test_trust_comes_from_the_command_line_or_the_environment(monkeypatch):
    target = ["model=custom", "model.factory._target_=collections.OrderedDict"]
    assert read(*target, "trust=[collections]").model.factory.function.__name__ == "OrderedDict"
    monkeypatch.setenv("SPARSITY_TRUST", "collections")
    assert read(*target).model.factory.target == "collections.OrderedDict"


def test_trust_in_a_yaml_is_refused():
    composed, _ = config.compose(["trust=[collections]"])
    with pytest.raises(ConfigError, match=r"trust=\[collections\] stands in a YAML"):
        config.read(composed)


def test_settings_that_do_nothing_are_named():
    overrides = ["stages=[pretrain]", "reg.decay=1e-3", "sensitivity=0.1", "schedule.finetune.epochs=3"]
    lines = config.idle_settings(read(*overrides), overrides)
    assert [line.split()[0] for line in lines] == ["reg.decay", "sensitivity", "schedule.finetune.epochs"]
    assert config.idle_settings(read("reg=none", "reg.decay=1"), ["reg=none", "reg.decay=1"])
    assert not config.idle_settings(read("sensitivity=0.1"), ["sensitivity=0.1"])


@pytest.mark.parametrize(
    "yaml",
    [
        "hydra: {job: {env_set: {SPARSITY_TRUST: collections}}}",
        *slow('hydra: {overrides: {task: ["trust=[collections]"]}}\ntrust: [collections]'),
    ],
)
def test_no_yaml_admits_code(tmp_path, yaml):
    (tmp_path / "experiment").mkdir()
    target = "model: {factory: {_target_: collections.OrderedDict}}"
    (tmp_path / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{yaml}\n{target}\n")
    arguments = ["main.py", "--config-dir", str(tmp_path), "experiment=evil", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "code from outside" in done.stderr or "stands in a YAML" in done.stderr


def test_directions_follow_from_objectives():
    _, hydra = config.compose(["search=pareto", "objectives=[macs,accuracy]"])
    assert hydra.sweeper.direction == ["minimize", "maximize"]
