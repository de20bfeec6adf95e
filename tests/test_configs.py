"""Every YAML composes and builds; every mistake in a config is one line that names the key, the value, the remedy."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, choices, compose, slow
from omegaconf import OmegaConf
from safetensors.torch import save_file

from sparsity import config
from sparsity.errors import ConfigError

GROUPS = [path.name for path in sorted((ROOT / "conf").iterdir()) if path.is_dir() and path.name != "hydra"]
CHOICES = [(group, choice) for group in GROUPS for choice in choices(group)]
KNOWN = ("reg", "prune", "recipe")  # quick tests of their own read these, whatever is added
QUICK = [(group, choice) for group, choice in CHOICES if group not in KNOWN and choice == choices(group)[0]]
NEEDED = {("model", "custom"): ["model.factory._target_=sparsity.models.lenet300"]}


def read(*overrides, compose=compose):
    composed, hydra = compose(overrides)
    return config.read(composed, trust=config.admitted(overrides), choices=hydra.runtime.choices, typed=overrides)


@pytest.mark.parametrize(("group", "choice"), [*QUICK, *slow(*(pair for pair in CHOICES if pair not in QUICK))])
def test_every_yaml_composes_and_is_valid(group, choice, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_file({"weight": torch.zeros(1)}, weights)
    needed = [f"loss.teacher={weights}"] if choice == "distill" else []
    run = read(f"{group}={choice}", *NEEDED.get((group, choice), needed))
    assert run.name[group] == choice


def test_defaults():
    run = read()
    names = {"model": "lenet300", "data": "mnist", "reg": "hs", "prune": "std", "schedule": "fast", "optimizer": "adam"}
    assert names.items() <= run.name.items()
    assert run.stages == ["pretrain", "regularize", "prune", "finetune"]


@pytest.mark.slow
def test_paper_schedule_is_the_reference():
    assert read("schedule=paper").schedule.batch_size == 100
    pretrain, regularize, finetune = schedules("schedule=paper")
    assert (pretrain.epochs, regularize.epochs, finetune.epochs) == (250, 250, 100)
    assert (finetune.lr, pretrain.lr) == (1e-4, 1e-3)
    assert schedules("schedule=paper", "reg=hs")[1].weight_decay == 0
    assert schedules("schedule=paper", "reg=group_hs")[1].weight_decay == 1e-4


def schedules(*overrides):
    """Those of the training stages in order."""
    stages = [stage.call.numbers for stage in read(*overrides).recipe]
    assert all(numbers["batch_size"] == 100 for numbers in stages if "schedule" in numbers)
    return [numbers["schedule"] for numbers in stages if "schedule" in numbers]


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
    (["stages=[prune]"], r"stages=\[prune\] needs a trained network: give model.weights=FILE"),
    (["stages=[]"], "needs a trained network"),
    (["stages=[prune,prune]"], r"stages=\[prune,prune\] needs a trained network: .* or begin with pretrain"),
    (["stages=[finetune,pretrain]"], "needs a trained network"),
    (["stages=[train]"], "stages names 'train', which recipe=standard lacks: did you mean pretrain"),
    (["stages=pretrain"], "stages must be a list"),
    (["stages=[{repeat:0,stages:[prune]}]"], "repeat in stages must be a whole number from 1 to 1,000, got 0"),
    (["stages=[{repeat:1000000,stages:[prune]}]"], "repeat in stages must be a whole number from 1 to 1,000"),
    (["stages=[{repeat:600,stages:[pretrain,prune]}]"], "stages lists 1,200 stages, 1,000 at most"),
    (["stages=[{repeat:2,stages:[{repeat:2,stages:[pretrain]}]}]"], "and no other repeat"),
    (["stages=[{times:2,stages:[pretrain]}]"], "stages holds names and {repeat: 3"),
    (["recipe=lottery", "rounds=0"], "rounds must be a whole number ≥ 1 and ≤ 1000, got 0"),
    (["recipe=lottery", "rewind_to=finetune"], "rewind_to=finetune names a state that is not there before rewind"),
    (["recipe=lottery", "rewind_to=pretrain@11"], "rewind_to=pretrain@11 names no epoch of pretrain: it has 1 to 10"),
    (["recipe=lottery", "rewind_to=pretrain@0"], "names no epoch of pretrain"),
    (["recipe=lottery", "rewind_to=prune@1"], "names no epoch of prune: it has none, as it trains nothing"),
    (["recipe=lottery", "rewind_to=start@1"], "names a state that is not there"),
    (["recipe.regularize.schedule.epochs=7"], "type schedule.regularize.epochs=7"),
    (["recipe.prune.rule.layers.fc1=0.1"], "type prune.layers.fc1=0.1"),
    (["recipe.prune._target_=os.system"], "recipe.prune._target_=os.system"),
    (["recipe.prune._target_=sparsity.stages.trian"], "did you mean sparsity.stages.train"),
    (["+recipe.prune.strength=3"], "recipe.prune.strength is no setting"),
    (["budget.compression=50", "sensitivity=0.3"], "budget.compression takes the place of sensitivity"),
    (["budget.compression=0.5"], "budget.compression must be a number ≥ 1, got 0.5"),
    (["budget.nonzero=0"], "budget.nonzero must be a whole number ≥ 1, got 0"),
    (["budget.macs=5", "stages=[pretrain]"], "budget.macs=5 needs a stage that prunes"),
    (["budget={compression:50}", "sensitivity=0.3"], "budget.compression takes the place of sensitivity"),
    (["sensitivity=null"], "prune prunes by no number: give sensitivity=NUMBER, or a budget such as"),
    (
        ["recipe=gradual", "schedule.regularize.epochs=0"],
        "schedule.regularize.epochs=0 leaves train no step to prune in",
    ),
    (["recipe=gradual", "recipe.train.every=null"], "recipe.train.every is missing: train prunes while it trains"),
    (["recipe=gradual", "recipe.train.curve.until=0"], "recipe.train.curve.until must be a number > 0 and ≤ 1, got 0"),
    (["recipe=gradual", "recipe.train.rule=null"], "recipe.train.curve does nothing without a rule: give it rule"),
    (["+recipe.finetune.every=5"], "recipe.finetune.every does nothing without a rule"),
    (["budget.compression=${budget}"], "budget.compression: Interpolation to parent node"),
    (["budget.macs=${recipe.prune}"], "the config: some value refers to what holds it"),
    (["sensitivity=${nope}", "budget.macs=5"], "budget.macs takes the place of sensitivity"),
    (["~stages"], "stages is missing: list those that recipe=standard runs"),
    (["recipe=lottery", "rewind_to=pretrain@01"], "rewind_to=pretrain@01 names no epoch of pretrain"),
    (["recipe=iterative", "ramp.from=0"], "ramp.curve=geometric needs numbers > 0"),
    (["recipe=iterative", "ramp.from=0.2"], "ramp.from=0.2 is above 0.1 of the last round, and strengths rise"),
    (
        ["recipe=iterative", "ramp.curve=linear", "ramp.from=-1"],
        "sensitivity of prune by ramp.from=-1 must be",
    ),
    (["recipe=iterative", "budget.compression=9", "ramp.from=10"], "ramp.from=10 must be at least 1 and no more than"),
    (["recipe=iterative", "budget.nonzero=90", "ramp.from=80"], "ramp.from=80 must be at least 1 and no less than"),
    (["recipe=iterative", "budget.nonzero=9", "budget.macs=9", "ramp.from=80"], "is of one number, and 2 budgets are"),
    (["recipe=lottery", "budget.macs=9", "ramp.from=0.5"], "ramp.from=0.5 with ramp.curve=constant must be the share"),
    (["prune=percentile", "recipe.prune.sensitivity=1.5"], "recipe.prune.sensitivity must be a number ≥ 0 and ≤ 1"),
    (["ramp.curve=steep"], "ramp.curve must be one of constant"),
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
    (
        ["prune.cut.function._target_=sparsity.regularizers.l1"],
        "sparsity.regularizers.l1 is no function of sparsity.pruning",
    ),
    (["+model.factory.input_shape=[1,2,3]"], "model.factory.input_shape is passed by the pipeline"),
    (["threads=99999999"], "threads must be a whole number ≥ 1 and ≤ 1024, got 99999999"),
    (["schedule.batch_size=100000000000000000000"], "schedule.batch_size must be a whole number ≥ 1, and below"),
    (["precision=float8"], "precision must be one of auto, float32, bfloat16"),
    (["data.validation=-1"], "data.validation must be a number ≥ 0, got -1"),
    (["data.validation=1.5"], "data.validation must be a share below 1 or a whole number of images, got 1.5"),
    (["objectives=[speed]"], r"objectives\[0\] must be one of accuracy, compression, macs, nonzero"),
    (["+optimizer.foo=1"], "optimizer.foo is no setting"),
    (["optimizer.amsgrad=[weight]"], r"optimizer.amsgrad must be true or false, got \['weight'\]"),
    (["optimizer.fused=yes"], "optimizer.fused must be true or false, got 'yes'"),
    (["optimizer.eps=small"], "optimizer.eps must be a number, got 'small'"),
    (["optimizer=sgd", "optimizer.momentum=true"], "optimizer.momentum must be a number, got True"),
    (["reg.penalty=null"], "reg.penalty=null leaves reg.decay=0.0001 of reg=hs without use: take reg=none"),
    (["reg.apply_to=[]"], r"reg.apply_to=\[\] leaves the penalty of reg=hs nothing"),
    (["prune.apply_to=[bias,bias]"], r"prune.apply_to must name each kind once, got \[bias,bias\]"),
    (["reg.search.decay=wide"], "reg.search.decay must be a range to search, such as interval"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), [*MISTAKES[::2], *slow(*MISTAKES[1::2])], ids=lambda value: str(value)[:40]
)
@pytest.mark.parametrize("compose", [compose, *slow(config.compose)], ids=["quick", "Hydra"])
def test_mistakes(overrides, message, compose):
    with pytest.raises(ConfigError, match=message) as error:
        read(*overrides, compose=compose)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [overrides for overrides, _ in MISTAKES], ids=lambda value: str(value)[:40])
def test_the_quick_way_to_compose_is_hydras(overrides):
    def outcome(compose):
        try:
            composed, hydra = compose(overrides)
            return OmegaConf.to_yaml(composed, resolve=False), hydra.runtime.choices
        except ConfigError as error:
            return str(error)

    assert outcome(compose) == outcome(config.compose)


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
    lines = idle(*overrides)
    assert [line.split()[0] for line in lines] == ["reg.decay", "sensitivity", "schedule.finetune.epochs"]
    assert lines[0] == "reg.decay does nothing: stages=[pretrain] has no regularize"
    assert idle("reg=none", "reg.decay=1") and not idle("sensitivity=0.1")
    assert idle("stages=[prune]", "model.weights=a.pt", "optimizer.eps=1e-3", "schedule=paper") == [
        f"{key} does nothing: stages=[prune] has no pretrain, regularize or finetune"
        for key in ("optimizer.eps", "schedule")
    ]
    assert not idle("reg.weight_decay=0.1", "schedule.batch_size=7", "optimizer=sgd")
    assert idle("reg.weight_decay=0.1", "stages=[pretrain]")
    assert idle("recipe=magnitude", "reg=l1") == [
        "reg does nothing: stages=[pretrain,prune,finetune] has no regularize"
    ]
    assert idle("average.start=0.5") == ["average.start=0.5 does nothing: average.kind=none: take mean or ema"]
    assert idle("average.kind=mean", "average.decay=0.5") == [
        "average.decay=0.5 does nothing: average.kind=mean: take ema"
    ]
    assert idle("prune/importance=random", "stages=[pretrain]") == [
        "prune/importance does nothing: stages=[pretrain] has no prune"
    ]
    assert idle("rounds=2") == ["rounds does nothing: no stage of recipe=standard reads it"]
    assert idle("ramp.curve=linear") == [
        "ramp.curve does nothing: stages=[pretrain,regularize,prune,finetune] repeats nothing that prunes"
    ]
    assert idle("recipe=iterative", "rounds=1", "ramp.from=0.1") == [
        "ramp.from does nothing: stages=[pretrain,{repeat:1,stages:[regularize,prune,finetune]}] repeats nothing that "
        "prunes"
    ]
    assert idle("stages=[{repeat:2,stages:[pretrain]},prune]", "ramp.curve=linear")
    assert idle("recipe=magnitude", "+recipe.regularize.hold=zeros", "recipe.finetune.hold=masks") == [
        "recipe.regularize.hold does nothing: stages=[pretrain,prune,finetune] has no regularize"
    ]
    assert not idle("recipe=lottery", "rounds=2", "rewind_to=pretrain@1", "ramp.curve=linear", "budget.nonzero=100")


def idle(*overrides):
    composed, hydra = compose(overrides)
    run = config.read(composed, choices=hydra.runtime.choices, typed=overrides)
    return config.idle_settings(run, composed, overrides)


HOSTILE = {  # YAMLs that would run code, and what is typed beside them
    "environment": ("hydra: {job: {env_set: {SPARSITY_TRUST: collections}}}", []),
    "overrides": ('hydra: {overrides: {task: ["trust=[collections]"]}}\ntrust: [collections]', []),
    "callback": ("hydra: {callbacks: {x: {_target_: os.system, command: touch made}}}", []),
    "callback of ours": ("hydra: {callbacks: {x: {_target_: sparsity.store.Store, folder: made}}}", []),
    "launcher": ("hydra: {launcher: {_target_: os.system, command: touch made}}", ["-m"]),
    "sweeper": ("hydra: {sweeper: {_target_: sparsity.store.Store}}", ["-m"]),
    "sampler": ("hydra: {sweeper: {sampler: {_target_: sparsity.store.Store}}}", ["-m", "search=pareto"]),
    "space": ("hydra: {sweeper: {custom_search_space: os.system}}", ["-m", "search=pareto"]),
    "handler": ("hydra: {job_logging: {handlers: {console: {'()': os.system, command: touch made}}}}", []),
    "own handler": ("hydra: {hydra_logging: {handlers: {console: {class: sparsity.store.Store, folder: made}}}}", []),
    "tag": ("seed: !!python/object/apply:os.system [touch made]", []),
    "factory": ("model: {factory: {_target_: collections.OrderedDict}}", []),
    "loader": ("data: {loader: {_target_: sparsity.store.Store, folder: made}}", []),
}


@pytest.mark.parametrize("name", [*slow(*(name for name in HOSTILE if name != "callback of ours")), "callback of ours"])
def test_no_yaml_runs_code(name, tmp_path):
    yaml, typed = HOSTILE[name]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{yaml}\n")
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/studies.db"
    arguments = [
        "--config-dir",
        str(tmp_path),
        "data=digits",
        "experiment=evil",
        *typed,
        f"hydra.run.dir={tmp_path}/run",
    ]
    arguments += [f"hydra.sweep.dir={tmp_path}/sweep"] + [storage] * ("search=pareto" in typed)
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_settings_of_hydras_that_do_nothing_are_named():
    def idle(mode, *overrides):
        _, hydra = config.compose([f"hydra.mode={mode}", *overrides])
        return config.idle_hydra(hydra)

    assert idle("RUN", "hydra.env=${oc.env:NOPE}") == []
    assert idle("RUN", "hydra/launcher=population") == ["hydra.launcher does nothing without -m"]
    assert idle("RUN", "hydra.sweep.dir=x", "hydra.run.dir=y") == ["hydra.sweep.dir does nothing without -m"]
    assert idle("MULTIRUN", "hydra.sweep.dir=x", "hydra.run.dir=y")[0].startswith(
        "hydra.run.dir does nothing in a sweep"
    )


def test_no_yaml_sets_variables(monkeypatch):
    typed = ["+hydra.job.env_set.CXX=/tmp/mine"]
    _, hydra = config.compose(typed)
    config.check_variables(hydra, config.admitted(typed))
    with pytest.raises(ConfigError, match=r"hydra.job.env_set.CXX stands in a YAML: set it on the command line"):
        config.check_variables(hydra, config.admitted([]))


def test_directions_follow_from_objectives():
    _, hydra = config.compose(["search=pareto", "objectives=[macs,accuracy]"])
    assert hydra.sweeper.direction == ["minimize", "maximize"]


NO_METHODS = [  # a key, and what may not be called for it
    ("data.loader", "sparsity.store.Store", "is no function of sparsity.data: it has arrays, cifar10"),
    ("data.loader", "sparsity.run", "is no function of sparsity.data"),
    ("data.loader", "sparsity.regularizers.hs", "is no function of sparsity.data"),
    ("model.factory", "sparsity.models.torch.nn.Linear", "is no function of sparsity.models"),
    (
        "model.factory",
        "sparsity.models.lenet",
        "is no function of sparsity.models: did you mean sparsity.models.lenet5",
    ),
    ("reg.penalty", "sparsity.regularizers._over", "is no function of sparsity.regularizers"),
    ("reg.penalty", "sparsity.regularizers.Tensor", "is no function of sparsity.regularizers"),
    ("reg.penalty", "sparsity.regularizers", "is no function of sparsity.regularizers"),
    ("prune.cut.function", "sparsity.weights.load", "is no function of sparsity.pruning"),
    ("optimizer", "torch.load", "is no function of torch.optim"),
    ("optimizer", "torch.optim.lr_scheduler.StepLR", "is no function of torch.optim"),
    ("optimizer", "torch.optim.Adam.load_state_dict", "is no function of torch.optim"),
    ("optimizer", "sparsity.models.mlp", "is no function of torch.optim"),
    ("optimizer", "os.system", "is code from outside: admit it by trust="),
    ("optimizer", "''", "is the name of no function"),
    ("model.factory", "sparsity.models.MLP", "widths is missing"),
]


@pytest.mark.parametrize(("key", "target", "words"), NO_METHODS, ids=lambda value: str(value)[:40])
def test_a_config_calls_methods_alone(key, target, words):
    with pytest.raises(ConfigError, match=rf"{key}.*{words}") as error:
        read(f"{key}._target_={target}", *(["~optimizer.betas", "~optimizer.eps"] if key == "optimizer" else []))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["SGD", "sgd.SGD", "RMSprop"])
def test_an_optimizer_of_torchs_by_either_of_its_names(target):
    given = ["~optimizer.betas", "~optimizer.amsgrad", "~optimizer.fused", "~optimizer.eps"]
    assert read(f"optimizer._target_=torch.optim.{target}", *given).optimizer.function.__name__ == target.split(".")[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["n_trials=3"], "did you mean hydra.sweeper.n_trials? It belongs to a search: add -m search=pareto"),
        (["reg/decay=1"], "did you mean reg.decay?"),
        (["reg=HS"], "did you mean reg=hs? reg has group_hs, "),
        (["optimizer=null"], "optimizer=null is no choice: give one of adam, adamw, sgd"),
        (["seed=[1"], "seed=[1 cannot be read: a bracket is not closed"),
        (["seed=1,2"], "add -m for a sweep over them, or write seed=[1,2] for a list"),
        (["hydra.job.num=a"], "hydra.job.num must be a whole number, got a"),
        *slow(
            (["hydra.sweeper.n_trials=3"], "it belongs to a search: add -m search=pareto"),
            (["lr=1"], "did you mean schedule.pretrain.lr or schedule.regularize.lr or schedule.finetune.lr?"),
            (["momentum=0.9"], "did you mean optimizer.momentum of optimizer=sgd?"),
            (["model.factory.hidden=[3]"], "the default of model has none; model=mlp has"),
            (["modle=lenet5"], "did you mean model=lenet5?"),
            (["regularizer=hs"], "did you mean reg=hs?"),
            (["reg.decay.x=1"], "reg.decay holds a value, no keys"),
            (["hydra/lancher=joblib"], "did you mean hydra/launcher=joblib?"),
            (["search=null"], "search=null is no choice: take it out, or give one of"),
            (["+reg=l1"], "reg is chosen already, take the + out"),
            (["+seed=1"], "seed is there already: take the + out"),
            (["~nope"], "nope is no key"),
            (["~"], "~ names no key"),
            (["=1"], "=1 names no key"),
            (["model@there=lenet5"], "model@there is no group: write model=lenet5"),
            (["a=b=c"], """a=b=c cannot be read: quote the value if it is meant as text, as in 'a="b=c"'"""),
            (["seed=é"], "quote the value if it is meant as text"),
            (["seed"], "'seed' is no setting: write KEY=VALUE"),
            (["help"], "did you mean --help?"),
            (["seed=rnage(3)"], "did you mean range(…)?"),
            (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
            (["seed=${seed}"], "seed: Recursive interpolation"),
            (["hydra.job.chdir=maybe"], "hydra.job.chdir must be true or false, got maybe"),
            (["hydra.run.dir=[1]"], "hydra.run.dir must be text, got [1]"),
            (["hydra.searchpath=[/dev/null/x]"], "hydra.searchpath: /dev/null/x is no folder or package of YAMLs"),
            (["seed=" + "[" * 400], "seed=[[["),
            (["seed=1" + "0" * 5000], "seed=1000"),
            (["reg.decay=1" + "0" * 400], "reg.decay must be a number ≥ 0, and below 2^63"),
            (["reg.penalty._partial_=-inf"], "reg.penalty._partial_ must be true, got -inf"),
            (["+reg.penalty._convert_=all"], "reg.penalty._convert_ is no setting"),
            (["+name.model=x"], "name is no setting"),
            (["~model"], "model is missing: it cannot be taken out"),
            (["optimizer=sgd", "+optimizer.lr=1"], "optimizer.lr is passed by the pipeline"),
            (["optimizer.betas=[nan,0.9]"], "optimizer.betas[0] must be a finite number"),
            (["store=''"], "store must be text, got ''"),
            (["trust=[a-b]"], "trust=[a-b] is the name of no module"),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_hydra_finds_is_one_line_too(typed, line):
    with pytest.raises(ConfigError) as error:
        read(*typed, compose=config.compose)
    assert line in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


YAMLS = [
    ("decay: 1\n apply_to: [weight\n", "mine.yaml, line 2 is no YAML"),
    ("decay: [1\n", "mine.yaml, line 2 is no YAML"),
    ("decay: 1\ndecay: 2\n", "mine.yaml, line 2 is no YAML: while constructing a mapping: found duplicate key decay"),
    ("decay: !!python/object/apply:os.system [ls]\n", "mine.yaml, line 1 is no YAML"),
    ("- 1\n", "reg must be a group of keys, got [1]"),
    ("", "reg"),
    ("3", "mine.yaml"),
    ("# @package\ndecay: 1\n", "mine.yaml"),
    ("# @package _global_\ndecay: 1\n", "decay is no setting"),
    ("defaults: 3\n", "mine"),
    ("defaults: [nope]\n", "reg/nope"),
    ("defaults: [{override /modle: lenet5}]\n", "modle"),
    ("decay:\n\t- 1\n", "mine.yaml, line 2 is no YAML"),
    ("decay: 1\n", "reg.penalty is missing: add it to the YAML of reg"),
    (b"decay: \xff\n", "mine.yaml is no YAML"),
]


@pytest.mark.parametrize(
    ("text", "words"), [*YAMLS[::3], *slow(*YAMLS[1::3], *YAMLS[2::3])], ids=lambda value: str(value)[:30]
)
def test_a_yaml_that_cannot_be_read_is_named(text, words, tmp_path):
    (tmp_path / "reg").mkdir()
    (tmp_path / "reg" / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read(f"hydra.searchpath=[{tmp_path}]", "reg=mine")
    assert words in str(error.value) and "\n" not in str(error.value)
