"""What the callback of a sweep refuses, and what it says when a sweep ends by an error; no member is trained here."""

import os
import types

import pytest
from conftest import ROOT
from hydra import initialize_config_dir
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from sparsity import config
from sparsity.callbacks import Sweep
from sparsity.errors import DivergedError


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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["objectives=[accuracy,speed]"],
            "objectives[1] must be one of accuracy, compression, macs, nonzero; got 'speed'",
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


def test_a_glob_stands_for_choices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(config_dir=str(ROOT / "conf")):
        assert config.count_members(["reg=glob(*hs)", "seed=0,1"]) == 2 * len(["group_hs", "hs"])


def test_folders_are_whole_paths_for_all_processes(sweep, tmp_path):
    _, composed = sweep
    assert composed.hydra.sweep.dir == str(tmp_path / "made") and (tmp_path / "kept").is_dir()
    assert composed.hydra.overrides.hydra[-1] == f'hydra.sweep.dir="{tmp_path}/made"'


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


def ended_by(error, own, composed):
    """Ends a sweep as Hydra does."""
    try:
        raise error
    finally:
        own.on_multirun_end(composed)


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


@pytest.mark.parametrize("error", [DivergedError("nan"), KeyboardInterrupt(), RuntimeError("ours")])
def test_other_ends_are_summed_up_and_go_on(error, sweep, capsys):
    with pytest.raises(type(error)):
        ended_by(error, *sweep)
    assert "2 members: 0 done, 2 unfinished" in capsys.readouterr().out


def test_a_refused_search_is_not_summed_up(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ended_by(SystemExit(2), *sweep)
    assert capsys.readouterr().out == ""
    (tmp_path / "made" / "0").mkdir()
    (tmp_path / "made" / "0" / "failure.json").write_text("{}")
    with pytest.raises(SystemExit):
        ended_by(SystemExit(2), *sweep)
    assert "2 members: 0 done, 1 failed, 1 unfinished" in capsys.readouterr().out
