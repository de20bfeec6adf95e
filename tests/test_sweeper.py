"""The search: what it asks for, how it resumes, and what it refuses; no member is trained here."""

import copy
import dataclasses
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import optuna
import pytest
from conftest import ROOT, choices, put_finished, slow
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from sparsity import config, nodes
from sparsity.errors import ConfigError, DivergedError, SparsityError
from sparsity.sweeper import search, space, storage
from sparsity.sweeper.search import Search
from sparsity.sweeper.storage import storage_of

JOURNAL = "storage=journal:///studies.log"  # quicker than a database
BASE = ("data=digits", "model=mlp", "model.factory.hidden=[8]", "schedule=smoke")


COMPOSED = {}  # by what was asked: composing takes most of the time of a search without members


def once(asked, compose):
    """What was composed before for the same, or is now; a copy, that may be changed."""
    if asked not in COMPOSED:
        COMPOSED[asked] = compose()
    return copy.deepcopy(COMPOSED[asked])


@dataclasses.dataclass
class Context:
    """What a sweeper needs of Hydra."""

    composed: tuple[str, ...]

    @property
    def config_loader(self):
        return self

    def load_sweep_config(self, master, overrides):
        loader = GlobalHydra.instance().config_loader()
        return once((self.composed, *overrides), lambda: loader.load_sweep_config(master, overrides))


class Launcher:
    """Answers for members at once, leaves their results, and remembers what it was asked."""

    def __init__(self, answer, folder):
        self.answer, self.folder, self.asked, self.batches, self.first = answer, folder, [], [], []

    def launch(self, overrides, initial_job_idx):
        self.batches.append(len(overrides)), self.first.append(initial_job_idx)
        returns = []
        for each in overrides:
            settings = dict(entry.split("=", 1) for entry in each)
            self.asked.append(settings)
            job = JobReturn()
            try:
                job.return_value, job.status = self.answer(settings), JobStatus.COMPLETED
                if subdir := settings.get("hydra.sweep.subdir"):
                    folder = self.folder / subdir.strip('"')
                    folder.mkdir(exist_ok=True)
                    put_finished(folder)
            except Exception as error:
                job.return_value, job.status = error, JobStatus.FAILED
            returns.append(job)
        return returns


def trade(settings):
    """A front of accuracy against compression."""
    cut = float(settings["sensitivity"])
    return (1 - cut * cut / 2, 1 + 10 * cut)


@pytest.fixture
def searching(tmp_path, monkeypatch):
    """Runs a search with the overrides given and gives its launcher and its study."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").mkdir()

    def searching(*overrides, answer=trade, n_trials=6):
        config.register()
        typed = ["search=pareto", *BASE, *overrides]
        own = [f"hydra.sweeper.n_trials={n_trials}", "hydra.sweep.dir=sweep", f"hydra.sweeper.{JOURNAL}"]
        fixed = [entry for entry in typed if entry.startswith("hydra.") or not config.swept_keys([entry])]
        asked = (*own, *fixed)
        with initialize_config_dir(config_dir=str(ROOT / "conf")):
            composed = once(asked, lambda: compose("config", overrides=list(asked), return_hydra_config=True))
            OmegaConf.set_readonly(composed.hydra, False)
            composed.hydra.overrides.task = [entry for entry in typed if not entry.startswith("hydra.")]
            settings = {key: composed.hydra.sweeper[key] for key in composed.hydra.sweeper if key != "_target_"}
            runner = Search(**settings)
            runner.config, runner.launcher = composed, Launcher(answer, Path(composed.hydra.sweep.dir))
            runner.hydra_context = Context(asked)
            runner.sweep(list(composed.hydra.overrides.task))
        study = optuna.load_study(study_name=None, storage=storage_of(runner.storage))
        return runner.launcher, study

    return searching


def points(asked):
    return [(settings["reg.decay"], settings["sensitivity"]) for settings in asked]


def folders(asked):
    return [settings["hydra.sweep.subdir"].strip('"') for settings in asked]


@pytest.mark.slow
def test_a_search_runs_n_trials_in_all(searching):
    first, study = searching(n_trials=4)
    assert folders(first.asked) == ["0", "1", "2", "3"]
    again, _ = searching(n_trials=4)
    assert again.asked == []
    more, study = searching(n_trials=7)
    assert len(more.asked) == 3 and len(study.trials) == 7
    assert len(set(points(first.asked + more.asked))) == 7
    assert folders(more.asked) == ["4", "5", "6"]
    values = [trial.values for trial in study.trials]
    assert values == [list(trade(settings)) for settings in first.asked + more.asked]
    kept = OmegaConf.load("sweep/optimization_results.yaml").solutions
    best = sorted(study.best_trials, key=lambda trial: trial.values)
    assert sorted(list(each["values"]) for each in kept) == [trial.values for trial in best]
    assert {each["params"]["sensitivity"] for each in kept} == {trial.params["sensitivity"] for trial in best}


def test_members_are_handed_over_n_jobs_at_a_time(searching):
    launcher, _ = searching("hydra.sweeper.n_jobs=4", n_trials=6)
    assert launcher.batches == [4, 2] and launcher.first == [0, 4] and len(set(points(launcher.asked))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("search"))
def test_every_sampler_searches_and_repeats_no_point(name, searching):
    first, _ = searching(f"search={name}", n_trials=3)
    more, study = searching(f"search={name}", n_trials=6)
    assert len(set(points(first.asked + more.asked))) == 6
    for settings in first.asked + more.asked:
        assert 1e-5 <= float(settings["reg.decay"]) <= 1e-3 and 0.01 <= float(settings["sensitivity"]) <= 1
    assert [str(direction) for direction in study.directions] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sequence_goes_on_where_it_was(searching):
    asked = [entry for number in (3, 6) for entry in searching("search=quasi_random", n_trials=number)[0].asked]
    _, study = searching("search=quasi_random", n_trials=6)
    other = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=0, scramble=True))
    for settings in asked:  # one process that asks for all
        trial = other.ask(study.trials[0].distributions)
        other.tell(trial, 0.0)
        if trial.number > 0:  # the first one comes before the ranges are known to the sampler
            assert {key: str(value) for key, value in trial.params.items()}.items() <= settings.items()


@pytest.mark.slow
def test_two_searches_do_not_ask_at_once(searching, tmp_path):
    with filelock.FileLock(tmp_path / ".studies.log.lock"):
        found = []
        other = threading.Thread(target=lambda: found.append(searching(n_trials=1)))
        other.start()
        other.join(1.5)
        assert other.is_alive() and not found
    other.join(60)
    assert len(found[0][0].asked) == 1


@pytest.mark.slow
def test_the_same_seed_asks_for_the_same_points(searching, tmp_path):
    first, _ = searching(n_trials=3)
    os.remove(tmp_path / "studies.log")
    again, _ = searching(n_trials=3)
    os.remove(tmp_path / "studies.log")
    other, _ = searching("hydra.sweeper.sampler.seed=1", n_trials=3)
    assert points(first.asked) == points(again.asked) and points(first.asked) != points(other.asked)


@pytest.mark.slow
def test_ranges_stand_beside_their_numbers_and_the_command_line_wins(searching):
    _, study = searching("reg=group_hs", "sensitivity=interval(0.3,0.4)")
    own = config.compose(["reg=group_hs"])[0].reg.search.decay
    assert own == "tag(log, interval(1e-4, 1e-1))"
    space = study.trials[0].distributions
    assert (space["reg.decay"].low, space["reg.decay"].high, space["reg.decay"].log) == (1e-4, 1e-1, True)
    assert (space["sensitivity"].low, space["sensitivity"].high, space["sensitivity"].log) == (0.3, 0.4, False)
    fixed, study = searching("reg.decay=0.5", "hydra.sweeper.storage=journal:///other.log")
    assert {settings["reg.decay"] for settings in fixed.asked} == {"0.5"}
    assert "reg.decay" not in study.trials[0].params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "ranged"),
    [
        (["recipe=magnitude"], ["sensitivity"]),
        (["recipe=iterative", "rounds=2"], ["reg.decay", "sensitivity"]),
        (["recipe=lottery", "reg=hs"], ["sensitivity"]),
        (["budget.compression=50"], ["reg.decay"]),
        (["budget.compression=tag(log,interval(10,300))"], ["budget.compression", "reg.decay"]),
        (["recipe=magnitude", "budget.nonzero=int(interval(10,300))"], ["budget.nonzero"]),
        (["stages=[pretrain,regularize]"], ["reg.decay"]),
    ],
)
def test_numbers_that_no_stage_reads_are_not_searched(overrides, ranged, searching):
    _, study = searching(*overrides, answer=lambda _: (0.5, 2.0), n_trials=1)
    assert sorted(study.trials[0].distributions) == ranged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["recipe=magnitude", "budget.compression=10"],
            "nothing to search: give a range, such as 'budget.compression=tag",
        ),
        (["recipe=magnitude", "reg.decay=interval(1e-5,1e-3)"], "reg.decay is searched, and no stage reads it"),
        (["rounds=range(1,4)"], "rounds is searched, and no stage reads it"),
        (["budget.compression=10", "sensitivity=interval(0.1,1)"], "budget.compression takes the place of sensitivity"),
        (["budget.compression=interval(0.1,3)"], "budget.compression must be a number ≥ 1, got 0.1"),
        (["budget.nonzero=interval(1,3)"], "budget.nonzero must be a whole number .*: give 'budget.nonzero=range"),
    ],
)
def test_a_search_over_what_has_no_effect_is_refused(overrides, line, searching):
    with pytest.raises(ConfigError, match=line):
        searching(*overrides, n_trials=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("reg"))
def test_every_regularizer_can_be_searched(name, searching):
    launcher, _ = searching(f"reg={name}", n_trials=1)
    assert ("reg.decay" in launcher.asked[0]) == (name != "none") and "sensitivity" in launcher.asked[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("prune"))
def test_every_rule_can_be_searched(name, searching):
    _, study = searching(f"prune={name}", n_trials=1)
    interval = nodes.sensitivity_range(config.read(config.compose([f"prune={name}"])[0]).prune)
    space = study.trials[0].distributions["sensitivity"]
    assert space.low in interval and space.high in interval


@pytest.mark.slow
def test_objectives_and_their_directions(searching):
    _, study = searching("objectives=[accuracy,macs]", n_trials=1)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "macs"]
    _, study = searching(
        "objectives=[nonzero]", "hydra.sweeper.storage=sqlite:///deep/one.db", answer=lambda _: (5.0,), n_trials=1
    )
    assert [direction.name for direction in study.directions] == ["MINIMIZE"] and study.best_value == 5


# --- going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a search as a signal does."""


def dying(after):
    """An objective whose process dies in a member."""
    count = iter(range(100))

    def answer(settings):
        if next(count) == after:
            raise Killed
        return trade(settings)

    return answer


@pytest.mark.slow
def test_a_trial_whose_owner_is_gone_is_run_again_in_its_folder(searching, monkeypatch):
    monkeypatch.setattr(search, "this_process", lambda: {"host": socket.gethostname(), "pid": 2**22, "started": 0.0})
    for after in (2, 1):
        with pytest.raises(Killed):
            searching(answer=dying(after))
    _, study = searching()
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    closed = [trial for trial in study.trials if trial.state.name != "COMPLETE"]
    assert len(done) == 6 and all(trial.user_attrs["orphan"] for trial in closed) and len(closed) == 2
    assert sorted(trial.user_attrs["folder"] for trial in done) == list("012345")
    for trial in closed:
        again = [other for other in done if other.params == trial.params]
        assert [other.user_attrs["folder"] for other in again] == [trial.user_attrs["folder"]]
    assert len({tuple(trial.params.values()) for trial in done}) == 6


@pytest.mark.slow
def test_finished_members_whose_results_are_gone_are_run_again(searching, tmp_path):
    first, _ = searching()
    for gone in ("1", "4"):
        (tmp_path / "sweep" / gone / "result.json").unlink()
    again, study = searching("hydra.sweeper.n_jobs=2", n_trials=7)
    assert again.asked[:2] == [first.asked[1], first.asked[4]] and folders(again.asked) == ["1", "4", "6"]
    assert again.batches == [2, 1] and len(study.trials) == 7
    assert searching(n_trials=7)[0].asked == []
    (tmp_path / "sweep" / "2" / "result.json").unlink()
    with pytest.raises(SparsityError, match="1 of 7 members failed; member 2: a reason"):
        searching(n_trials=7, answer=failing(SparsityError("a reason"), {0}))
    named, _ = searching("hydra.sweep.subdir=${hydra.job.override_dirname}", n_trials=7)
    assert named.asked == []  # where the user names folders, nobody else knows them


@pytest.mark.parametrize("method", ["set_user_attr", *slow("_suggest")])
@pytest.mark.parametrize("second", [0, *slow(1, 2, 3)])
def test_a_search_that_dies_while_it_asks_loses_no_point_and_no_folder(method, second, searching, monkeypatch):
    monkeypatch.setattr(search, "this_process", lambda: {"host": socket.gethostname(), "pid": 2**22, "started": 0.0})
    real = getattr(search.Trial, method)
    for after in (5, second):  # the second one dies where the first one's point is asked for again
        calls = iter(range(100))

        def killed(*arguments, calls=calls, after=after):
            if next(calls) == after:
                raise Killed
            return real(*arguments)

        monkeypatch.setattr(search.Trial, method, killed)
        with pytest.raises(Killed):
            searching()
    monkeypatch.setattr(search.Trial, method, real)
    _, study = searching()
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    known = [trial.params for trial in study.trials if trial.params]
    assert sorted(trial.user_attrs["folder"] for trial in done) == list("012345")
    assert len({tuple(trial.params.values()) for trial in done}) == 6
    assert all(any(point.items() <= trial.params.items() for trial in done) for point in known)


def test_a_trial_that_another_process_runs_is_left_alone(searching):
    with pytest.raises(Killed):
        searching(answer=dying(2))  # this process is its owner, and lives
    launcher, study = searching()
    assert len(launcher.asked) == 3
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING"] + ["COMPLETE"] * 3


def test_owners_are_told_from_processes_of_the_same_number():
    own = search.this_process()
    assert not search.is_gone(own) and search.is_gone({**own, "started": own["started"] - 100})
    assert search.is_gone(None) and not search.is_gone({**own, "host": "elsewhere", "pid": 2**22})


# --- failures --------------------------------------------------------------------------------------------------------


def failing(error, when):
    count = iter(range(100))

    def answer(settings):
        if next(count) in when:
            raise error
        return trade(settings)

    return answer


@pytest.mark.parametrize(
    "error", [DivergedError("nan in epoch 2"), *slow(RuntimeError("out of memory"), MemoryError("all"))]
)
def test_a_member_that_fails_takes_no_other_down(error, searching, caplog):
    with pytest.raises(SparsityError, match=f"1 of 6 members failed; member 1: .*{error}"):
        searching(answer=failing(error, {1}))
    assert f"member 1 failed: {'' if isinstance(error, SparsityError) else type(error).__name__ + ': '}{error}" in (
        caplog.text
    )
    launcher, study = searching()
    assert launcher.asked == []
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", *["COMPLETE"] * 4]


def test_a_network_without_weights_is_a_failure(searching):
    answers = iter([trade({"sensitivity": 0.5}), (0.1, float("nan")), *[trade({"sensitivity": 0.5})] * 4])
    with pytest.raises(SparsityError, match="compression has no value: nothing is left"):
        searching(answer=lambda _: next(answers))


def test_a_mistake_that_no_member_survives_ends_the_search(searching):
    with pytest.raises(ConfigError, match="no data"):
        searching(answer=failing(ConfigError("no data"), {0}))
    launcher, study = searching()
    assert len(launcher.asked) == 6 and len({tuple(t.params.values()) for t in study.trials if t.values}) == 6


@pytest.mark.slow
def test_mistakes_in_a_row_end_the_search_and_one_does_not(searching):
    with pytest.raises(SparsityError, match="1 of 6 members failed"):
        searching(answer=failing(ConfigError("this point"), {2}))
    with pytest.raises(ConfigError, match="disk"):
        searching(answer=failing(ConfigError("disk"), {1, 2, 3}), n_trials=20)
    with pytest.raises(SparsityError, match="3 of 29 members failed"):  # never three in a row
        searching(answer=failing(ConfigError("these points"), {1, 3, 5}), n_trials=29)


@pytest.mark.slow
def test_the_failure_rate_can_end_it(searching):
    with pytest.raises(SparsityError, match=r"more than hydra.sweeper.max_failure_rate=0.3"):
        searching("hydra.sweeper.max_failure_rate=0.3", answer=failing(RuntimeError("no"), {1}))


def test_a_storage_that_fails_ends_the_search_with_a_line(searching, monkeypatch):
    def full(self, study, batch, overrides):
        raise optuna.exceptions.StorageInternalError from OSError(28, "No space left on device")

    monkeypatch.setattr(Search, "_launch", full)
    with pytest.raises(ConfigError, match=r"storage=.* cannot be written \(.*No space left.*the same command resumes"):
        searching()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials must be a whole number ≥ 1, got 0"),
        ("hydra.sweeper.n_trials=-3", "hydra.sweeper.n_trials must be a whole number ≥ 1, got -3"),
        ("hydra.sweeper.n_jobs=0", "hydra.sweeper.n_jobs must be a whole number ≥ 1, got 0"),
        ("reg.decay=interval(1e-3,1e-5)", r"reg.decay=interval\(1e-3,1e-5\) is no range to search"),
        ("reg.decay=tag(log,interval(0,1))", "reg.decay=.* is no range to search.*log"),
        ("sensitivity=interval(0.5,0.5)", "holds one value only: give sensitivity=0.5"),
        ("sensitivity=range(1,1)", "sensitivity=.* is no range to search"),
        ("sensitivity=interval(-1,1)", "sensitivity must be a number ≥ 0, got -1"),
        (
            "objectives=[accuracy,speed]",
            "objectives.* must be one of accuracy, compression, macs, nonzero, bytes; got 'speed'",
        ),
        ("reg.deacy=interval(1,2)", "reg.deacy is no key: did you mean reg.decay"),
        ("reg=hs,l1", "reg is searched, and each of its choices has a range of its own for reg.decay"),
        ("hydra.sweeper.storage=sqlite:////dev/null/x.db", "hydra.sweeper.storage=.* cannot be opened"),
        ("hydra.sweeper.storage=nonsense", "hydra.sweeper.storage=nonsense cannot be opened"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(override, words, searching, tmp_path):
    with pytest.raises(ConfigError, match=words) as error:
        searching(override, n_trials=2)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("**/*.db"))


@pytest.mark.slow
def test_regularizers_can_be_searched_with_one_range_for_all(searching):
    launcher, _ = searching("reg=hs,l1", "reg.decay=tag(log,interval(1e-5,1e-4))")
    assert {settings["reg"] for settings in launcher.asked} == {"hs", "l1"}


@pytest.mark.slow
def test_a_sampler_that_cannot_be_made_is_refused_in_a_line(searching):
    with pytest.raises(ConfigError, match=r"hydra.sweeper.sampler cannot be made: .*population_size"):
        searching("search=nsga2", "hydra.sweeper.sampler.population_size=1")
    with pytest.raises(ConfigError, match=r"hydra/sweeper/sampler=grid needs no search"):
        runner = Search.__new__(Search)
        runner.sampler_config = OmegaConf.create({"_target_": "optuna.samplers.GridSampler", "_partial_": True})
        runner._sampler(0, {})


def test_nothing_to_search(searching):
    with pytest.raises(ConfigError, match="has nothing to search"):
        searching("reg.decay=0.1", "sensitivity=0.1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *slow(
            (
                "sensitivity=interval(0.1,0.2)",
                r"searches sensitivity in tag\(log, interval\(0.01, 1\)\), asked is interval",
            ),
        ),
        pytest.param("reg.decay=0.1", "searches reg.decay in .*, asked is no range", marks=pytest.mark.slow),
        pytest.param("objectives=[accuracy,macs]", "has objectives=", marks=pytest.mark.slow),
        pytest.param("seed=1", "was made for", marks=pytest.mark.slow),
    ],
)
def test_a_named_study_is_of_one_search(override, words, searching):
    named = "hydra.sweeper.study_name=mine"
    searching(named, n_trials=1)
    with pytest.raises(ConfigError, match=words):
        searching(named, override, n_trials=2)
    launcher, _ = searching(named, "plots=false", "threads=1", n_trials=2)
    assert len(launcher.asked) == 1


@pytest.mark.slow
def test_files_keep_studies(searching, tmp_path):
    for url in ("journal:///deep/studies.log", f"sqlite:///{tmp_path}/deep/studies.db"):
        searching(f"hydra.sweeper.storage={url}", n_trials=2)
        launcher, study = searching(f"hydra.sweeper.storage={url}", n_trials=3)
        assert len(launcher.asked) == 1 and len(study.trials) == 3


# --- points ----------------------------------------------------------------------------------------------------------

FINITE = ("reg.decay=1e-4,1e-3", "sensitivity=range(0.2,0.6,0.2)", "seed=range(0,2)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pareto", *slow("random", "nsga2", "quasi_random", "gaussian_process")])
def test_no_point_of_a_finite_space_is_proposed_twice_and_its_end_is_told(name, searching, caplog):
    caplog.set_level("INFO")
    with pytest.raises(SparsityError, match="1 of 5 members failed"):
        searching(f"search={name}", *FINITE, n_trials=5, answer=failing(DivergedError("nan"), {1}))
    assert "points of the search are run" not in caplog.text
    more, study = searching(f"search={name}", *FINITE, "hydra.sweeper.n_jobs=2", n_trials=20)
    assert "all 8 points of the search are run: 8 members instead of 20" in caplog.text
    done = [tuple(trial.params.values()) for trial in study.trials]
    assert len(more.asked) == 3 and len(done) == len(set(done)) == 8
    assert {settings["sensitivity"] for settings in more.asked} <= {"0.2", "0.4"}
    assert searching(f"search={name}", *FINITE, n_trials=20)[0].asked == []


@pytest.mark.slow
def test_equal_choices_are_one_and_choices_keep_their_quotes(searching):
    other = "hydra.sweeper.storage=journal:///other.log"
    launcher, _ = searching("sensitivity=0.3,0.30,3e-1,0.6", "reg.decay=0.1", other, n_trials=9)
    assert sorted(settings["sensitivity"] for settings in launcher.asked) == ["0.3", "0.6"]
    quoted, _ = searching("""device="cpu",'auto'""", "reg.decay=0.1", "sensitivity=0.1", n_trials=9)
    assert sorted(settings["device"] for settings in quoted.asked) == ['"cpu"', "'auto'"]


class Stuck(optuna.samplers.RandomSampler):
    """Proposes one point, whatever happens."""

    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def test_a_sampler_that_repeats_itself_is_given_another_point():
    ranges = {
        "x": optuna.distributions.FloatDistribution(0, 1),
        "y": optuna.distributions.IntDistribution(1, 9, log=True),
    }
    study = optuna.create_study()
    study.sampler = space.Unrepeated(Stuck(), ranges, lambda study, trial: search._taken(ranges, study, trial.number))
    study.enqueue_trial({"x": 0.5})
    found = []
    for _ in range(12):
        trial = study.ask(ranges)
        study.tell(trial, 0.0)
        found.append((trial.params["x"], trial.params["y"]))
    assert found[:2] == [(0.5, 1), (0, 1)] and len(set(found)) == 12


def test_places_of_points():
    ranges = {
        "a": optuna.distributions.FloatDistribution(0.1, 0.7, step=0.2),
        "b": optuna.distributions.CategoricalDistribution((1, "x", None, True)),
        "c": optuna.distributions.IntDistribution(1, 7, step=3),
    }
    assert space.size(ranges) == 4 * 3 * 3 and space.size({"x": optuna.distributions.FloatDistribution(0, 1)}) == np.inf
    points = [dict(zip(ranges, each)) for each in itertools.product(*map(space._values, ranges.values()))]
    assert len({space.place(ranges, point) for point in points} - {None}) == 36
    assert space.place(ranges, {"a": 0.3, "b": "x", "c": 4}) == space.place(ranges, {"a": 0.1 + 0.2, "b": "x", "c": 4})
    for wrong in ({"a": 0.3, "b": "x"}, {"a": 0.9, "b": "x", "c": 4}, {"a": "no", "b": "x", "c": 4}, {"b": "y"}):
        assert space.place(ranges, wrong) is None
    assert space.fits(ranges, {"a": 0.3}) and not space.fits(ranges, {"d": 1}) and not space.fits(ranges, {"b": "y"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("seed=interval(0.5,3.5)", r"give 'seed=range\(1,4\)' or 'seed=int\(interval\(1,3\)\)'"),
        *slow(
            ("seed=tag(log,interval(1,100))", r"give 'seed=tag\(log,int\(interval\(1,100\)\)\)'"),
        ),
    ],
)
def test_a_range_of_whole_numbers_is_named(override, remedy, searching):
    with pytest.raises(ConfigError, match=f"must be a whole number.*: {remedy}") as error:
        searching(override)
    key, _, given = re.search("give '([^']*)'", str(error.value))[1].partition("=")
    launcher, _ = searching(f"{key}={given}", n_trials=1)
    assert int(launcher.asked[0][key]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_trials", "words"),
    [
        ("pareto", 3, "points are random until 10 members are finished (hydra.sweeper.sampler.n_startup_trials=10), "
         "which the sampler learns from: all of this search"),
        ("nsga2", 30, "sampler.population_size=10), which the sampler learns from: the next 10 of this search"),
    ],
)  # fmt: skip
def test_what_is_random_at_first_is_told(name, n_trials, words, searching, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(Search, "_ask", lambda *_: None)
    searching(f"search={name}", n_trials=n_trials)
    assert words in caplog.text


@pytest.mark.slow
def test_what_is_random_all_along_is_not_told(searching, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(Search, "_ask", lambda *_: None)
    searching("search=random")
    assert "points are random" not in caplog.text


# --- a study that others write into ----------------------------------------------------------------------------------


def written(study, searching, tmp_path, n_trials, *overrides):
    """What a search asks for after others wrote into its study; nothing may lie beside the sweep's numbered folders."""
    launcher, study = searching("sensitivity=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", *overrides, n_trials=n_trials)
    assert all(name.isdigit() for name in folders(launcher.asked)), folders(launcher.asked)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["sweep"]
    assert all(path.name.isdigit() for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    return launcher, study


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", ["../../outside", None, *slow("/outside", "0/../..", "", "0", "01", "9" * 400, 7, ["0"], "٣")]
)
def test_names_of_folders_are_not_believed(folder, searching, tmp_path):
    one = ("sensitivity=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", "reg.decay=0.1")
    _, study = searching(*one, n_trials=2)
    left = [
        each for each in (0.1, 0.2, 0.3, 0.4) if each not in [trial.params["sensitivity"] for trial in study.trials]
    ]
    study.enqueue_trial({"sensitivity": left[0]}, user_attrs={"folder": folder, "retry_of": 0})
    study.add_trial(
        optuna.create_trial(
            params={"sensitivity": left[1]},
            distributions=study.trials[0].distributions,
            values=[0.5, 2.0],
            user_attrs={"folder": folder if folder != "0" else None},
        )
    )
    launcher, _ = written(study, searching, tmp_path, 5, "reg.decay=0.1", "hydra.sweeper.n_jobs=2")
    assert folders(launcher.asked) == ["2", "3"] and launcher.asked[0]["sensitivity"] == str(left[0])


@pytest.mark.slow
def test_points_of_others_are_taken_where_they_are_of_this_search(searching, tmp_path, caplog):
    one = ("sensitivity=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", "reg.decay=0.1")
    _, study = searching(*one, n_trials=1)
    first = study.trials[0].params["sensitivity"]
    for point in (
        {"sensitivity": first},
        {"sensitivity": 0.15},
        {"sensitivity": "${oc.env:HOME}"},
        {"store": "/outside"},
    ):
        study.enqueue_trial(point)
    study.add_trial(
        optuna.create_trial(
            params={"trust": "evil"},
            distributions={"trust": optuna.distributions.CategoricalDistribution(["evil"])},
            values=[0.5, 2.0],
            user_attrs={"folder": "7"},
        )
    )
    launcher, study = written(study, searching, tmp_path, 4, "reg.decay=0.1")
    assert len(launcher.asked) == 2 and all(not {"store", "trust"} & set(each) for each in launcher.asked)
    assert caplog.text.count("a queued point of") == 4


@pytest.mark.parametrize("owner", ["me", {}, {"host": 1}, {"pid": -1}, {"pid": 10**30}, {"started": "then"}, [1]])
def test_owners_that_are_none_are_gone(owner):
    assert search.is_gone({**search.this_process(), **owner} if isinstance(owner, dict) and owner else owner)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["x", *slow({"space": {}}, {"space": 1, "objectives": [], "config": ""})])
def test_a_study_of_another_program_is_refused(asked, searching):
    _, study = searching(n_trials=1)
    study.set_user_attr("asked", asked)
    with pytest.raises(ConfigError, match="was made by another program"):
        searching(n_trials=2)


# --- storages --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cut", [20, *slow(1, 90)])
def test_a_journal_that_was_cut_short_goes_on(cut, searching, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(search, "this_process", lambda: {"host": socket.gethostname(), "pid": 2**22, "started": 0.0})
    searching(n_trials=2)
    journal = tmp_path / "studies.log"
    journal.write_bytes(journal.read_bytes()[:-cut])
    for n_trials in (3, 4):
        _, study = searching(n_trials=n_trials)
        assert sum(trial.state.name == "COMPLETE" for trial in study.trials) == n_trials
    assert caplog.text.count("was cut short") == 1


@pytest.mark.parametrize("rest", [b'{"op_code":8,"wor', b"\0" * 500, b"x\n"])
def test_what_is_written_behind_a_cut_is_kept(rest, tmp_path):
    journal = tmp_path / "studies.log"
    optuna.create_study(storage=storage_of(f"journal:///{journal}"), study_name="a")
    one = journal.read_bytes()
    optuna.create_study(storage=storage_of(f"journal:///{journal}"), study_name="b")
    both = journal.read_bytes()
    for damaged, whole in ((both + rest, both), (one + rest.rstrip(b"\n") + both[len(one) :], both)):
        journal.write_bytes(damaged)
        assert storage.mend(journal) and journal.read_bytes() == whole and not storage.mend(journal)
    assert optuna.get_all_study_names(storage_of(f"journal:///{journal}")) == ["a", "b"]


@pytest.mark.slow
def test_a_journal_that_is_damaged_in_its_midst_is_refused_in_a_line(searching, tmp_path):
    searching(n_trials=2)
    journal = tmp_path / "studies.log"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([*lines[:3], b"rubbish", *lines[4:]]))
    with pytest.raises(ConfigError, match="is damaged in line 4: take it and what follows out"):
        searching(n_trials=3)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///a/b.db", "a/b.db"),
        ("sqlite+pysqlite:///b.db?timeout=3", "b.db"),
        ("journal:////a/b.log", "/a/b.log"),
        ("sqlite:///~/b.db", "HOME/b.db"),
        ("journal:///~/b.log", "HOME/b.log"),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("postgresql://host/database", None),
        (None, None),
    ],
)
def test_files_of_storages(url, file, monkeypatch):
    monkeypatch.setenv("HOME", "HOME")
    assert storage.file_of(url) == (None if file is None else Path(file))


def test_studies_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url in ("sqlite:///~/a/s.db", "journal:///~/b/s.log"):
        optuna.create_study(storage=storage_of(url))
    assert sorted(path.name for path in tmp_path.rglob("s.*")) == ["s.db", "s.log"]
    assert not (tmp_path / "~").exists() and (tmp_path / "home" / "a" / "s.db").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "url",
    [
        "journal://x",
        *slow("foo:///x", "http://localhost/x", "redis://localhost", "postgresql://127.0.0.1:1/none", "sqlite:///."),
    ],
)
def test_a_storage_that_is_none_is_refused_in_a_line(url, searching):
    with pytest.raises(ConfigError, match=r"storage=.* cannot be opened") as error:
        searching(f"hydra.sweeper.storage={url}")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_database_that_is_not_one_is_refused_in_a_line(searching, tmp_path):
    (tmp_path / "s.db").write_text("rubbish " * 1000)
    (tmp_path / "s.log").write_text("rubbish\nmore\n")
    for url in ("sqlite:///s.db", "journal:///s.log"):
        with pytest.raises(ConfigError, match=r"hydra.sweeper.storage=") as error:
            searching(f"hydra.sweeper.storage={url}")
        assert "\n" not in str(error.value)


def test_a_server_that_is_asked_at_once_is_asked_again(monkeypatch, searching):
    calls = []
    real = optuna.create_study

    def create(**how):
        calls.append(how)
        if len(calls) < 3:
            raise optuna.exceptions.StorageInternalError("relation exists already")
        return real(**{**how, "storage": None})

    runner = Search.__new__(Search)
    runner.storage, runner.direction = "postgresql://host/database", ["maximize"]
    monkeypatch.setattr(optuna, "create_study", create)
    monkeypatch.setattr(search, "storage_of", lambda url: url)
    monkeypatch.setattr(search.time, "sleep", lambda seconds: None)
    assert runner._created("a").study_name == "a" and len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sqlite:///new.db", "journal:///new.log"])
def test_a_new_study_is_opened_by_eight_processes_at_once(url, tmp_path):
    code = (
        "import sys, types; from sparsity.sweeper.search import Search; from sparsity import config; "
        "config.sweep_name = lambda composed: 'a'; runner = Search.__new__(Search); runner.study_name = None; "
        "runner.storage, runner.direction = sys.argv[1], ['maximize']; "
        "runner.config = types.SimpleNamespace(objectives=['accuracy']); runner._open({}, {})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, url]
    running = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(8)
    ]
    assert [(process.communicate(timeout=120)[1] or "")[-300:] * process.returncode for process in running] == [""] * 8


# --- names -----------------------------------------------------------------------------------------------------------


def name_of(*overrides):
    config.register()
    with initialize_config_dir(config_dir=str(ROOT / "conf")):
        single = [entry for entry in overrides if not config.swept_keys([entry])]
        composed = compose("config", overrides=single, return_hydra_config=True)
        OmegaConf.set_readonly(composed.hydra, False)
        composed.hydra.overrides.task = [entry for entry in overrides if not entry.startswith("hydra.")]
        return config.sweep_name(composed)


@pytest.mark.slow
def test_a_sweep_is_named_by_what_it_is():
    name = name_of("sensitivity=0.1,0.2")
    assert name.startswith("lenet300-mnist-hs-std-") and len(name.rpartition("-")[2]) == 8
    same = ["plots=false", "threads=1", "store=null", "data.root=elsewhere"]
    assert {name_of("sensitivity=0.1,0.2", more) for more in same} == {name}
    other = ["sensitivity=0.1,0.3", "seed=1", "reg=l1", "schedule.batch_size=10", "objectives=[accuracy,macs]"]
    assert len({name_of("sensitivity=0.1,0.2", more) for more in other} | {name}) == len(other) + 1
    assert name_of("reg=hs,l1").startswith("lenet300-mnist-std-")
    searched = name_of("search=pareto")
    assert searched.startswith("pareto-lenet300-") and name_of("search=pareto", "hydra.sweeper.n_trials=9") == searched
    assert name_of("search=random") != searched


def test_members_of_a_grid_are_counted():
    assert config.count_members(["reg.decay=1,2,3", "sensitivity=range(0,4)", "seed=1"]) == 12
    assert config.count_members(["reg.decay=interval(0,1)"]) is None
    assert config.count_members(["seed=0,1", "seed=0,1,2"]) == 3
    assert config.swept_keys(["reg.decay=1,2", "seed=1", "+a=choice(1,2)", "model.factory.hidden=[1,2]"]) == [
        "reg.decay",
        "a",
    ]


# --- the whole, as typed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(tmp_path):
    arguments = [*BASE, "-m", "search=pareto", "threads=1", "plots=false", "hydra.sweeper.n_trials=8"]
    arguments += [f"store={tmp_path}/store", f"hydra.sweep.dir={tmp_path}/sweep"]
    arguments += [f"hydra.sweeper.storage=sqlite:///{tmp_path}/studies.db"]
    command = [sys.executable, "main.py", *arguments]
    for wanted in (2, 5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("sweep/*/result.json"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/result.json")) == list("01234567")
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/studies.db")
    trials = optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{tmp_path}/studies.db").trials
    finished = [tuple(trial.params.values()) for trial in trials if trial.state.name == "COMPLETE"]
    assert len(finished) == len(set(finished)) == 8
    assert "8 members: 8 done" in done.stdout and (tmp_path / "sweep" / "pareto.png").exists()
