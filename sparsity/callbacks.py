"""The Hydra callback of every sweep: names its folder, says how far it is, and sums it up at the end."""

import contextlib
import datetime
import functools
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from sparsity import config as schema
from sparsity.errors import USER_MISTAKE, ConfigError, SparsityError, reason
from sparsity.files import is_read_only, why_not_writable, write_text
from sparsity.processes import end_with, end_workers, is_interruption, this_process

log = logging.getLogger("sparsity")

FORMAT = 1  # of sweep.json
RESULT, FAILURE = "result.json", "failure.json"  # say that a member has ended
NAME = "{name}"  # in hydra.sweep.dir
IN_PROCESS = ("basic", "population")  # launchers whose members run in this process
OF_A_CLUSTER = ("submitit_slurm",)  # whose jobs are not its children
SECONDS_BETWEEN_LOOKS = 0.5  # at the folder, where the members run in other processes; more where a look takes long


def _refusing(method: Callable[..., None]) -> Callable[..., None]:
    """Ends the program by a user's mistake; Hydra would make a warning of it and go on."""

    @functools.wraps(method)
    def callback(self: Callback, config: DictConfig, **arguments: Any) -> None:
        try:
            method(self, config, **arguments)
        except Exception as error:
            typed = OmegaConf.to_container(config.hydra.overrides, resolve=False)
            line = schema.mistake(error, [*typed["task"], *typed["hydra"]])
            if line is None:
                raise
            _refuse(line, error)

    return callback


class Sweep(Callback):
    """Knows the folder of the sweep that runs, and what it has said of it."""

    def __init__(self, published: bool = False):
        self.published = published  # draws published results of the same network behind the members
        self.progress: Progress | None = None
        self.owner: dict[str, Any] | None = None  # the process of the sweep, for those of its launcher

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "progress": None}  # in a process of a launcher's, nothing is said

    @_refusing
    def on_run_start(self, config: DictConfig, **rest: Any) -> None:
        """Refuses a folder that cannot be made, before Hydra makes it."""
        _check_yamls(config)
        folder = schema.at_home(config.hydra.run.dir)
        _make("hydra.run.dir", folder)
        with read_write(config.hydra):
            config.hydra.run.dir = folder

    @_refusing
    def on_multirun_start(self, config: DictConfig, **rest: Any) -> None:
        """Names the sweep's folder and writes down what is swept; refuses what no member could run with."""
        _check_yamls(config)
        schema.check_sweep(config)
        if config.hydra.runtime.choices["hydra/sweeper"] == "basic" and GlobalHydra.instance().is_initialized():
            schema.check_grid(config, GlobalHydra.instance().config_loader())
        _name_folder(config)
        folder = _make("hydra.sweep.dir", config.hydra.sweep.dir)
        if config.store is not None and "store" not in schema.swept_keys(config.hydra.overrides.task):
            _make("store", schema.at_home(config.store))
        described = _write_sweep(folder, config)
        _announce_sweep(config, folder, described)
        total = described["total"]
        self.progress = Progress(folder, total, numbered=_numbers(config, total))
        self.progress.begin()
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if launcher not in IN_PROCESS:
            self.progress.watch()
            self.owner = None if launcher in OF_A_CLUSTER else this_process()

    @_refusing
    def on_job_start(self, config: DictConfig, **rest: Any) -> None:
        """Says what will run, at once, as torch takes seconds to import.

        A sweep's job goes where the sweep was started, so that relative paths mean the same in every process.
        """
        if config.hydra.mode is RunMode.RUN:
            _announce(config)
        is_elsewhere = self.progress is None and config.hydra.mode is RunMode.MULTIRUN
        if is_elsewhere and self.owner is not None:
            end_with(self.owner)
        if is_elsewhere and not config.hydra.job.chdir:
            os.chdir(config.hydra.runtime.cwd)

    def on_job_end(self, config: DictConfig, **rest: Any) -> None:
        """Says how far the sweep is."""
        if self.progress is not None:
            self.progress.say()

    def on_multirun_end(self, config: DictConfig, **rest: Any) -> None:
        """Sums the sweep up, whether it is whole or was interrupted."""
        if self.progress is None:
            return
        error = sys.exc_info()[1]  # what ends the sweep, if it does not end by itself
        if is_interruption(error) and config.hydra.runtime.choices["hydra/launcher"] not in IN_PROCESS:
            end_workers()
        self.progress.stop()
        is_refusal = isinstance(error, SystemExit | HydraException) and not is_interruption(error)
        if self.progress.has_moved or not is_refusal:
            self._show()
        if error is not None and (isinstance(error, HydraException) or _is_of_launcher(error)):
            own = config.hydra.runtime.choices["hydra/launcher"]
            _refuse(f"hydra/launcher={own}: {reason(error)}" if _is_of_launcher(error) else schema.said(error), error)

    def _show(self) -> None:
        """The summary, as files and on the terminal."""
        from sparsity.results import sweeps, table

        try:
            summary = sweeps.summarise([self.progress.folder], published=self.published)
            table.show(summary, before=self.progress.finished_before())
        except (SparsityError, OSError) as error:
            log.error(f"the summary of {self.progress.folder} could not be written: {reason(error)}")


def _check_yamls(config: DictConfig) -> None:
    if GlobalHydra.instance().is_initialized():
        schema.check_yamls(GlobalHydra.instance().config_loader(), config)


def _announce(config: DictConfig) -> None:
    """One line on stdout that names what a run is made of, and its folder."""
    listed = OmegaConf.select(config, "stages")
    stages = _arrows(listed) if isinstance(listed, ListConfig) else ""
    _say(config, (), [stages] if stages else [], Path(config.hydra.runtime.output_dir))


def _arrows(listed: ListConfig) -> str:
    """The stages in order, repeated ones in brackets."""
    return " → ".join(
        f"{entry.get('repeat')} × ({_arrows(entry.get('stages') or [])})"
        if isinstance(entry, DictConfig)
        else str(entry)
        for entry in listed
    )


def _announce_sweep(config: DictConfig, folder: Path, described: Mapping[str, Any]) -> None:
    """The same of a sweep: what its members have in common, how many there are, and what differs."""
    swept, total = described["swept"], described["total"]
    counted = "members" if total is None else f"{total} member{'s' * (total != 1)}"
    _say(config, swept, [f"{counted} over {', '.join(swept)}" if swept else counted], folder)


def _say(config: DictConfig, swept: Collection[str], parts: Sequence[str], folder: Path) -> None:
    from sparsity.results import near
    from sparsity.tables import say_parts

    chosen = config.hydra.runtime.choices
    methods = " ".join(f"{group}={chosen.get(group)}" for group in schema.METHODS if group not in swept)
    say_parts([part for part in (methods, *parts, f"files in {near(folder)}") if part])


def _numbers(config: DictConfig, total: int | None) -> float | None:
    """Below what number the names of members' folders are; None where the user names them."""
    is_grid = config.hydra.runtime.choices["hydra/sweeper"] == "basic"
    return (total if is_grid and total is not None else math.inf) if schema.is_numbered(config) else None


class Progress:
    """Says how far a sweep is, whenever another member has ended."""

    def __init__(self, folder: Path, total: int | None, *, numbered: float | None = None):
        """numbered: below what number the names of members' folders are; any other folder is another sweep's."""
        self.folder, self.total, self.numbered = folder, total, numbered
        self.start = time.monotonic()
        self.before = self._ended()
        self.said = len(self.before)
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """Says what is there already."""
        done = len(self.finished_before())
        if done:
            log.info(f"{self.folder}: {done} of {self._of(done)} members are finished already")

    def finished_before(self) -> list[Path]:
        """The folders of members that were finished before the start, and have not been run again."""
        now = self._ended()
        return [folder for folder, end in self.before.items() if end[0] == RESULT and now.get(folder) == end]

    @property
    def has_moved(self) -> bool:
        """Whether a member has ended since the start."""
        return bool(self._new(self._ended()))

    def _ended(self) -> dict[Path, tuple[str, int]]:
        """The members that have ended, well or badly: which file says so, and when it was written."""
        return {folder: end for folder, end in _ended(self.folder) if self._is_own(folder)}

    def _is_own(self, folder: Path) -> bool:
        name = folder.relative_to(self.folder).as_posix()
        return self.numbered is None or (name.isdigit() and int(name) < self.numbered)

    def _new(self, ended: dict[Path, tuple[str, int]]) -> list[Path]:
        return [folder for folder, end in ended.items() if self.before.get(folder) != end]

    def watch(self) -> None:
        """Looks at the folder from time to time, where the members run in other processes."""
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        seconds = SECONDS_BETWEEN_LOOKS
        while not self.stopped.wait(seconds):
            begin = time.monotonic()
            self.say()
            seconds = max(SECONDS_BETWEEN_LOOKS, 10 * (time.monotonic() - begin))

    def stop(self) -> None:
        """Says what has ended since it last looked, and no more."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()
            self.say()

    def say(self) -> None:
        """One line, if a member has ended since the last one."""
        ended = self._ended()
        if len(ended) == self.said:
            return
        self.said = len(ended)
        log.info(" | ".join([self._count(), *self._front(), *self._left(len(self._new(ended)))]))

    def _count(self) -> str:
        return f"sweep: {self.said} of {self._of(self.said)} members"

    def _of(self, ended: int) -> int | str:
        """How many members there are in all: a search that was larger before has more than it asks for now."""
        return "?" if self.total is None else max(self.total, ended)

    def _front(self) -> list[str]:
        """The front so far: how many points, and its most accurate and its smallest network."""
        from sparsity.results import summaries, table
        from sparsity.results.points import VALIDATION

        found = summaries.read([self.folder])
        known = [point for point in found.front if point.estimate(VALIDATION).mean is not None]
        if not known:
            return []
        best = max(known, key=lambda point: point.mean(VALIDATION))
        small = max(known, key=lambda point: point.mean("compression.weights"))
        ends = [f"{table.accuracy(each, VALIDATION)} at {table.times(each)}" for each in (best, small)]
        return [f"front of {len(found.front)}, validation {' to '.join(dict.fromkeys(ends))}"]

    def _left(self, done: int) -> list[str]:
        if not self.total or not done or self.said >= self.total:
            return []
        seconds = (time.monotonic() - self.start) / done * (self.total - self.said)
        return [f"{datetime.timedelta(seconds=round(seconds))} left"]


def _ended(folder: Path) -> Iterator[tuple[Path, tuple[str, int]]]:
    """The folders of members that have ended, well or badly: the file that says so, and when it was written."""
    for path, subfolders, files in os.walk(folder):
        found = next((name for name in (RESULT, FAILURE) if name in files), None)
        if found:
            with contextlib.suppress(OSError):
                yield Path(path), (found, os.stat(os.path.join(path, found)).st_mtime_ns)
            subfolders.clear()
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _make(key: str, folder: str) -> Path:
    """A folder that can be written, or the end of the program."""
    if not str(folder).strip():
        raise ConfigError(f"{key} is empty: name a folder")
    path = Path(folder)
    error = why_not_writable(path)
    if error is not None and not (key == "store" and is_read_only(error) and any(path.glob("*/*.safetensors"))):
        remedy = ", or store=null to keep no stages" if key == "store" else ""
        _refuse(f"{key}={folder} cannot be written ({error.strerror or error}): name another folder{remedy}", error)
    return path


def _refuse(line: str, error: BaseException) -> NoReturn:
    """Ends the program with one line, or with the whole error where the user asks for it."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    print(line, file=sys.stderr)
    raise SystemExit(USER_MISTAKE) from error


def _is_of_launcher(error: BaseException) -> bool:
    """Whether an error came up in somebody else's launcher, and not in a member."""
    if isinstance(error, SparsityError | SystemExit | KeyboardInterrupt):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("hydra_plugins.") and "launcher" in name for name in modules)


def _name_folder(config: DictConfig) -> None:
    """Makes `hydra.sweep.dir` a whole path with the sweep's name, for this process and for jobs of others."""
    folder = str(config.hydra.sweep.dir)
    if NAME in folder:
        folder = folder.replace(NAME, schema.sweep_name(config))
    folder = os.path.abspath(schema.at_home(folder))
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweep.dir = folder
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={QuotedString(folder, Quote.double).with_quotes()}")


def _write_sweep(folder: Path, config: DictConfig) -> dict[str, Any]:
    """`sweep.json`: what is swept, and how; returns what it holds."""
    own = config.hydra
    params = [f"{key}={text}" for key, text in (OmegaConf.to_container(own.sweeper).get("params") or {}).items()]
    typed = [*params, *own.overrides.task]
    is_search = own.runtime.choices["hydra/sweeper"] != "basic"
    ranges = schema.search_ranges(config) if own.runtime.choices["hydra/sweeper"] == "search" else {}
    fixed = {text.partition("=")[0] for text in typed} - set(schema.swept_keys(typed))
    described = {
        "format": FORMAT,
        "kind": "search" if is_search else "grid",
        "name": schema.sweep_name(config),
        "overrides": list(own.overrides.task),
        "swept": [key for key in dict.fromkeys([*ranges, *schema.swept_keys(typed)]) if key not in fixed],
        "objectives": list(config.objectives),
        "total": own.sweeper.n_trials if is_search else schema.count_members(typed),
        "command": sys.argv,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_text(folder / "sweep.json", json.dumps(described, indent=1) + "\n")
    return described
