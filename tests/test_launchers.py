"""Launchers that run members in other processes: the same numbers as in process, and paths that mean the same."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from hydra.core.utils import JobStatus

from sparsity import config, launcher
from sparsity.errors import SparsityError

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
TWO_AT_A_TIME = {
    "joblib": "hydra.launcher.n_jobs=2",
    "submitit_local": "hydra.launcher.n_jobs=2",
    "submitit_slurm": "hydra.launcher.cpus_per_task=1",
    "ray": "+hydra.launcher.ray.init.num_cpus=2",
}
MLP = ("data=digits", "schedule=smoke", "plots=false", "model=mlp", "model.factory.hidden=[12]")
GRID = "schedule.regularize.lr=1e-3,2e-3,1e30"  # the last one diverges
RELATIVE = ("store=store", "hydra.sweep.dir=sweep", "hydra.sweeper.storage=sqlite:///studies.db")


def needs(name):
    """Skips where the plugin of a launcher is not installed; in CI, where every extra must be, the test fails."""
    try:
        importlib.import_module(f"hydra_plugins.{PLUGINS[name]}")
    except ImportError as error:
        lacks = f"hydra/launcher={name} needs {PLUGINS[name]}, which cannot be imported: {error}"
        if os.environ.get("CI"):
            pytest.fail(lacks)
        pytest.skip(lacks)


def sweep(folder, *arguments, **environment):
    """A sweep as it is typed in a folder."""
    folder.mkdir()
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    environment = {**inherited, "PYTHONPATH": path, **environment}
    command = [sys.executable, str(ROOT / "main.py"), "-m", *MLP, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def table(folder):
    """The summary, apart from times and folders."""
    with (folder / "sweep" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["error"] = row["error"].partition(" (the last good state is in")[0]
    return [
        {key: value for key, value in row.items() if key != "folder" and not key.startswith("seconds.")} for row in rows
    ]


def with_slurm(folder):
    """The environment in which `tests/slurm` stands for Slurm."""
    shutil.copytree(ROOT / "tests" / "slurm", folder)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """What a grid and a search come to in process."""
    root = tmp_path_factory.mktemp("in_process")
    grid = sweep(root / "grid", "threads=1", GRID, *RELATIVE[:2])
    search = sweep(root / "search", "threads=1", "search=pareto", *SEARCH, *RELATIVE)
    assert grid.returncode == 2 and search.returncode == 0, grid.stderr + search.stderr
    return root


SEARCH = ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_a_sweep_is_as_in_process(name, in_process, tmp_path):
    """Nothing says threads=1: they are shared."""
    needs(name)
    more = [f"hydra/launcher={name}", TWO_AT_A_TIME[name]]
    environment = with_slurm(tmp_path / "slurm") if name == "submitit_slurm" else {}
    done = sweep(tmp_path / "grid", GRID, *RELATIVE[:2], *more, **environment)
    assert done.returncode == 2 and "3 members: 2 done, 1 failed" in done.stdout, done.stderr
    assert "regularize: the loss became NaN or infinite" in done.stderr and "Traceback" not in done.stderr
    assert table(tmp_path / "grid") == table(in_process / "grid")
    assert len(list((tmp_path / "grid" / "store" / "pretrain").iterdir())) == 1
    result = json.loads((tmp_path / "grid" / "sweep" / "0" / "result.json").read_text())
    shared = max(1, launcher._num_cores() // 2) if name in ("joblib", "submitit_local") else 1
    assert result["environment"]["command"][:2] == ["main.py", MLP[0]] and result["environment"]["threads"] == shared
    if name in ("joblib", "ray"):  # another batch of the same launcher
        searched = sweep(tmp_path / "search", "threads=1", "search=pareto", *SEARCH, *RELATIVE, *more)
        assert searched.returncode == 0, searched.stderr
        assert table(tmp_path / "search") == table(in_process / "search")


@pytest.mark.parametrize("name", PLUGINS)
def test_it_composes(name):
    needs(name)
    own = config.compose([f"hydra/launcher={name}", TWO_AT_A_TIME[name]])[1]
    assert own.runtime.choices["hydra/launcher"] == name


def test_threads_are_those_that_slurm_gives(monkeypatch):
    assert config.read(config.compose([])[0]).threads is None
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert config.read(config.compose([])[0]).threads == 3


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_launcher_that_is_not_installed_is_skipped_but_in_ci(ci, outcome, monkeypatch):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setitem(PLUGINS, "joblib", "no_such_launcher")
    with pytest.raises(outcome, match="no_such_launcher"):
        needs("joblib")


class Submitit:
    """In place of submitit's launcher: what was launched, and how many threads it was given."""

    def __init__(self):
        self.launched = []

    def launch(self, job_overrides, initial_job_idx):
        self.launched.append((*job_overrides, initial_job_idx, os.environ["OMP_NUM_THREADS"]))
        if job_overrides == [["killed"]]:
            raise RuntimeError("no\nresult")
        return [f"return of {initial_job_idx}"]


@pytest.mark.parametrize(("n_jobs", "threads"), [(-1, "1"), (2, "2"), (3, "1"), (8, "1")])
def test_local_processes_share_the_cores(n_jobs, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "_num_cores", lambda: 4)
    local = launcher.LocalLauncher(n_jobs)
    local.submitit = Submitit()
    assert local.launch([["a"], ["b"], ["c"]], 5) == ["return of 5", "return of 6", "return of 7"]
    assert sorted(local.submitit.launched) == [(["a"], 5, threads), (["b"], 6, threads), (["c"], 7, threads)]
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_as_many_local_processes_run_at_a_time_as_are_asked_for(n_jobs):
    running, most = set(), []

    class Slow(Submitit):
        def launch(self, job_overrides, initial_job_idx):
            running.add(initial_job_idx)
            most.append(len(running))
            time.sleep(0.3)
            running.remove(initial_job_idx)
            return super().launch(job_overrides, initial_job_idx)

    local = launcher.LocalLauncher(n_jobs)
    local.submitit = Slow()
    local.launch([["a"], ["b"], ["c"], ["d"]], 0)
    assert max(most) == n_jobs


def test_the_users_own_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    local = launcher.LocalLauncher(1)
    local.submitit = Submitit()
    local.launch([["a"]], 0)
    assert local.submitit.launched == [(["a"], 0, "7")] and os.environ["OMP_NUM_THREADS"] == "7"


def test_a_process_that_is_killed_is_a_member_that_failed():
    local = launcher.LocalLauncher(2)
    local.submitit = Submitit()
    first, second = local.launch([["killed"], ["b"]], 3)
    assert second == "return of 4" and first.status is JobStatus.FAILED
    with pytest.raises(SparsityError, match=r"member 3: its process ended \(no result\)"):
        _ = first.return_value


@pytest.mark.parametrize("n_jobs", [0, -2, "x", 1.5])
def test_a_number_of_jobs_that_is_none(n_jobs, capsys):
    with pytest.raises(SystemExit) as end:
        launcher.LocalLauncher(n_jobs)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"hydra.launcher.n_jobs must be a whole number ≥ 1, or -1 for one a core; got {n_jobs}\n"
    )
