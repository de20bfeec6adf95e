"""Whole runs on digits: what is left on disk and in the result, stages in subsets, and mistakes."""

import csv
import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sample_networks
import torch
from conftest import compose, context_of, slow
from safetensors.torch import load_file

import sparsity
from sparsity.compaction import compact
from sparsity.errors import ConfigError, DivergedError, SparsityError, WeightsError
from sparsity.experiment import Job, plan, run_members
from sparsity.experiment.views import accuracies, selection
from sparsity.models import build
from sparsity.population import stack
from sparsity.stages import training
from sparsity.stages.holding import holding_zeros
from sparsity.training import Epoch

SMALL = ("model=mlp", "model.factory.hidden=[30]")


def without_times(result):
    left_out = ("seconds", "latency", "folder", "config", "environment", "checksum")
    stages = [{key: value for key, value in stage.items() if key != "seconds"} for stage in result["stages_run"]]
    return {key: value for key, value in result.items() if key not in left_out} | {"stages_run": stages}


def test_what_a_run_leaves(run):
    result = run(*SMALL, "sensitivity=0.5")
    folder = Path(result["folder"])
    assert {path.name for path in folder.iterdir()} == {
        *("result.json", "layers.csv", "history.csv", "model.safetensors", "compact.safetensors", "stages"),
        *("curves.png", "density.png", "weights.png", "card.png"),
    }
    stages = ["finetune", "pretrain", "prune", "regularize"]
    assert sorted(path.stem for path in (folder / "stages").iterdir()) == stages
    stored = json.loads((folder / "result.json").read_text())
    assert stored == {key: value for key, value in result.items() if key != "folder"}
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in stored["layers"]]
    assert [int(row["nonzero"]) for row in rows] == [layer["nonzero"] for layer in stored["layers"]]
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [("pretrain", 1), ("pretrain", 2), ("regularize", 1), ("regularize", 2)]
    expected += [("finetune", epoch) for epoch in range(3)]
    assert [(row["stage"], int(row["epoch"])) for row in rows] == expected
    for picture in ("curves", "density", "weights"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_result_agrees_with_the_files(run):
    result = run(*SMALL, "sensitivity=0.5", "plots=false")
    folder = Path(result["folder"])
    state, pruned = load_file(folder / "model.safetensors"), load_file(folder / "stages" / "prune.safetensors")
    regularized = load_file(folder / "stages" / "regularize.safetensors")
    for layer in result["layers"]:
        name, before = layer["name"], regularized[layer["name"]].double()
        assert layer["nonzero"] == int(state[name].count_nonzero()) <= int(pruned[name].count_nonzero())
        assert layer["std"] == pytest.approx(before.std(correction=0).item(), rel=1e-6)
        assert layer["threshold"] == pytest.approx(0.5 * layer["std"], rel=1e-5)
        assert torch.equal(pruned[name] != 0, before.abs() >= layer["threshold"])
        assert torch.equal(state[name] != 0, pruned[name] != 0)
    weights = [layer for layer in result["layers"] if layer["kind"] == "weight"]
    assert result["nonzero"]["weights"] == sum(layer["nonzero"] for layer in weights)
    assert result["compression"]["weights"] == result["total"]["weights"] / result["nonzero"]["weights"]
    assert result["macs"]["pruned"] == sum(layer["macs"] for layer in weights)
    accuracy = result["accuracy"]
    assert accuracy["selected"]["test"] == accuracy["final"]["test"]
    assert accuracy["best"]["test"] >= max(accuracy["selected"]["test"], accuracy["last"]["test"])
    assert set(result["seconds"]) == {"pretrain", "regularize", "prune", "finetune", "total"}
    assert result["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_same_command_gives_the_same_bits(run):
    one, other, third = (run(*SMALL, f"seed={seed}", "plots=false") for seed in (0, 0, 1))
    left, right = (load_file(Path(result["folder"]) / "model.safetensors") for result in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert without_times(one) == without_times(other)
    assert third["accuracy"] != one["accuracy"]


@pytest.mark.slow
def test_members_draw_an_order_of_their_own_for_every_stage(run, monkeypatch):
    train, seeds = training.run_loop, {}

    def noted(population, splits, loop, generators, **more):
        seeds[len(seeds)] = [generator.initial_seed() for generator in generators]
        return train(population, splits, loop, generators, **more)

    monkeypatch.setattr(training, "run_loop", noted)
    for seed in (0, 1):
        run(*SMALL, f"seed={seed}", "plots=false")
    assert len(seeds) == 6 and len({drawn for each in seeds.values() for drawn in each}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("elementwise", [True, False])
def test_finetuning_is_compact_unless_the_optimizer_mixes_entries(elementwise, run, monkeypatch):
    compacted = []
    monkeypatch.setattr(training, "is_elementwise", lambda optimizer: elementwise)
    monkeypatch.setattr(training, "compact", lambda *given: compacted.append(1) or compact(*given))
    run(*SMALL, "sensitivity=0.5", "plots=false", "step=eager")
    assert len(compacted) == elementwise


def test_finetuning_holds_every_zero_but_those_of_normalisation():
    torch.manual_seed(0)
    population = stack([sample_networks.Normalised(10)])
    parameters = {name: parameter.clone() for name, parameter in population.parameters.items()}
    parameters["first.weight"][0, 1] = 0
    assert not parameters["norm.bias"].any()  # as it begins
    held = holding_zeros(replace(population, parameters=parameters)).masks
    assert list(held) == ["first.weight"] and torch.equal(held["first.weight"], parameters["first.weight"] != 0)


def test_selected_last_and_best_are_of_their_own_epochs():
    rows = [(0.5, 0.9), (0.8, 0.6), (0.7, 0.95), (0.6, 0.7)]
    history = [Epoch(epoch, None, None, None, [v], [t], None, 0.0) for epoch, (v, t) in enumerate(rows)]
    final = {"validation": 0.8, "test": 0.6}
    tuned = {"name": "tune", "did": ["selected"], "accuracy": final, "selected_epoch": 1}
    found = accuracies([tuned], None, {"tune": history})
    assert found["selected"] == {**final, "epoch": 1} and found["last"] == {"validation": 0.6, "test": 0.7}
    assert found["best"] == {"test": 0.95, "epoch": 2}
    assert found["pruned"] == {"validation": None, "test": None} and found["final"] == final
    assert accuracies([{**tuned, "final_from": 3}], None, {"tune": history})["best"] == {"test": 0.7, "epoch": 3}


def test_accuracies_are_those_of_the_last_stage_of_their_kind():
    def stage(name, *did):
        return {"name": name, "did": list(did), "accuracy": {"validation": None, "test": name}, "selected_epoch": None}

    def tests(given, *stages):
        found = accuracies(stages, given, {})
        return [found[name]["test"] for name in ("dense", "regularized", "pruned", "final")]

    given = {"validation": None, "test": "given"}
    dense, penalized, masked, tuned = stage("a"), stage("b", "penalized"), stage("c", "masked"), stage("d", "selected")
    assert tests(None, dense, penalized, masked, tuned) == ["a", "b", "c", "d"]
    assert tests(given, penalized, masked) == ["given", "b", "c", "c"]
    assert tests(None, masked, dense) == [None, None, "c", "a"]  # dense is what precedes the first mask
    assert tests(None, dense, masked, stage("e", "penalized"), stage("f", "masked"), tuned) == ["a", "e", "f", "d"]
    assert tests(given) == ["given", None, None, "given"]


def test_selection_says_what_the_network_is():
    pruned = {"name": "prune", "did": ["masked"]}
    tuned = {"name": "finetune-2", "did": ["selected"], "selected_epoch": 3}
    assert selection([pruned]) == "no epoch was selected: the network is that after the last stage"
    assert selection([pruned, tuned]) == "epoch 3 of finetune-2, selected by validation accuracy"
    assert selection([tuned, pruned]) == f"{selection([tuned])}; the network is that after prune"
    tuned["selected_epoch"] = None
    nothing = "nothing was selected (data.validation=0): the network is that "
    assert selection([pruned, tuned]) == f"{nothing}of the last epoch of finetune-2"
    assert selection([tuned, pruned]) == f"{nothing}after prune"


@pytest.mark.parametrize(
    ("overrides", "stage", "num_steps", "way"),
    [
        ([], "regularize", 999, "eager"),
        ([], "regularize", 1_000, "recorded"),
        ([], "regularize", 7_999, "recorded"),
        ([], "regularize", 8_000, "compiled"),
        (["step=eager"], "regularize", 8_000, "eager"),
        (["step=compiled"], "regularize", 1, "compiled"),
        (["model=lenet5"], "pretrain", 8_000, "recorded"),
        (["model=lenet5"], "regularize", 8_000, "compiled"),
        (["model=lenet5", "reg=none"], "regularize", 8_000, "recorded"),
    ],
)
def test_how_steps_are_computed(overrides, stage, num_steps, way):
    model = [] if "model=lenet5" in overrides else SMALL
    run = sparsity.config.read(compose([*model, *overrides])[0])
    population = stack([build(run.model.factory.partial(), (1, 28, 28), 10, 0)])
    (planned,) = (each for each in plan.planned([run]) if each.name == stage)
    splits = SimpleNamespace(train=range(2 * num_steps))  # as many images
    context = context_of(splits=splits, step=run.step, model=run.model.factory.target)
    one = plan.Planned([_with(planned.stages[0], batch_size=2, epochs=1)])
    assert one.loop(population, context).way == way
    if "step" not in str(overrides):
        foreign = stack([build(sample_networks.Normalised, (1, 28, 28), 10, 0)])
        assert one.loop(foreign, context).way == "eager"


def _with(stage, batch_size, epochs):
    """A stage with other numbers."""
    numbers = stage.call.numbers
    schedule = replace(numbers["schedule"], epochs=epochs)
    return replace(stage, call=replace(stage.call, numbers={**numbers, "batch_size": batch_size, "schedule": schedule}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_sweep", "plots", "drawn"),
    [(True, "null", 0), *slow((True, "true", 3), (False, "null", 4), (False, "false", 0))],  # the card is the fourth
)
def test_members_of_a_sweep_draw_pictures_where_they_are_asked_to(in_sweep, plots, drawn, tmp_path):
    composed = sparsity.config.compose([*SMALL, "data=digits", "schedule=smoke", "store=null", f"plots={plots}"])[0]
    (result,) = run_members([Job(sparsity.config.read(composed), tmp_path / "run", in_sweep=in_sweep)])
    assert len(list((tmp_path / "run").glob("*.png"))) == drawn and result["nonzero"]["weights"] > 0


def test_stages_one_after_another_are_the_stages_together(run):
    whole = run(*SMALL, "plots=false")
    stages = Path(whole["folder"]) / "stages"
    rest = run(*SMALL, "stages=[prune,finetune]", f"model.weights={stages / 'regularize.safetensors'}", "plots=false")
    assert rest["nonzero"] == whole["nonzero"]
    assert rest["accuracy"]["selected"] == whole["accuracy"]["selected"]
    assert rest["accuracy"]["dense"] == whole["accuracy"]["regularized"]
    assert rest["accuracy"]["regularized"] == {"validation": None, "test": None}


@pytest.mark.slow
def test_finetuning_a_pruned_network_keeps_its_zeros(run):
    pruned = run(*SMALL, "stages=[pretrain,prune]", "sensitivity=1", "plots=false")
    weights = f"model.weights={pruned['folder']}/model.safetensors"
    tuned = run(*SMALL, "stages=[finetune]", weights, "plots=false")
    assert tuned["nonzero"] == pruned["nonzero"]
    assert tuned["accuracy"]["last"]["test"] > pruned["accuracy"]["pruned"]["test"]


@pytest.mark.slow
def test_no_stages_only_report(run):
    trained = run(*SMALL, "stages=[pretrain]", "plots=false")
    assert trained["accuracy"]["selected"] == {"validation": None, "test": None, "epoch": None}
    report = run(*SMALL, "stages=[]", f"model.weights={trained['folder']}/model.safetensors")
    assert report["accuracy"]["dense"] == trained["accuracy"]["dense"]
    assert report["nonzero"] == trained["nonzero"] and report["accuracy"]["last"]["test"] is None
    assert (Path(report["folder"]) / "density.png").exists()


@pytest.mark.slow
def test_without_validation_nothing_is_selected(run, caplog):
    result = run(*SMALL, "data.validation=0", "plots=false")
    assert result["accuracy"]["selected"] == {"validation": None, "test": None, "epoch": None}
    assert result["accuracy"]["final"]["test"] == result["accuracy"]["last"]["test"]
    assert "nothing was selected" in result["selection"] and "nothing is selected" in caplog.text


@pytest.mark.slow
def test_layers_of_their_own_and_left_out(run):
    result = run(*SMALL, "sensitivity=0.5", "prune.layers.fc1=2", "prune.exclude=[fc2]", "plots=false")
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert layers["fc1.weight"]["threshold"] == pytest.approx(2 * layers["fc1.weight"]["std"], rel=1e-5)
    assert layers["fc2.weight"]["density"] == 1 and layers["fc2.weight"]["threshold"] is None


@pytest.mark.slow
def test_structural_pruning_takes_biases_with_filters(run):
    result = run(*SMALL, "reg=group_hs", "prune=group_std", "sensitivity=0.9", "prune.exclude=[fc2]", "plots=false")
    state = load_file(Path(result["folder"]) / "stages" / "prune.safetensors")
    dead = ~(state["fc1.weight"] != 0).any(1)
    assert 0 < dead.sum() < 30
    assert (state["fc1.bias"][dead] == 0).all() and (state["fc1.bias"][~dead] != 0).all()
    inputs, hidden = map(int, result["structure"].split("-"))
    assert hidden == 30 - int(dead.sum()) and inputs < 784


@pytest.mark.slow
def test_a_layer_pruned_whole_is_a_warning(run, caplog):
    result = run(*SMALL, "sensitivity=0.1", "prune.layers.fc1=100", "plots=false")
    assert any("prune.layers.fc1=100 pruned all of fc1.weight" in line for line in result["warnings"])
    assert "pruned all of fc1.weight" in caplog.text
    assert result["structure"].startswith("0-")
    nothing = run(*SMALL, "sensitivity=100", "stages=[pretrain,prune]")
    assert nothing["compression"]["weights"] is None and nothing["macs"]["pruned"] == 0


@pytest.mark.slow
def test_divergence_is_one_line_and_keeps_the_last_good_state(run, tmp_path):
    with pytest.raises(DivergedError, match=r"finetune: .*epoch 1; schedule.finetune.lr=1e\+30") as error:
        run(*SMALL, "schedule.finetune.lr=1e30", "optimizer=sgd")
    assert "\n" not in str(error.value)
    state = load_file(tmp_path / "run0" / "stages" / "finetune.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (tmp_path / "run0" / "result.json").exists()


@pytest.mark.parametrize("model", ["lenet5", *slow("lenet300", "torchvision")])
def test_networks_run(run, model):
    overrides = ["schedule.batch_size=256", "schedule.pretrain.epochs=1", "plots=false", "stages=[pretrain,prune]"]
    result = run(f"model={model}", *overrides)
    assert result["total"]["parameters"] == {"lenet300": 266610, "lenet5": 431080, "torchvision": 11175370}[model]


@pytest.mark.slow
def test_networks_of_the_users_own(run, monkeypatch):
    target = ["model=custom", "model.factory._target_=sample_networks.Normalised", "+model.factory.width=6"]
    with pytest.raises(ConfigError, match=r"code from outside: admit it by trust=\[sample_networks\]"):
        run(*target)
    result = run(*target, "trust=[sample_networks]", "reg=group_lasso", "prune=group_std", "plots=false")
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert layers["norm.weight"]["kind"] == "normalization" and layers["norm.weight"]["density"] == 1
    assert layers["first.weight"]["shape"][0] == 6


MISTAKES = [
    (["device=cuda:99"], ConfigError, "device=cuda:99 is not there: this machine has auto, cpu"),
    (["device=abacus"], ConfigError, "device=abacus is not there"),
    (["prune.exclude=[fc9]"], ConfigError, "prune.exclude names 'fc9', which the model lacks: its layers are fc1, fc2"),
    (["prune.layers.fc9=0.1"], ConfigError, "prune.layers names 'fc9'"),
    (["optimizer.eps=-1"], ConfigError, "optimizer=adam: Invalid epsilon value: -1"),
    (["optimizer.betas=abc"], ConfigError, "optimizer.betas must be a list of 2 numbers"),
    (["data.validation=99999"], ConfigError, "data.validation must leave images on both sides, got 99999"),
    (["model=torchvision", "model.factory.name=resnet99"], ConfigError, "model.factory.name=resnet99 is no"),
    (["model=torchvision", "model.factory.name=alexnet"], ConfigError, "model=torchvision does not fit the data"),
    (["stages=[]", "model.weights=nothing.pth"], WeightsError, "model.weights=nothing.pth is no file"),
    (["prune.apply_to=[]"], ConfigError, "leave nothing to prune"),
    (["prune=percentile", "prune.layers.fc1.bias=0.5"], ConfigError, "prune.layers.fc1.bias does nothing"),
    (["optimizer.betas=[0.9]"], ConfigError, "optimizer.betas must be a list of 2 numbers"),
    (["prune.scope=network"], ConfigError, "a method fails on the model"),
    (["reg.penalty._target_=sparsity.pruning.std"], ConfigError, "is no function of sparsity.regularizers"),
    (["reg.apply_to=[normalization]"], ConfigError, "the model has no such parameters"),
    (["data=image_folder", "data.root=nothing"], SparsityError, "data.root=nothing is no folder"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(run, tmp_path, overrides, kind, message):
    with pytest.raises(kind) as error:
        run(*overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run0").exists()


@pytest.mark.slow
def test_settings_that_do_nothing_warn(run, caplog):
    with caplog.at_level(logging.WARNING):
        run(*SMALL, "stages=[pretrain]", "sensitivity=0.3", "plots=false")
    assert "sensitivity does nothing" in caplog.text


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The first layer that pretraining from the same weights comes to, whatever the overrides."""
    root = tmp_path_factory.mktemp("pretrained")
    fixed = (*SMALL, "data=digits", "schedule=smoke", "store=null", "stages=[pretrain]", "plots=false")
    start = sparsity.run([*fixed, "schedule.pretrain.epochs=1", f"hydra.run.dir={root}/start"])["folder"]

    @functools.cache
    def pretrained(*overrides):
        folder = root / str(len(list(root.iterdir())))
        given = (f"model.weights={start}/model.safetensors", f"hydra.run.dir={folder}")
        sparsity.run([*fixed, *given, *overrides])
        return load_file(folder / "model.safetensors")["fc1.weight"]

    return pretrained


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "data.validation_seed=1",
        "data.normalize={mean: [0.3], std: [0.4]}",
        "schedule.pretrain.shape=constant",
        "schedule.pretrain.warmup=0.5",
        "schedule.pretrain.weight_decay=0.1",
        "schedule.pretrain.lr=1e-3",
        "schedule.batch_size=49",
        "optimizer=adamw",
        "optimizer.betas=[0.8,0.9]",
        "precision=bfloat16",
    ],
)
def test_every_setting_reaches_training(pretrained, change):
    common = ("schedule.pretrain.weight_decay=0.01",) if change == "optimizer=adamw" else ()
    without = ("precision=float32",) if change.startswith("precision") else ()
    assert not torch.equal(pretrained(*common, *without), pretrained(*common, change))


@pytest.mark.slow
def test_the_penalty_is_in_regularizing_alone(run):
    folder = Path(run(*SMALL, "plots=false")["folder"])
    with (folder / "history.csv").open() as file:
        for row in csv.DictReader(file):
            if row["loss"]:
                loss, penalty, objective = (float(row[name]) for name in ("loss", "penalty", "objective"))
                assert (penalty > 0) == (row["stage"] == "regularize") and (objective > loss) == (penalty > 0)


def test_training_flushes_denormals_and_leaves_the_process_as_it_was():
    from sparsity.experiment.machine import machine

    before, tiny = torch.get_num_threads(), torch.tensor([1e-39])
    with machine(1):
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0 and torch.get_num_threads() == before


def test_a_finished_run_is_not_written_over(run, tmp_path):
    result = run(*SMALL, "stages=[pretrain]", "plots=false")
    before = (tmp_path / "run0" / "result.json").read_text()
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(*SMALL, "stages=[pretrain]", "plots=false", "seed=1", f"hydra.run.dir={result['folder']}")
    assert (tmp_path / "run0" / "result.json").read_text() == before


@pytest.mark.slow
def test_everything_pruned_is_a_result(run):
    result = run(*SMALL, "prune=percentile", "sensitivity=1", "plots=false")
    stored = json.loads((Path(result["folder"]) / "result.json").read_text())
    assert stored["layers"][0]["threshold"] is None and stored["nonzero"]["weights"] == 0


@pytest.mark.slow
def test_an_excluded_bias_stays_when_its_filter_goes(run):
    overrides = ("reg=group_hs", "prune=group_std", "sensitivity=0.9", "prune.exclude=[fc2,fc1.bias]", "plots=false")
    state = load_file(Path(run(*SMALL, *overrides)["folder"]) / "stages" / "prune.safetensors")
    assert not (state["fc1.weight"] != 0).any(1).all() and (state["fc1.bias"] != 0).all()


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"hydra.run.dir=.*file/run cannot be written"):
        run(*SMALL, f"hydra.run.dir={tmp_path}/file/run")


@pytest.mark.parametrize("override", ["search=pareto", "reg.deacy=1", "reg=nothing", *slow("model.weights=${nope}")])
def test_python_gets_its_own_errors(run, override):
    with pytest.raises(ConfigError) as error:
        run(override)
    assert "\n" not in str(error.value)
