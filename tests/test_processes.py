"""Processes of a sweep end together, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from conftest import ROOT
from test_launchers import MLP, needs

from sparsity import processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def start(*arguments, **how):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True, **how)


def waits(condition, seconds=60.0):
    """Whether a condition comes to hold."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def test_interruptions_are_told_from_other_ends():
    assert processes.TERMINATED == 143
    for error in (KeyboardInterrupt(), SystemExit(143), SystemExit(signal.SIGTERM)):
        assert processes.is_interruption(error)
    for error in (None, SystemExit(2), SystemExit(), ValueError()):
        assert not processes.is_interruption(error)


def test_sigterm_ends_in_order():
    code = (
        "import os, signal; from sparsity import processes; processes.end_by_sigterm()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "finally:\n    print('summed up', signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    process = start("-c", code, stdout=subprocess.PIPE)
    assert (process.communicate(timeout=60), process.returncode) == (("summed up True\n", ""), 143)


def test_workers_are_ended_with_what_they_started():
    code = f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code])
    assert waits(lambda: psutil.Process(worker.pid).children())
    both = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children()]
    processes.end_workers()
    worker.wait(10)
    assert waits(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in both), 10)


@pytest.mark.slow
def test_a_worker_ends_with_its_sweep_and_leaves_ctrl_c_to_it():
    sweep = subprocess.Popen(SLEEP)
    owner = {**processes.this_process(), "pid": sweep.pid}
    code = (
        f"import time; from sparsity import processes; processes.end_with({owner!r}); processes.end_with({owner!r})\n"
        "print('here', flush=True); time.sleep(60)"
    )
    worker = start("-c", code, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == "here\n"
    worker.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert worker.poll() is None
    sweep.kill(), sweep.wait()
    worker.communicate(timeout=30)
    assert worker.returncode == -signal.SIGKILL
    processes.end_with({**owner, "host": "elsewhere"})  # of another machine's, nobody here can say


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("joblib", signal.SIGTERM), ("submitit_local", signal.SIGTERM),
                                           ("joblib", signal.SIGINT), ("joblib", signal.SIGKILL)])  # fmt: skip
def test_no_worker_outlives_its_sweep(name, how, tmp_path, request):
    needs(name)
    arguments = [*MLP, "-m", "schedule.pretrain.epochs=5000", "stages=[pretrain]", "seed=0,1,2", "store=null"]
    arguments += [f"hydra.sweep.dir={tmp_path}/sweep", f"hydra/launcher={name}", "hydra.launcher.n_jobs=2"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background does not hear Ctrl-C
    sweep = start("main.py", *arguments, "hydra.output_subdir=null", cwd=ROOT, stdout=subprocess.PIPE,
                  start_new_session=True, preexec_fn=heard)  # fmt: skip
    request.addfinalizer(lambda: (sweep.poll() is None and sweep.kill(), sweep.communicate()))
    assert waits(lambda: len(list(tmp_path.glob("sweep/[01]/main.log"))) == 2, 120)
    time.sleep(1.5)
    workers = psutil.Process(sweep.pid).children(recursive=True)
    (os.killpg if how == signal.SIGINT else os.kill)(sweep.pid, how)  # Ctrl-C reaches every process of the terminal
    said = sweep.communicate(timeout=60)[1]
    assert sweep.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how], said
    assert "Traceback" not in said and (tmp_path / "sweep" / "summary.csv").exists() == (how != signal.SIGKILL)
    assert len(workers) >= 2 and waits(lambda: not any(each.is_running() for each in workers), 10)
