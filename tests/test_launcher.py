"""The population launcher: Hydra's own suite, and members that are as if they had run alone."""

import contextlib
import csv
import functools
import json
import logging
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, choices, put_finished, slow
from conftest import compose as put_together
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from sparsity import config, experiment
from sparsity.errors import ConfigError, DivergedError
from sparsity.experiment import members as members_of
from sparsity.experiment.plan import Planned
from sparsity.launcher import PopulationLauncher
from sparsity.stages import training

NAME = "population"
SMALL = ("data=digits", "schedule=smoke", "plots=false", "threads=1", "store=null", "precision=float32")
MLP = (*SMALL, "model=mlp", "model.factory.hidden=[12]", "optimizer=sgd")


def test_it_is_found():
    assert PopulationLauncher in Plugins.instance().discover()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [(NAME, [])])
class TestPopulationLauncher(LauncherTestSuite):
    """Hydra's own tests of a launcher."""


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [(NAME, ["hydra.sweeper.max_batch_size=2"])])
class TestPopulationLauncherInBatches(BatchedSweeperTestSuite):
    """Hydra's own tests of a launcher that is given batches."""


@pytest.mark.slow
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", f"hydra/launcher={NAME}"])])
class TestPopulationLauncherAsTyped(IntegrationTestSuite):
    """Hydra's own tests of a launcher in a process of its own."""


# --- equal results ---------------------------------------------------------------------------------------------------


def job(folder, *overrides):
    composed, _ = config.compose(overrides)
    return experiment.Job(config.read(composed), folder, in_sweep=True)


@pytest.fixture
def members(tmp_path):
    """The outcomes of members trained together, and of each trained alone, in folders of their own."""

    def members(common, differing, **how):
        each = [(*common, *own) for own in differing]
        together = experiment.run_members(
            [job(tmp_path / f"together{number}", *own) for number, own in enumerate(each)], **how
        )
        alone = [experiment.run_members([job(tmp_path / f"alone{n}", *own)])[0] for n, own in enumerate(each)]
        return together, alone

    return members


def check_equal(together, alone, images=360):
    """Masks and zeros are the same, weights to what the order of additions explains, accuracies to an image or two."""
    for one, other in zip(together, alone):
        for stage in ("prune", "finetune"):
            left, right = (load_file(f"{result['folder']}/stages/{stage}.safetensors") for result in (one, other))
            for name in left:
                assert torch.equal(left[name] == 0, right[name] == 0), f"{stage}: {name}"
                torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)
        for name in ("dense", "regularized", "pruned", "final"):
            assert abs(one["accuracy"][name]["test"] - other["accuracy"][name]["test"]) <= 2 / images
        assert one["keys"] == other["keys"] and one["compression"] == other["compression"]


DIFFERING = [("seed=0", "sensitivity=0.2"), ("seed=1", "sensitivity=0.5"), ("seed=1", "sensitivity=0.7")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in choices("reg") if name != "none"])
def test_every_regularizer_is_the_same_in_a_population(name, members):
    decay = config.compose([f"reg={name}"])[0].reg.decay
    decays = [f"reg.decay={decay * factor}" for factor in (0.5, 1, 2)]
    together, alone = members(
        (*MLP, f"reg={name}"), [(*own, decay) for own, decay in zip(DIFFERING, decays)], stacked=True
    )
    check_equal(together, alone)
    assert len({result["compression"]["weights"] for result in together}) == 3


@pytest.mark.slow
def test_losses_may_differ_in_their_numbers(members):
    own = [(*each, f"loss.function.smoothing={smoothing}") for each, smoothing in zip(DIFFERING, (0.0, 0.2, 0.6))]
    together, alone = members((*MLP, "loss=label_smoothing"), own, stacked=True)
    check_equal(together, alone)
    assert len({result["accuracy"]["dense"]["test"] for result in together}) == 3


SENSITIVITIES = {  # those that prune some of a network that is hardly trained
    "percentile": (0.3, 0.6, 0.8),
    "threshold": (0.01, 0.02, 0.03),
    "group_threshold": (0.018, 0.02, 0.021),
    "group_std": (0.8, 0.9, 0.95),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("prune"))
def test_every_rule_is_the_same_in_a_population(name, members):
    sensitivities = SENSITIVITIES.get(name, (0.05, 0.2, 0.4))
    differing = [(f"seed={seed}", f"sensitivity={value}") for seed, value in zip((0, 1, 1), sensitivities)]
    together, alone = members((*MLP, f"prune={name}"), differing, stacked=True)
    check_equal(together, alone)
    assert len({result["compression"]["weights"] for result in together}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", [["model=lenet5"], ["model=torchvision", "model.factory.name=mnasnet0_5"]])
def test_networks_with_convolutions_are_the_same_or_run_singly(model, members):
    common = (*SMALL, "optimizer=sgd", "stages=[pretrain,prune]", "schedule.pretrain.epochs=1", *model)
    together, alone = members(common, [("seed=0",), ("seed=1",)], stacked=True)
    for one, other in zip(together, alone):
        assert abs(one["accuracy"]["final"]["test"] - other["accuracy"]["final"]["test"]) <= 4 / 360
        left, right = (load_file(f"{result['folder']}/stages/pretrain.safetensors") for result in (one, other))
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_floats_of_a_method_may_differ(members):
    common = (*MLP, "reg=transformed_l1", "stages=[pretrain,regularize,prune]")
    jobs = [("reg.penalty.a=0.5",), ("reg.penalty.a=2.0",)]
    together, alone = members(common, jobs, stacked=True)
    assert [result["accuracy"] for result in together] == [result["accuracy"] for result in alone]
    assert together[0]["keys"]["pretrain"] == together[1]["keys"]["pretrain"]
    assert together[0]["computed"] == ["pretrain", "regularize", "prune"]
    assert together[1]["computed"] == ["regularize", "prune"]
    assert together[0]["layers"] != together[1]["layers"]


@pytest.mark.slow
def test_layers_have_sensitivities_of_each_members_own(members):
    together, alone = members(MLP, [("prune.layers.fc1=0.2",), ("prune.layers.fc1=0.6",)], stacked=True)
    check_equal(together, alone)
    cuts = [{layer["name"]: layer["threshold"] / layer["std"] for layer in one["layers"]} for one in together]
    assert [cut["fc1.weight"] for cut in cuts] == pytest.approx([0.2, 0.6], rel=1e-4)
    assert cuts[0]["fc2.weight"] == pytest.approx(cuts[1]["fc2.weight"], rel=1e-4)


@pytest.mark.slow
def test_one_after_another_is_each_alone_to_the_bit(members):
    differing = [(*own, f"reg.decay={decay}") for own, decay in zip(DIFFERING[:2], (1e-4, 1e-2))]
    together, alone = members(MLP, differing, stacked=False)
    for one, other in zip(together, alone):
        left, right = (load_file(f"{result['folder']}/model.safetensors") for result in (one, other))
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_population_of_one_and_of_none(members):
    together, alone = members(MLP, DIFFERING[:1])
    assert together[0]["accuracy"] == alone[0]["accuracy"]
    assert experiment.run_members([]) == []


@pytest.mark.slow
def test_a_member_has_its_own_selected_epoch_and_the_network_of_it(tmp_path, monkeypatch):
    """Finetuning is given other selected networks than the last ones."""
    run_loop = training.run_loop

    def selecting(population, splits, loop, generators, *, select, **more):
        trained = run_loop(population, splits, loop, generators, select=select, **more)
        if not select:
            return trained
        selected = trained.last.map(lambda tensor: tensor * 0)
        return replace(trained, selected=selected, selected_epoch=list(range(len(generators))))

    monkeypatch.setattr(training, "run_loop", selecting)
    jobs = [job(tmp_path / str(number), *MLP, *own) for number, own in enumerate(DIFFERING)]
    outcomes = experiment.run_members(jobs, stacked=True)
    assert [outcome["accuracy"]["selected"]["epoch"] for outcome in outcomes] == [0, 1, 2]
    for outcome in outcomes:
        selected = outcome["accuracy"]["selected"]
        with open(f"{outcome['folder']}/history.csv", newline="") as file:
            tests = [float(row["test"]) for row in csv.DictReader(file) if row["stage"] == "finetune"]
        assert selected["test"] == pytest.approx(tests[selected["epoch"]])
        state = load_file(f"{outcome['folder']}/model.safetensors")
        assert not any(tensor.any() for tensor in state.values())
        assert outcome["nonzero"]["weights"] == 0


# --- groups and failures ---------------------------------------------------------------------------------------------


def run_jobs(tmp_path, common, differing, **how):
    composed = []
    for number, own in enumerate(differing):
        each, hydra = config.compose([*common, *own])
        OmegaConf.set_readonly(hydra, False)
        with open_dict(each), open_dict(hydra):
            hydra.sweep.dir, hydra.sweep.subdir = str(tmp_path), str(number)
            each.hydra = hydra
        composed.append(each)
    return experiment.run_jobs(composed, listen=lambda members: contextlib.nullcontext(), **how)


KINDS = {  # what differs between two runs, and whether they are of one population
    "seed=1": True,
    "sensitivity=0.7": True,
    "reg.decay=0.5": True,
    "ramp.from=0.05": True,
    "rounds=3": False,
    "schedule.finetune.lr=0.5": False,
    "schedule.batch_size=7": False,
    "prune.layers.fc1=0.3": False,  # which layers have one is shared
    "prune.exclude=[fc1]": False,
    "prune.scope=network": False,
    "optimizer.eps=0.5": False,
    "recipe.finetune.hold=masks": False,
    "budget.nonzero=50": False,
}


def kind_of(*overrides):
    return experiment._kind_of(config.read(put_together(overrides)[0], typed=overrides))


@pytest.mark.parametrize("change", KINDS)
def test_members_of_one_population_differ_in_numbers_alone(change):
    base = ("recipe=iterative", "rounds=2")
    other = [text for text in base if text.partition("=")[0] != change.partition("=")[0]]
    assert (kind_of(*base) == kind_of(*other, change)) == KINDS[change]


def test_members_of_one_population_may_differ_in_budgets_and_not_in_states():
    kind = functools.partial(kind_of, "recipe=lottery", "rounds=2")
    assert kind("budget.nonzero=50") == kind("budget.compression=9", "budget.macs=70") != kind()
    assert kind("prune.layers.fc1=0.3") == kind("prune.layers.fc1=0.4")
    assert kind("rewind_to=pretrain@1") != kind("rewind_to=pretrain@2") != kind()
    assert kind("reg=l1") == kind()  # nothing reads it


@pytest.mark.slow
def test_what_differs_in_more_than_numbers_splits_the_group(tmp_path, monkeypatch):
    groups = []
    train = experiment.run_members
    monkeypatch.setattr(experiment, "run_members", lambda jobs, **how: groups.append(len(jobs)) or train(jobs, **how))
    common = (*MLP, "stages=[pretrain,regularize,prune]")
    common += tuple(f"schedule.{stage}.epochs=1" for stage in ("pretrain", "regularize"))
    differing = [
        ("seed=1",),
        ("reg=l1",),
        ("seed=2", "sensitivity=0.3"),
        ("model.factory.hidden=[5]",),
        ("reg.decay=1",),
        ("optimizer=adam",),
    ]
    outcomes = run_jobs(tmp_path, common, differing)
    assert sorted(groups) == [1, 1, 1, 3] and all(len(outcome) == 2 for outcome in outcomes)


@pytest.mark.slow
def test_a_job_sees_its_own_hydra(tmp_path):
    common = (*MLP, "stages=[pretrain]", "schedule.pretrain.epochs=1", "seed=${hydra:job.num}")
    run_jobs(tmp_path, common, [("hydra.job.num=3",), ("hydra.job.num=4",)])
    assert [json.loads((tmp_path / name / "result.json").read_text())["seed"] for name in "01"] == [3, 4]


@pytest.mark.slow
def test_an_optimizer_that_mixes_entries_takes_members_one_at_a_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training, "is_elementwise", lambda optimizer: False)
    with caplog.at_level("INFO"):
        run_jobs(tmp_path, (*MLP, "stages=[pretrain]"), [("seed=0",), ("seed=1",)], stacked=True)
    assert "2 members are trained one after another: the optimizer would mix them" in caplog.text


@pytest.mark.slow
def test_a_network_that_cannot_be_mapped_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(members_of, "try_step", raising(after=2))
    with caplog.at_level("INFO"):
        run_jobs(tmp_path, (*MLP, "stages=[pretrain]"), [("seed=0",), ("seed=1",)], stacked=True)
    assert "one after another: the network cannot be mapped over members (randomness)" in caplog.text


def raising(after):
    """A `try_step` that refuses several members."""

    def try_step(population, *rest, **more):
        if population.num_members >= after:
            raise RuntimeError("randomness")

    return try_step


@pytest.mark.parametrize("number", [0, -1])
def test_a_limit_below_one_is_refused(number, capsys):
    with pytest.raises(SystemExit, match="2"):
        PopulationLauncher(max_members=number)
    assert f"hydra.launcher.max_members must be a whole number ≥ 1, got {number}" in capsys.readouterr().err


def test_a_member_that_diverges_fails_alone(tmp_path):
    outcomes = run_jobs(tmp_path, MLP, [("reg.decay=1e-5",), ("reg.decay=1e30",), ("reg.decay=1e-4",)], stacked=True)
    assert isinstance(outcomes[1], DivergedError) and "regularize" in str(outcomes[1])
    assert all(len(outcomes[index]) == 2 for index in (0, 2))
    assert "NaN or infinite" in json.loads((tmp_path / "1" / "failure.json").read_text())["error"]
    assert [(tmp_path / str(index) / "result.json").exists() for index in range(3)] == [True, False, True]


@pytest.mark.slow
def test_a_member_with_a_mistake_fails_alone(tmp_path):
    (tmp_path / "2").mkdir()
    put_finished(tmp_path / "2")
    before = (tmp_path / "2" / "result.json").read_text()
    outcomes = run_jobs(tmp_path, MLP, [("sensitivity=0.1",), ("sensitivity=-1",), ("seed=5",)])
    assert len(outcomes[0]) == 2 and isinstance(outcomes[1], ConfigError) and "holds a finished run" in str(outcomes[2])
    assert (tmp_path / "2" / "result.json").read_text() == before


@pytest.mark.slow
def test_a_population_too_large_for_memory_is_split(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(members_of, "_fitting", lambda *arguments: 2)
    with caplog.at_level("INFO"):
        outcomes = run_jobs(tmp_path, MLP, [(f"seed={seed}",) for seed in range(3)], stacked=True)
    assert "3 members are trained 2 at a time: more do not fit" in caplog.text
    assert all(len(outcome) == 2 for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sizes"),
    [({"stacked": True, "limit": 2}, [2, 2, 1]), *slow(({"stacked": True}, [5]), ({"stacked": False}, [1] * 5))],
)
def test_members_are_trained_as_many_at_a_time_as_is_asked(how, sizes, tmp_path, monkeypatch):
    found = trained_at_a_time(monkeypatch)
    run_jobs(tmp_path, (*MLP, "stages=[pretrain]"), [(f"seed={seed}",) for seed in range(5)], **how)
    assert found == sizes


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False])
def test_what_is_faster_is_asked_of_a_measurement(pays, tmp_path, monkeypatch):
    found = trained_at_a_time(monkeypatch)
    together = 1.5 if pays else 1.9  # of the time of one member, for two
    monkeypatch.setattr(members_of, "_seconds", lambda some, *given: together if some.num_members == 2 else 1.0)
    run_jobs(tmp_path, (*MLP, "stages=[pretrain]"), [("seed=0",), ("seed=1",)])
    assert found == ([2] if pays else [1, 1])


def trained_at_a_time(monkeypatch):
    """How many members each stage is run with."""
    run, sizes = Planned.run, []

    def noted(stage, before, context):
        sizes.append(before.num_members)
        return run(stage, before, context)

    monkeypatch.setattr(Planned, "run", noted)
    return sizes


def test_settings_reach_the_task_and_what_is_said_of_a_member_its_log_alone(tmp_path):
    asked = []

    def task(config):
        raise AssertionError("jobs run together")

    def together(jobs, listen, **how):
        asked.append((how, [job.seed for job in jobs]))
        with listen([0, 1]):
            logging.getLogger("sparsity").warning("said of both")
            logging.getLogger("sparsity").warning("said of one", extra={"member": 1})
        return [(0.5,), DivergedError("lost")]

    task.together = together
    with initialize_config_dir(config_dir=str(ROOT / "conf")):
        own = PopulationLauncher(stacked=True, max_members=3)
        composed = compose("config", [f"hydra.sweep.dir={tmp_path}", "hydra.job.name=main"], return_hydra_config=True)
        OmegaConf.set_readonly(composed.hydra, False)
        loader = GlobalHydra.instance().config_loader()
        context = SimpleNamespace(config_loader=loader, execution_whitelist=None, callbacks=Callbacks())
        own.setup(hydra_context=context, task_function=task, config=composed)
        returns = own.launch([["seed=7"], ["seed=8"]], initial_job_idx=4)
    assert asked == [({"stacked": True, "limit": 3}, [7, 8])]
    assert returns[0].return_value == (0.5,) and returns[1].status is JobStatus.FAILED
    first, second = ((tmp_path / number / "main.log").read_text() for number in "45")
    assert "said of both" in first and "said of one" not in first
    assert "said of both" in second and "said of one" in second and "lost" in second


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_population(tmp_path, monkeypatch, caplog):
    run, sizes = Planned.run, []

    def crowded(stage, before, context):
        sizes.append(before.num_members)
        if before.num_members > 2:
            raise torch.OutOfMemoryError("no room")
        return run(stage, before, context)

    monkeypatch.setattr(Planned, "run", crowded)
    with caplog.at_level("INFO"):
        outcomes = run_jobs(
            tmp_path, (*MLP, "stages=[pretrain]"), [(f"seed={seed}",) for seed in range(3)], stacked=True
        )
    assert sizes == [3, 2, 1] and "trained 2 at a time" in caplog.text and all(len(o) == 2 for o in outcomes)


def test_the_memory_of_a_member_is_counted(tmp_path, monkeypatch):
    jobs = [job(tmp_path / str(seed), *MLP, f"seed={seed}") for seed in range(2)]
    monkeypatch.setattr(members_of, "free_bytes", lambda device: 4e6)
    splits, _ = experiment.load_data(jobs[0].run)
    record = experiment._record(jobs, [{}, {}], splits, torch.device("cpu"), None, lambda *given: 1)
    loop = record.stages[0].loop(record.population, record.context)
    fitting = members_of._fitting(record.population, record.context, loop)
    weights, units = 784 * 12 + 12 + 12 * 10 + 10, 22
    assert fitting == int(2e6 / (4 * (10 * weights + loop.batch_size * (6 * units + 784))))


@pytest.mark.slow
def test_as_typed(tmp_path):
    """A sweep with the launcher gives what the sweep gives in process: folders, logs, summary, exit status."""

    def sweep(name, *more):
        arguments = [
            "-m",
            *MLP,
            "schedule.pretrain.lr=1e-3,2e-3,1e30",
            "seed=0,1",
            f"hydra.sweep.dir={tmp_path / name}",
            *more,
        ]
        return subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True)

    plain, stacked = sweep("plain"), sweep("stacked", f"hydra/launcher={NAME}", "hydra.launcher.stacked=false")
    assert plain.returncode == stacked.returncode == 2 and "Traceback" not in stacked.stderr, stacked.stderr
    tables = []
    for name in ("plain", "stacked"):
        with (tmp_path / name / "summary.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [key for key in rows[0] if not key.startswith("seconds.") and key != "folder"]
        tables.append([{key: row[key].partition(" (the last good state is in")[0] for key in kept} for row in rows])
    assert tables[0] == tables[1] and [row["status"] for row in tables[0]] == ["done"] * 4 + ["failed"] * 2
    for number in range(4):
        assert "pretrain" in (tmp_path / "stacked" / str(number) / "main.log").read_text()
        assert (tmp_path / "stacked" / str(number) / ".hydra" / "overrides.yaml").exists()
    assert "schedule.pretrain.lr" in (tmp_path / "stacked" / "4" / "main.log").read_text()
