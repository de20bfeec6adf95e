"""Recipes: how their stages are listed and strengthened, and what runs of them come to."""

import csv
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, choices, compose, slow
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchvision.datasets import MNIST as mnist

from sparsity import config
from sparsity.config.recipe import Readers
from sparsity.errors import ConfigError, SparsityError
from sparsity.limits import Budget, PartOfBudget

SMALL = ("model=mlp", "model.factory.hidden=[30]", "plots=false")


def read(*overrides):
    composed, hydra = compose(overrides)
    return config.read(composed, choices=hydra.runtime.choices, typed=overrides)


def numbers(argument, *overrides):
    return [stage.call.numbers[argument] for stage in read(*overrides).recipe if argument in stage.call.numbers]


# --- lists -----------------------------------------------------------------------------------------------------------


def test_rounds_are_unrolled_and_named():
    stages = read("stages=[pretrain,{repeat:2,stages:[prune,finetune]},prune]").recipe
    assert [(stage.name, stage.node, stage.round) for stage in stages] == [
        ("pretrain", "pretrain", None),
        ("prune", "prune", 1),
        ("finetune", "finetune", 1),
        ("prune-2", "prune", 2),
        ("finetune-2", "finetune", 2),
        ("prune-3", "prune", None),
    ]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("standard", "pretrain regularize prune finetune"),
        ("iterative", "pretrain regularize prune finetune regularize-2 prune-2 finetune-2"),
        ("lottery", "pretrain prune rewind train prune-2 rewind-2 train-2"),
        ("gradual", "pretrain train"),
        ("at_init", "prune train"),
        ("magnitude", "pretrain prune finetune"),
        ("adapted", "pretrain regularize prune finetune"),
        ("rigl", "prune train"),
        ("set", "prune train"),
        ("quantized", "pretrain regularize prune finetune quantize"),
    ],
)
def test_the_recipes_that_ship(recipe, names):
    assert [stage.name for stage in read(f"recipe={recipe}", "rounds=2").recipe] == names.split()
    assert recipe in choices("recipe") and len(choices("recipe")) == 10


@pytest.mark.slow
def test_methods_that_recipes_bring_give_way_to_typed_ones():
    assert read("recipe=gradual").name["prune"] == "percentile" and read("recipe=at_init").name["reg"] == "none"
    assert read("recipe=gradual", "prune=std", "reg=l1").name["prune"] == "std"


# --- what stages read ------------------------------------------------------------------------------------------------


def readers(*overrides):
    return Readers(OmegaConf.to_container(compose(overrides)[0], resolve=False))


def test_keys_are_read_by_the_nodes_that_refer_to_them():
    found = readers("recipe=lottery")
    of = {key: found.of(key) for key in ("schedule.batch_size", "schedule.finetune.lr", "budget.macs", "rewind_to")}
    assert of == {
        "schedule.batch_size": ["pretrain", "regularize", "finetune", "train"],
        "schedule.finetune.lr": ["finetune"],
        "budget.macs": ["prune"],
        "rewind_to": ["rewind"],
    }
    assert found.of("schedule.pretrain") == ["pretrain", "train"]
    assert found.of("schedule") == found.of("optimizer.betas") == of["schedule.batch_size"]  # of all that it holds
    assert found.of("reg.weight_decay") == ["regularize"]  # by what it reads itself
    assert found.of("recipe.train.select") == ["train"] and found.of("prune.rule.anything") == ["prune"]
    assert found.of("schedule.fine") == found.of("sensi") == found.of("seed") == found.of("recipe.nothing") == []


def test_keys_are_read_where_a_reader_is_listed():
    standard, iterative = readers(), readers("recipe=iterative")
    for key in ("schedule.finetune.lr", "reg", "reg.decay", "prune", "optimizer", "budget.compression", "sensitivity"):
        assert standard.is_read(key) and iterative.is_read(key), key
    for key in ("rounds", "ramp.curve"):  # of the list itself
        assert not standard.is_read(key) and iterative.is_read(key), key
    few = readers("stages=[pretrain,{repeat:2,stages:[prune]}]", "recipe=lottery")
    assert few.listed == {"pretrain", "prune"} and few.is_read("ramp.from") and few.is_read("schedule.pretrain")
    for key in ("rewind_to", "schedule.finetune", "reg.decay", "rounds", "recipe.train.select", "nothing"):
        assert not few.is_read(key), key


@pytest.mark.slow
def test_a_node_may_read_another_node(own):
    more = "polish: {_target_: sparsity.stages.train, schedule: '${recipe.finetune.schedule}', batch_size: 7, "
    where = own(
        "recipe",
        f"defaults: [standard]\nstages: [pretrain, polish]\nrecipe: {{{more} optimizer: '${{optimizer}}'}}}}\n",
    )
    found = readers(*where)
    assert found.of("schedule.finetune.lr") == ["finetune", "polish"] and found.is_read("schedule.finetune.lr")
    assert found.is_read("recipe.finetune.schedule") and not found.is_read("recipe.finetune.hold")
    assert [stage.call.numbers["schedule"].lr for stage in read(*where, "schedule.finetune.lr=0.5").recipe][1] == 0.5


# --- strengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ramp.curve=linear", "ramp.from=0"], [0.1, 0.2, 0.3]),
        (["ramp.curve=cubic", "ramp.from=0"], [0.3 * (1 - (2 / 3) ** 3), 0.3 * (1 - (1 / 3) ** 3), 0.3]),
        (["ramp.curve=geometric", "ramp.from=0.0375"], [0.075, 0.15, 0.3]),
        (["ramp.curve=geometric"], [0.3 * 10 ** (-2 / 3), 0.3 * 10 ** (-1 / 3), 0.3]),
        (["ramp.curve=constant"], [0.3, 0.3, 0.3]),
        (["ramp.curve=constant", "ramp.from=0.2"], [0.2, 0.2, 0.3]),
        (["ramp.curve=constant", "prune=percentile"], [0.3, 1 - 0.7**2, 1 - 0.7**3]),
        (["ramp.curve=constant", "ramp.from=0.2", "prune=percentile"], [0.2, 0.3, 0.3]),  # no more than in the last
        (["ramp.curve=constant", "ramp.from=0.1", "prune=percentile"], [0.1, 1 - 0.9**2, 0.3]),
        (["ramp.curve=linear"], [0.03 + 0.27 / 3, 0.03 + 0.27 * 2 / 3, 0.3]),  # from a tenth
    ],
)
def test_sensitivities_rise_to_the_one_asked_for(overrides, expected):
    found = numbers("sensitivity", "recipe=iterative", "rounds=3", "sensitivity=0.3", *overrides)
    assert found == pytest.approx(expected) and (overrides[-1] == "prune=percentile" or found[-1] == 0.3)


def test_budgets_rise_from_the_dense_network():
    first, second, last = numbers("budget", "recipe=iterative", "rounds=3", "budget.compression=50")
    assert (first.share, second.share) == pytest.approx((1 / 3, 2 / 3)) and last == Budget(compression=50)
    assert isinstance(first, PartOfBudget) and first.way == "geometric" and first.compression == 50
    assert numbers("sensitivity", "recipe=iterative", "budget.compression=50") == [None] * 3
    linear = numbers("budget", "recipe=iterative", "rounds=2", "budget.nonzero=50", "ramp.curve=linear")
    assert linear[0] == PartOfBudget(nonzero=50, share=0.5, way="linear")
    given = numbers("budget", "recipe=iterative", "rounds=2", "budget.compression=100", "ramp.from=4")
    assert given == [Budget(compression=20), Budget(compression=100)]
    shares = numbers("budget", "recipe=lottery", "rounds=3", "budget.compression=3", "ramp.from=0.5")
    assert shares == [Budget(compression=2), Budget(compression=3), Budget(compression=3)]


def test_without_rounds_nothing_rises():
    assert numbers("sensitivity", "sensitivity=0.3", "ramp.curve=linear") == [0.3]
    assert numbers("budget", "budget.macs=7") == [Budget(macs=7)]
    assert all(value is None for value in asdict(read().budget).values()) and numbers("budget") == [None]


# --- YAMLs of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    def own(group, text):
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(f"# @package _global_\n{text}")
        return f"hydra.searchpath=[file://{tmp_path / 'conf'}]", f"{group}=mine"

    return own


def test_a_recipe_of_ones_own_is_a_yaml(own):
    where = own("recipe", "defaults: [standard]\nstages: [pretrain, {repeat: 3, stages: [prune, finetune]}]\n")
    assert len(read(*where).recipe) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: {prune: null}", "recipe.prune must name a function by _target_, got None"),
        ("recipe: {prune: train}", "recipe.prune must name a function by _target_, got 'train'"),
        ("recipe: {3: {_target_: sparsity.stages.prune}}", "recipe.3 is no name of a stage"),
        ("recipe: {a-b: {_target_: sparsity.stages.prune}}", "recipe.a-b is no name of a stage"),
        ("recipe: {start: {_target_: sparsity.stages.prune}}", "start is the state before the first stage"),
        *slow(
            ("recipe: {tune: {schedule: '${schedule.finetune}'}}", "recipe.tune must name a function by _target_"),
            (
                "recipe: {tune: {_target_: sparsity.stages.train}}",
                "recipe.tune.schedule is missing: sparsity.stages.train",
            ),
            (
                "recipe: {tune: {_target_: sparsity.stages.tune}}",
                "sparsity.stages.tune is no function of sparsity.stages",
            ),
            (
                "recipe: {tune: {_target_: os.system, command: ls}}",
                "recipe.tune._target_=os.system is code from outside",
            ),
            ("recipe: {prune: {rule: '${prun}'}}", "recipe.prune.rule: Interpolation key 'prun' not found"),
            ("recipe: {prune: {rule: '${recipe.prune.rule}'}}", "recipe.prune.rule: Recursive interpolation"),
            ("recipe: {prune: {population: 3}}", "recipe.prune.population is passed by the pipeline"),
            ("recipe: {finetune: {hold: zeroes}}", "recipe.finetune.hold must be one of masks, zeros, none"),
            ("stages: [pretrain, [prune, finetune]]", r"stages names \['prune', 'finetune'\], which recipe=mine lacks"),
            ("stages: [pretrain, null]", "stages names None, which recipe=mine lacks"),
            (
                "stages: [pretrain, {repeat: 2.0, stages: [prune]}]",
                "repeat in stages must be a whole number .* got 2.0",
            ),
            (
                "stages: [pretrain, {repeat: true, stages: [prune]}]",
                "repeat in stages must be a whole number .* got True",
            ),
            ("stages: [pretrain, {repeat: 2, stages: prune}]", "stages holds names and {repeat: 3"),
            ("stages: [pretrain, {repeat: 2, stages: []}]", "stages holds names and {repeat: 3"),
        ),
    ],
)
def test_mistakes_in_a_recipe_of_ones_own(own, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(*own("recipe", f"defaults: [standard]\n{text}\n"))
    assert "\n" not in str(error.value)


def test_a_recipe_without_a_list_and_one_of_an_unknown_method(own):
    with pytest.raises(ConfigError, match="stages is missing: list those that recipe=mine runs"):
        read(*own("recipe", "recipe: {prune: {_target_: sparsity.stages.prune}}\n"))
    with pytest.raises(ConfigError, match="reg=nosuch is no choice: reg has group_hs"):
        read(*own("recipe", "defaults: [standard, override /reg: nosuch]\n"))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["recipe", *slow("experiment")])
def test_a_merge_into_what_a_stage_reads_is_refused(own, group):
    start = "defaults: [standard]\n" if group == "recipe" else ""
    merge = "recipe: {regularize: {schedule: {epochs: 7}}}\n"
    with pytest.raises(ConfigError, match=f"{group}=mine sets recipe.regularize.schedule.epochs .* set schedule"):
        read(*own(group, start + merge))
    whole = "recipe: {regularize: {schedule: {epochs: 7, lr: 0.1, shape: linear, warmup: 0.0, weight_decay: 0.0}}}\n"
    assert [schedule.epochs for schedule in numbers("schedule", *own(group, start + whole))] == [10, 7, 10]


def test_a_sensitivity_and_a_budget_in_one_yaml_are_refused(own):
    with pytest.raises(ConfigError, match=r"experiment=mine gives both sensitivity=0.3 and budget.compression"):
        read(*own("experiment", "sensitivity: 0.3\nbudget: {compression: 5}\n"))
    assert read(*own("experiment", "budget: {compression: 5}\n")).sensitivity is None


def test_a_typed_sensitivity_beats_the_budget_of_a_yaml(own):
    run = read(*own("experiment", "budget: {compression: 5}\n"), "sensitivity=0.4")
    assert run.sensitivity == 0.4 and run.budget == Budget()
    run = read(*own("experiment", "sensitivity: 0.4\n"), "budget.compression=5")
    assert run.sensitivity is None and run.budget == Budget(compression=5)
    assert read("sensitivity=null", "budget.nonzero=5").budget == Budget(nonzero=5)


@pytest.mark.slow
def test_stages_of_other_names_and_code_are_stages_too(own, run, monkeypatch, tmp_path):
    (tmp_path / "own_stages.py").write_text(
        "from dataclasses import replace\n"
        "from sparsity.stages.context import Outcome\n\n"
        "def halve(population, context, *, times: int):\n"
        "    smaller = {name: tensor * 0.5**times for name, tensor in population.parameters.items()}\n"
        "    return Outcome(replace(population, parameters=smaller))\n"
    )
    monkeypatch.setenv("SPARSITY_TRUST", "own_stages")
    where = own(
        "recipe",
        "defaults: [standard]\nstages: [pretrain, shrink]\nrecipe: {shrink: {_target_: own_stages.halve, times: 2}}\n",
    )
    result = run(*SMALL, *where)
    before, after = (load_file(Path(result["folder"]) / "stages" / f"{name}.safetensors") for name in result["stages"])
    assert all(torch.equal(before[name] * 0.25, after[name]) for name in before)
    assert [stage["function"] for stage in result["stages_run"]] == ["train", "halve"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "spoil: own_spoils.spoil must give an Outcome, got NoneType"),
        (
            "return Outcome(population.map(lambda tensor: tensor * float('nan')))",
            "spoil: it gives weights that are NaN",
        ),
        ("raise KeyError('weight')", "spoil: KeyError: 'weight'"),
    ],
)
def test_a_stage_of_ones_own_that_fails_is_named(own, run, monkeypatch, tmp_path, body, message):
    text = f"from sparsity.stages.context import Outcome\n\ndef spoil(population, context):\n    {body}\n"
    (tmp_path / "own_spoils.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SPARSITY_TRUST", "own_spoils")
    monkeypatch.delitem(sys.modules, "own_spoils", raising=False)
    node = "{spoil: {_target_: own_spoils.spoil}}"
    where = own("recipe", f"defaults: [standard]\nstages: [pretrain, spoil]\nrecipe: {node}\n")
    with pytest.raises(SparsityError, match=message):
        run(*SMALL, *where)


def test_a_stage_of_ones_own_may_take_a_rule_and_no_number(own, monkeypatch, tmp_path):
    (tmp_path / "own_rules.py").write_text(
        "from sparsity.nodes import Each, Rule\n\ndef touch(population, context, *, rule: Each[Rule]): ...\n"
    )
    monkeypatch.setenv("SPARSITY_TRUST", "own_rules")
    node = "{_target_: own_rules.touch, rule: '${prune}'}"
    text = f"defaults: [standard]\nstages: [pretrain, touch]\nrecipe: {{touch: {node}}}\n"
    where = (*own("recipe", text), "prune.exclude=[fc3]")
    composed, _ = config.compose(where)
    run = config.read(composed, trust=config.admitted(where), typed=where)
    assert run.recipe[1].call.numbers["rule"].exclude == ["fc3"]


# --- runs ------------------------------------------------------------------------------------------------------------


def states(result):
    folder = Path(result["folder"]) / "stages"
    return {name: load_file(folder / f"{name}.safetensors") for name in result["stages"]}


def start_of(run):
    """What the members begin with: a run of no epoch."""
    return states(run(*SMALL, "stages=[pretrain]", "schedule.pretrain.epochs=0"))["pretrain"]


def assert_zeros_stay(found, names):
    """What is zero after one of the stages is zero after those that follow it."""
    for weight in ("fc1.weight", "fc2.weight"):
        kept = [found[stage][weight] != 0 for stage in names]
        assert all(not (after & ~before).any() for before, after in itertools.pairwise(kept))


def assert_recorded(result, did):
    """One record a stage in order, with what it came to; did: by the node's name."""
    records = result["stages_run"]
    assert [record["name"] for record in records] == result["stages"] == list(result["computed_with"])
    assert [record["did"] for record in records] == [did[name.partition("-")[0]] for name in result["stages"]]
    for record, state in zip(records, states(result).values()):
        assert record["nonzero"]["parameters"] == sum(int((tensor != 0).sum()) for tensor in state.values())
        assert record["seconds"] == result["seconds"][record["name"]] >= 0
        assert 0 <= record["accuracy"]["test"] <= 1 and 0 <= record["macs"]["removable"] <= record["macs"]["dense"]
        assert (record["selected_epoch"] is not None) == ("selected" in record["did"])
        assert (record["sensitivity"] is not None) == ("masked" in record["did"])
    assert records[-1]["accuracy"] == result["accuracy"]["final"] and records[-1]["nonzero"] == result["nonzero"]


DID = {"pretrain": [], "regularize": ["penalized"], "prune": ["masked"], "finetune": ["selected"], "rewind": []}
DID |= {"train": ["selected"]}


@pytest.mark.slow
def test_iterative(run):
    result = run(*SMALL[:2], "recipe=iterative", "rounds=3", "budget.compression=20", "plots=true")
    found, records = states(result), result["stages_run"]
    assert_zeros_stay(found, list(found)[2:])
    assert_recorded(result, DID)
    assert [record["round"] for record in records] == [None, *([1] * 3), *([2] * 3), *([3] * 3)]
    left = [record["budget"]["nonzero"] for record in records if record["budget"]]
    total = result["total"]["weights"]
    assert left == [round(total / 20 ** (1 / 3)), round(total / 20 ** (2 / 3)), total // 20]
    assert result["compression"]["weights"] >= 20 and result["accuracy"]["pruned"] == records[-2]["accuracy"]
    assert result["accuracy"]["dense"] == records[0]["accuracy"]
    assert result["accuracy"]["regularized"] == records[-3]["accuracy"]
    assert (
        result["selection"] == f"epoch {records[-1]['selected_epoch']} of finetune-3, selected by validation accuracy"
    )
    folder = Path(result["folder"])
    for name in ("rounds", "curves", "density", "weights"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [name for name in result["stages"] if not name.startswith("prune")]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == trained


@pytest.mark.slow
@pytest.mark.parametrize("to", ["start", "pretrain", "pretrain@1"])
def test_lottery(run, to, tmp_path):
    store = tmp_path / "store"
    how = (*SMALL, "recipe=lottery", f"rewind_to={to}", "prune=percentile", "sensitivity=0.5", f"store={store}")
    result = run(*how, "rounds=2")
    found = states(result)
    if to == "start":
        state = start_of(run)
    elif to == "pretrain":
        state = found["pretrain"]
    else:
        (path,) = (store / "pretrain@1").glob("*.safetensors")
        state = {name.removeprefix("parameters."): tensor for name, tensor in load_file(path).items()}
        short = states(run(*SMALL, "stages=[pretrain]", "schedule.pretrain.epochs=1"))["pretrain"]
        assert not torch.equal(state["fc1.weight"], short["fc1.weight"])  # whose learning rate falls sooner
    for prune, rewind in (("prune", "rewind"), ("prune-2", "rewind-2")):
        for name, tensor in found[rewind].items():
            mask = found[prune][name] != 0 if name.endswith("weight") else True
            assert torch.equal(tensor, state[name] * mask), name
    assert_zeros_stay(found, ["prune", "rewind", "train", "prune-2", "rewind-2", "train-2"])
    assert_recorded(result, DID)
    assert result["nonzero"]["weights"] == pytest.approx(0.25 * result["total"]["weights"], rel=1e-3)
    rates = {}
    with (Path(result["folder"]) / "history.csv").open() as file:
        for row in csv.DictReader(file):
            rates.setdefault(row["stage"], []).append(row["lr"])
    assert rates["pretrain"] == rates["train"][1:] == rates["train-2"][1:]  # anew after rewinding
    more = run(*how, "rounds=3")
    assert more["computed"] == ["prune-3", "rewind-3", "train-3"]
    assert more["keys"].items() >= result["keys"].items()
    assert all(torch.equal(states(more)[name][weight], found[name][weight]) for name in found for weight in state)
    assert more["nonzero"]["weights"] == pytest.approx(0.125 * result["total"]["weights"], rel=1e-3)


@pytest.mark.slow
def test_rounds_share_what_does_not_depend_on_their_strength(run, tmp_path):
    base = (*SMALL, "recipe=iterative", "rounds=2", f"store={tmp_path}/store", "ramp.curve=constant", "ramp.from=0.2")
    first, second = run(*base, "sensitivity=0.5"), run(*base, "sensitivity=0.9")
    assert len(first["computed"]) == 7 and second["computed"] == ["prune-2", "finetune-2"]
    assert run(*base, "sensitivity=0.5")["computed"] == []
    magnitude = run(*SMALL, "recipe=magnitude", f"store={tmp_path}/store")
    assert magnitude["computed"] == ["prune", "finetune"] and magnitude["keys"]["pretrain"] == first["keys"]["pretrain"]
    for changed in (("schedule.regularize.lr=0.5",), ("reg=l1",), ("ramp.curve=linear", "rounds=7")):
        assert run(*SMALL, "recipe=magnitude", f"store={tmp_path}/store", *changed)["computed"] == []


@pytest.mark.slow
def test_magnitude_is_pruning_without_a_regularizer(run):
    result = run(*SMALL, "recipe=magnitude", "sensitivity=0.5")
    assert_zeros_stay(states(result), ["prune", "finetune"])
    assert_recorded(result, DID)
    assert result["name"]["reg"] == "none" and result["accuracy"]["regularized"] == {"validation": None, "test": None}
    assert result["accuracy"]["dense"] == result["stages_run"][0]["accuracy"]
    other = run(*SMALL, "stages=[pretrain,prune,finetune]", "reg=none", "sensitivity=0.5")
    assert other["accuracy"] == result["accuracy"] and other["keys"] == result["keys"]
    with (Path(result["folder"]) / "history.csv").open() as file:
        assert {row["penalty"] for row in csv.DictReader(file) if row["loss"]} == {"0.0"}


@pytest.mark.slow
def test_at_init_prunes_what_was_drawn(run):
    result = run(*SMALL, "recipe=at_init", "sensitivity=0.8")
    found, start = states(result), start_of(run)
    weights = ("fc1.weight", "fc2.weight")
    kept = {name: found["prune"][name] != 0 for name in weights}
    assert all(torch.equal(found["prune"][name], start[name] * kept[name]) for name in weights)
    smallest = min(start[name][kept[name]].abs().min() for name in weights)
    assert all(start[name][~kept[name]].abs().max() < smallest for name in weights)
    assert_zeros_stay(found, ["prune", "train"])
    assert_recorded(result, DID)
    assert result["nonzero"]["weights"] == pytest.approx(0.2 * result["total"]["weights"], rel=1e-3)
    accuracy = result["accuracy"]
    assert accuracy["dense"]["test"] is accuracy["regularized"]["test"] is None
    assert accuracy["pruned"] == result["stages_run"][0]["accuracy"]
    assert accuracy["final"]["test"] > accuracy["pruned"]["test"] + 0.2


@pytest.mark.slow
def test_gradual(run):
    result = run(*SMALL, "recipe=gradual", "sensitivity=0.8", "schedule.regularize.epochs=3")
    assert result["nonzero"]["weights"] == pytest.approx(0.2 * result["total"]["weights"], rel=0.01)
    assert result["accuracy"]["regularized"]["test"] is None and result["name"]["reg"] == "none"
    last = result["stages_run"][-1]
    assert last["selected_epoch"] >= last["final_from"] and last["did"] == ["masked", "selected"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("iterative", ["rounds=2"]),
        ("lottery", ["rounds=2", "rewind_to=pretrain@1"]),
        ("magnitude", []),
        ("at_init", []),
        ("gradual", []),
    ],
)
def test_members_of_recipes_are_each_as_alone(recipe, more, tmp_path):
    from test_launcher import run_jobs

    # Adam would make much of the last bit of a gradient near 0
    common = ("data=digits", "schedule=smoke", "store=null", "threads=1", "precision=float32", "optimizer=sgd", *SMALL)
    common += (f"recipe={recipe}", *more, "reg=none", *(f"schedule.{s}.lr=0.05" for s in ("pretrain", "finetune")))
    differing = [("budget.compression=4", "seed=1"), ("budget.nonzero=3000",)]
    run_jobs(tmp_path / "together", common, differing, stacked=True)
    for number, own in enumerate(differing):
        run_jobs(tmp_path / f"alone{number}", common, [own])
        folders = tmp_path / "together" / str(number), tmp_path / f"alone{number}" / "0"
        together, alone = (json.loads((folder / "result.json").read_text()) for folder in folders)
        assert together["computed_with"]["pretrain" if "pretrain" in together["stages"] else "train"]["members"] == 2
        assert together["nonzero"]["weights"] == alone["nonzero"]["weights"] <= 6000
        for one, other in zip(together["stages_run"], alone["stages_run"]):
            assert one["accuracy"]["test"] == pytest.approx(other["accuracy"]["test"], abs=0.01)
            assert one["nonzero"]["weights"] == other["nonzero"]["weights"]
        for name in together["stages"]:
            one, other = (load_file(folder / "stages" / f"{name}.safetensors") for folder in folders)
            for weight, tensor in one.items():
                assert ((tensor != 0) != (other[weight] != 0)).sum() <= 2, name  # of nearly equal sizes
                assert ((tensor - other[weight]).abs() > 1e-3).sum() <= 4, name


@pytest.fixture
def part_of_mnist(tmp_path, mnist_root):
    """A file of every fifth image of MNIST."""
    whole = {part: mnist(mnist_root, train=part == "train") for part in ("train", "test")}
    arrays = {f"x_{part}": each.data[::5].numpy() for part, each in whole.items()}
    arrays |= {f"y_{part}": each.targets[::5].numpy() for part, each in whole.items()}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")))
def test_every_recipe_runs_on_real_data(run, recipe, part_of_mnist):
    own = yaml.safe_load((ROOT / "conf" / "recipe" / f"{recipe}.yaml").read_text())
    data = ("data=arrays", f"data.root={part_of_mnist}", "data.validation=1000")
    result = run(f"recipe={recipe}", "rounds=2", "budget.compression=10", *data, "plots=false")
    assert result["stages_run"][-1]["nonzero"]["weights"] == result["nonzero"]["weights"]
    # what comes back for dead pixels stays 0, and of few bits what is small becomes 0
    least = 26_000 if recipe in ("set", "quantized") else 26_620
    assert least <= result["nonzero"]["weights"] <= 26_620 and result["accuracy"]["final"]["test"] > 0.6
    assert len(result["stages_run"]) >= len(own.get("stages", ()))
