"""A member's folder: held by one process at a time; a finished run in it is checked before it is trusted."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsity import files
from sparsity.config.sweeps import NEUTRAL
from sparsity.errors import ConfigError, reason
from sparsity.results.sealed import RESULT, Unchecked, check_finished, read_result

log = logging.getLogger("sparsity")

LOCK = ".lock"


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or reason(error)
        raise ConfigError(f"hydra.run.dir={folder} cannot be written: {cause}") from error


def check_writable(folder: Path) -> None:
    """A folder that cannot be written is found out before anything trains."""
    with writing(folder):
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "stages", os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def held(folders: Sequence[Path]) -> Iterator[None]:
    """Holds the folders of members; while another process runs one, waits for it, in an order that all share."""
    with contextlib.ExitStack() as stack:
        for folder in sorted(set(folders)):

            def waits(folder: Path = folder) -> None:
                log.info(f"waits for another process that runs the same: {folder}")

            stack.enter_context(files.claimed(folder / LOCK, waits, is_done=lambda: True))
        yield


def finished(folder: Path, keys: Mapping[str, str], overrides: Sequence[str]) -> dict[str, Any] | None:
    """The result that a folder holds already, if it is whole and of the same stages; None where there is none.

    A damaged one is set aside with a warning, so that the run is made again; so is one of the first version, which
    nothing proves, of the same overrides. One of other stages is never written over.
    """
    path = folder / RESULT
    if not os.path.lexists(path):
        return None
    try:
        result = check_finished(folder)
    except Unchecked as problem:
        if _telling(read_result(path).get("overrides", ())) != _telling(overrides):
            raise _other_run(folder) from problem
        _set_aside(path, problem)
        return None
    except (files.Unreadable, OSError) as problem:
        _set_aside(path, problem)
        return None
    if result.get("keys") != keys:
        raise _other_run(folder)
    log.info(f"finished before: {folder}")
    return {**result, "folder": str(folder)}


def _telling(overrides: Sequence[str]) -> list[str]:
    """The overrides that tell what is run, whatever their order."""
    return sorted(text for text in overrides if re.split(r"[.=]", text.lstrip("+~"))[0] not in NEUTRAL)


def _other_run(folder: Path) -> ConfigError:
    return ConfigError(
        f"hydra.run.dir={folder} holds a finished run of other settings, data or code: name another folder or remove it"
    )


def _set_aside(path: Path, problem: Exception) -> None:
    aside = files.set_aside(path)
    if aside is None:
        raise ConfigError(f"{path} {problem}, and cannot be set aside: remove it, or name another folder")
    log.warning(f"warning: {path} {problem}: it is set aside as {aside.name}, and the run is made again")
