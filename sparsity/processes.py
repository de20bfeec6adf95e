"""The processes of a sweep: who they are, and that they end together."""

import functools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import psutil

TERMINATED = 128 + signal.SIGTERM  # the exit status, as a shell gives it
SECONDS_BETWEEN_LOOKS = 1.0  # of a worker's, at its sweep


def this_process() -> dict[str, Any]:
    """This process, as others on the machine can tell it from one that has its number later."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def is_gone(owner: Any) -> bool:
    """Whether a process has ended, or is none; of another machine's, nobody here can say."""
    known = {"host": str, "pid": int, "started": float | int}
    if not isinstance(owner, dict) or not all(isinstance(owner.get(key), kind) for key, kind in known.items()):
        return True
    if owner["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1
    except (psutil.Error, ValueError, OverflowError):
        return True


def end_by_sigterm() -> None:
    """Has SIGTERM, which Slurm, Docker and systemd send, end this process in order; a second one ends it at once."""

    def end(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)


def is_interruption(error: BaseException | None) -> bool:
    """Whether Ctrl-C or SIGTERM ends a sweep; Ray's own handler exits with the signal's bare number."""
    codes = (TERMINATED, signal.SIGTERM)
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code in codes)


def end_workers() -> None:
    """Ends every process that this one has started, and those that they have."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    for child in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in child.cmdline()):  # takes away what the others leave
                child.kill()
        except psutil.Error:  # has ended meanwhile
            continue


def end_with(owner: dict[str, Any]) -> None:
    """Has this process, a worker of a sweep's, end when the sweep has, whatever ended it, and leaves Ctrl-C to it."""
    if owner["host"] == socket.gethostname() and owner["pid"] != os.getpid():
        _follow(owner["pid"])


@functools.cache  # once in a process, however many jobs it runs
def _follow(pid: int) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(pid,), daemon=True).start()


def _watch(pid: int) -> None:
    try:
        sweep = psutil.Process(pid)
        while sweep.is_running() and sweep.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except psutil.Error:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
