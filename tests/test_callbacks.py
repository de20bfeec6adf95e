"""What the callback of a sweep refuses, and what it says when a sweep ends by an error; no member is trained here."""

import json
import os
import shutil
import types

import pytest
from conftest import ROOT
from hydra import initialize_config_dir
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from test_sweeps import put

from sparsity import config
from sparsity.callbacks import Progress, Sweep
from sparsity.errors import DivergedError
from sparsity.processes import this_process


def multirun(*overrides):
    """The config that a sweep begins with."""
    fixed = [entry for entry in overrides if entry.startswith("hydra") or not config.swept_keys([entry])]
    composed, own = config.compose(fixed)
    OmegaConf.set_readonly(own, False), OmegaConf.set_struct(composed, False)
    own.overrides.task = [entry for entry in overrides if not entry.startswith("hydra")]
    composed.hydra = own
    return composed


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep that has begun, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    own, composed = Sweep(), multirun("seed=0,1", "hydra.sweep.dir=made", "store=kept")
    own.on_multirun_start(composed)
    return own, composed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["objectives=[accuracy,speed]"],
            "objectives[1] must be one of accuracy, compression, macs, nonzero, bytes; got 'speed'",
        ),
        (["objectives=[macs,macs]"], "objectives must name each objective once, of"),
        (
            ["reg.decay=interval(0,1)"],
            "reg.decay=interval(0,1) is a range, which a search draws from: add search=pareto",
        ),
        (
            ["hydra.sweep.dir=/dev/null/x"],
            "hydra.sweep.dir=/dev/null/x cannot be written (Not a directory): name another",
        ),
        (
            ["store=/dev/null/x"],
            "store=/dev/null/x cannot be written (Not a directory): name another folder, or store=null",
        ),
    ],
)
def test_a_sweep_that_no_member_could_run_in(overrides, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        Sweep().on_multirun_start(multirun("seed=0,1", *overrides))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(line) and said.count("\n") == 1


def test_a_sweep_says_at_once_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Sweep().on_multirun_start(multirun("seed=0,1,2", "reg=hs,l1", "hydra.sweep.dir=made"))
    assert capsys.readouterr().out == "model=lenet300 data=mnist prune=std | 6 members over seed, reg | files in made\n"


def test_a_glob_stands_for_choices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(config_dir=str(ROOT / "conf")):
        assert config.count_members(["reg=glob(*hs)", "seed=0,1"]) == 2 * len(["group_hs", "hs"])


@pytest.mark.slow
def test_folders_are_whole_paths_for_all_processes(sweep, tmp_path):
    _, composed = sweep
    assert composed.hydra.sweep.dir == str(tmp_path / "made") and (tmp_path / "kept").is_dir()
    assert composed.hydra.overrides.hydra[-1] == f'hydra.sweep.dir="{tmp_path}/made"'


@pytest.mark.slow
def test_a_job_of_another_process_goes_where_the_sweep_was_started(sweep, tmp_path, monkeypatch):
    own, composed = sweep
    composed.hydra.mode = RunMode.MULTIRUN
    composed.hydra.runtime.cwd = str(tmp_path)
    monkeypatch.chdir("/")
    own.on_job_start(composed)
    assert os.getcwd() == "/"  # in the sweep's own process
    sent = Sweep.__new__(Sweep)
    sent.__dict__.update(own.__getstate__())
    sent.on_job_start(composed)
    assert os.getcwd() == str(tmp_path)


@pytest.mark.slow
def test_what_is_said_while_members_end(sweep, tmp_path, caplog):
    own, composed = sweep
    told = json.loads((tmp_path / "made" / "sweep.json").read_text())
    assert told["objectives"] == ["accuracy", "compression"] and told["swept"] == ["seed"] and told["total"] == 2
    with caplog.at_level("INFO"):
        own.on_job_end(composed)
        assert "sweep:" not in caplog.text
        put(tmp_path / "made" / "0", ["seed=0"])
        own.on_job_end(composed)
    assert caplog.text.count("sweep: 1 of 2 members | front of 1, validation 98.00% at 20.0×") == 1


def test_ends_of_the_front_and_time_left_by_what_ended_since_the_start(tmp_path, caplog, monkeypatch):
    seconds = iter([100.0, 160.0])
    monkeypatch.setattr("sparsity.callbacks.time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    put(tmp_path / "0", ["reg.decay=1"], 0.98, 0.9, 10.0)
    progress = Progress(tmp_path, 5)
    put(tmp_path / "1", ["reg.decay=2"], 0.95, 0.99, 30.0)
    put(tmp_path / "2", ["reg.decay=3"], 0.97, 0.99, 5.0)
    with caplog.at_level("INFO"):
        progress.say()
    said = "sweep: 3 of 5 members | front of 2, validation 98.00% at 10.0× to 95.00% at 30.0× | 0:01:00 left"
    assert said in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "watches"), [("basic", False), ("population", False), ("joblib", True)])
def test_the_folder_is_watched_where_members_run_in_other_processes(name, watches, tmp_path):
    own, composed = Sweep(), multirun("seed=0,1", f"hydra.sweep.dir={tmp_path}/made")
    composed.hydra.runtime.choices["hydra/launcher"] = name
    own.on_multirun_start(composed)
    own.progress.stop()
    assert (own.progress.thread is not None) == watches


def ended_by(error, own, composed):
    """Ends a sweep as Hydra does."""
    try:
        raise error
    finally:
        own.on_multirun_end(composed)


@pytest.mark.slow
def test_what_hydra_refuses_is_one_line(sweep, capsys):
    cause = ValueError("Did you mean: 'decay'?\n  full_key: reg.deacy")
    error = HydraException("Could not override\n 'reg.deacy'.")
    error.__cause__ = cause
    with pytest.raises(SystemExit) as end:
        ended_by(error, *sweep)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err == "Could not override 'reg.deacy'. Did you mean: 'decay'?\n"


def test_what_a_launcher_refuses_is_one_line(sweep, capsys):
    module = types.ModuleType("hydra_plugins.some_launcher")
    exec("def launch():\n    raise ValueError('n_jobs == 0\\nhas no meaning')", module.__dict__)
    own, composed = sweep
    with pytest.raises(SystemExit) as end:
        try:
            module.launch()
        finally:
            own.on_multirun_end(composed)
    assert end.value.code == 2
    assert capsys.readouterr().err == "hydra/launcher=basic: n_jobs == 0 has no meaning\n"


@pytest.mark.slow
@pytest.mark.parametrize("error", [DivergedError("nan"), KeyboardInterrupt(), RuntimeError("ours")])
def test_other_ends_are_summed_up_and_go_on(error, sweep, capsys):
    with pytest.raises(type(error)):
        ended_by(error, *sweep)
    assert "2 members: 0 done, 2 unfinished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_refused_search_is_not_summed_up(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ended_by(SystemExit(2), *sweep)
    assert capsys.readouterr().out == ""
    (tmp_path / "made" / "0").mkdir()
    (tmp_path / "made" / "0" / "failure.json").write_text("{}")
    with pytest.raises(SystemExit):
        ended_by(SystemExit(2), *sweep)
    assert "2 members: 0 done, 1 failed, 1 unfinished" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_resumed_is_told_as_that(tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    put(tmp_path / "0", ["seed=0"])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "failure.json").write_text("{}")
    own, composed = Sweep(), multirun("seed=0,1,2", f"hydra.sweep.dir={tmp_path}")
    own.on_multirun_start(composed)
    assert f"{tmp_path}: 1 of 3 members are finished already" in caplog.text and not own.progress.has_moved
    shutil.rmtree(tmp_path / "1")
    put(tmp_path / "1", ["seed=1"])
    own.on_multirun_end(composed)
    assert "; 1 finished before this start\n" in capsys.readouterr().out
    assert own.progress.finished_before() == [tmp_path / "0"]


@pytest.mark.slow
def test_members_of_another_sweep_are_not_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("0", "3", "7", "mine"):
        put(tmp_path / name, ["seed=0"])
    own, composed = Sweep(), multirun("seed=0,1", f"hydra.sweep.dir={tmp_path}")
    own.on_multirun_start(composed)
    put(tmp_path / "1", ["seed=1"])
    own.on_job_end(composed)
    assert "1 of 2 members are finished already" in caplog.text and "sweep: 2 of 2 members" in caplog.text


@pytest.mark.slow
def test_a_search_that_asks_for_less_than_before_has_all_its_members(tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(3):
        put(tmp_path / str(number), [f"sensitivity=0.{number}"])
    own = Sweep()
    composed = multirun("search=random", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}")
    own.on_multirun_start(composed)
    put(tmp_path / "3", ["sensitivity=0.9"])
    own.on_job_end(composed)
    assert "3 of 3 members are finished already" in caplog.text and "sweep: 4 of 4 members" in caplog.text


@pytest.mark.slow
def test_members_of_other_processes_are_told_to_the_last(tmp_path, caplog):
    caplog.set_level("INFO")
    own, composed = Sweep(), multirun("seed=0,1", f"hydra.sweep.dir={tmp_path}")
    composed.hydra.runtime.choices["hydra/launcher"] = "joblib"
    own.on_multirun_start(composed)
    for number in range(2):  # both end just before the sweep does
        put(tmp_path / str(number), [f"seed={number}"])
    own.on_multirun_end(composed)
    assert "sweep: 2 of 2 members" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ends"), [("joblib", True), ("basic", False)])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_sweep_ends_its_workers_and_is_summed_up(error, launcher, ends, sweep, monkeypatch, capsys):
    own, composed = sweep
    composed.hydra.runtime.choices["hydra/launcher"] = launcher
    ended = []
    monkeypatch.setattr("sparsity.callbacks.end_workers", lambda: ended.append(True))
    with pytest.raises(type(error)):
        ended_by(error, own, composed)
    assert bool(ended) == ends and "2 members: 0 done, 2 unfinished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "follows"), [("joblib", True), ("submitit_slurm", False), ("basic", False)])
def test_a_worker_knows_its_sweep(launcher, follows, tmp_path, monkeypatch):
    own, composed = Sweep(), multirun("seed=0,1", f"hydra.sweep.dir={tmp_path}")
    composed.hydra.runtime.choices["hydra/launcher"] = launcher
    own.on_multirun_start(composed)
    own.progress.stop()
    followed = []
    monkeypatch.setattr("sparsity.callbacks.end_with", followed.append)
    sent = Sweep.__new__(Sweep)
    sent.__dict__.update(own.__getstate__())
    composed.hydra.mode, composed.hydra.runtime.cwd = RunMode.MULTIRUN, str(tmp_path)
    sent.on_job_start(composed)
    assert followed == ([this_process()] if follows else [])
