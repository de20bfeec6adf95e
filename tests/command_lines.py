"""Command lines in quick succession: a process that has imported everything forks one child for each.

Run by itself it is that process: requests, as lines of JSON, on its standard input, answers on its output.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = Path(__file__).parent.parent / "main.py"
SECONDS = 60.0  # after which a child hangs


class CommandLines:
    """Runs `python main.py ARGUMENTS` up to the point where a job would train."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: list[str], folder: str) -> dict:
        """The status of a command line that is typed in a folder, and what it wrote; status None: it hung."""
        self.process.stdin.write(json.dumps([arguments, folder]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _leave_out_training() -> None:
    """Lets every job end where it would load its data."""
    from sparsity import experiment

    experiment.run_members = lambda jobs, **how: [{"folder": str(job.folder)} for job in jobs]
    experiment.results.objectives = lambda result, names: tuple(1.0 for _ in names)


def _child(arguments: list[str], folder: str, out: int, err: int) -> int:
    """Runs main.py as Python does, with what it prints in files."""
    os.dup2(out, 1), os.dup2(err, 2)
    os.chdir(folder)
    sys.argv = [str(MAIN), *arguments]
    try:
        runpy.run_path(str(MAIN), run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush(), sys.stderr.flush()
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr, flush=True)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        return 1
    return 0


def _run(arguments: list[str], folder: str) -> dict:
    """One command line in a child of its own."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            status = 1
            with contextlib.suppress(BaseException):
                status = _child(arguments, folder, out.fileno(), err.fileno())
            os._exit(status)
        status = _wait(child, start)
        out.seek(0), err.seek(0)
        texts = [each.read().decode(errors="replace") for each in (out, err)]
    return {"status": status, "stdout": texts[0], "stderr": texts[1], "seconds": time.monotonic() - start}


def _wait(child: int, start: float) -> int | None:
    while time.monotonic() < start + SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(MAIN.parent))
    from hydra.core.plugins import Plugins

    import sparsity.sweeper.search  # noqa: F401

    Plugins.instance()
    _leave_out_training()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_run(*json.loads(line))) + "\n")
        answers.flush()
