"""Files that are written whole or not at all, under the umask, and what is put aside rather than lost."""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsity.errors import reason

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

PART = ".part"  # ends the name of a file that is being written
JUST_MADE = 2.0  # seconds in which a new file may not hold its lock yet
LONG_AGO = 86400.0  # seconds after which nobody writes a file any more, where there are no locks


@contextlib.contextmanager
def whole(path: Path, *, durable: bool = False, replace: bool = True) -> Iterator[Path]:
    """A file to write to that takes the place of `path` at the end: written whole or not at all.

    durable: it, and whatever was given its name in the folder before, is on the disk before it takes its own, so that
    the last file proves the earlier ones. replace: False leaves a file alone that has the name already.
    """
    _remove_leftovers(path)
    temporary = path.with_name(f"{_prefix(path)}{os.urandom(6).hex()}{PART}")
    held = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)  # as the umask has it
    try:
        _lock(held)  # ends with the process: what bears no lock is left over
        yield temporary
        if durable:
            os.fsync(held)
            _flush(path.parent)
        (os.replace if replace else _link)(temporary, path)
    finally:
        os.close(held)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, durable: bool = False, replace: bool = True) -> None:
    """A file, written whole or not at all."""
    with whole(path, durable=durable, replace=replace) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, durable: bool = False, replace: bool = True) -> None:
    """A text file in UTF-8, written whole or not at all; what is no character, as in names of files, is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), durable=durable, replace=replace)


def _prefix(path: Path) -> str:
    """How the names of the unfinished files of a path begin; short enough for any path's name."""
    return f".{path.name.encode()[:120].decode(errors='ignore')}."


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(folder: Path) -> None:
    """Names and renames in a folder reach the disk, where the system lets a folder be asked for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(temporary: Path, path: Path) -> None:
    """Gives a whole file its name, unless another has it; where the disk knows no links, in place of it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:
        os.replace(temporary, path)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of a file that they were writing."""
    prefix = _prefix(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(prefix) and name.endswith(PART) and is_left_over(path.with_name(name)):
                with contextlib.suppress(OSError):
                    path.with_name(name).unlink()


def is_left_over(path: Path) -> bool:
    """Whether nobody writes an unfinished file any more: whoever does holds its lock."""
    try:
        found = path.lstat()
    except OSError:
        return False
    age = time.time() - found.st_mtime
    if not stat.S_ISREG(found.st_mode) or age < JUST_MADE:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # no locks on this disk, or on this system
        return age > LONG_AGO
    return True


@contextlib.contextmanager
def claimed(path: Path, waits: Callable[[], None], is_done: Callable[[], bool]) -> Iterator[OSError | None]:
    """Holds the lock that a file is, which the system takes from a process that dies; gives why there is none.

    waits: called before another process's hold is waited for. is_done: whether the work is done at the end, so that the
    lock can go; whoever waits for it looks first whether there is work left.
    """
    import filelock  # takes a tenth of the start-up

    lock, refusal = filelock.FileLock(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            waits()
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        refusal = error if isinstance(error, OSError) else OSError(str(error))
    if refusal is not None:
        yield refusal
        return
    try:
        yield None
        if is_done():
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        lock.release()


def cache_folder() -> Path:
    """The user's folder of what was measured or looked at once, and is kept for other runs."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsity"
    except RuntimeError:  # there is no home
        return Path(tempfile.gettempdir()) / "sparsity"


# --- what lies where a file should ------------------------------------------------------------------------------------


def obstacle(path: Path) -> str | None:
    """What lies in a file's place that is none, such as "a folder"; None for a file, also by a link."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing"
    names = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode))


class Unreadable(Exception):
    """What is wrong with a file that is read, as the end of a sentence that begins with its path."""


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; raises Unreadable, whatever lies there."""
    try:
        other = obstacle(path)
        if other is not None:
            raise Unreadable(f"is {other}, and no file")
        if path.stat().st_size > MOST_BYTES:
            raise Unreadable(f"is damaged: it has more than {MOST_BYTES >> 20} MB")
        node = json.loads(path.read_text(encoding="utf-8"), parse_float=_float, parse_int=_int, parse_constant=_float)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise Unreadable("is damaged: it is nested too deep") from error
    except ValueError as error:
        raise Unreadable(f"is damaged: {reason(error)}") from error
    if not isinstance(node, dict):
        raise Unreadable("is damaged: it holds no object")
    return node


MOST_BYTES = 2**28


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text:.20}")
    return number


def _int(text: str) -> int:
    if len(text) > len(str(2**63)):
        raise ValueError(f"it holds {text:.20}…")
    return int(text)


def file_digest(path: str | Path) -> str:
    """The hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_not_writable(folder: Path) -> OSError | None:
    """Makes a folder where there is none, and gives why no file can be written into it; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        return error
    return None


def is_read_only(error: OSError) -> bool:
    """Whether a disk that refuses to be written may still be read."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def set_aside(path: Path) -> Path | None:
    """Gives a damaged file a free name beside its own, so that it is not lost; None where the disk refuses."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.damaged{f'-{number}' if number > 1 else ''}")
        if not os.path.lexists(aside):
            with contextlib.suppress(OSError):
                os.rename(path, aside)
                return aside
            return None
    return None
