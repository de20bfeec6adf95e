"""Where studies are kept: the URL of a storage, and a journal that was cut short."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file

from sparsity import files
from sparsity.errors import ConfigError

log = logging.getLogger("sparsity")

LOCK_SECONDS = 60.0  # for which SQLite waits for another process
CONNECT_SECONDS = 10  # for which a server may not answer
OPERATION = b'{"op_code"'  # how a line of a journal begins


def storage_of(url: str | None) -> Any:
    """The storage of a URL; of a file, its folder is made. None: kept in memory alone."""
    if not url:
        return None
    file = file_of(url)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if url.startswith("journal:"):
        if file is None:
            raise ValueError("it names no file")
        if file.is_file() and not _ends_whole(file):
            mend(file)
        return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    if file is not None:
        whole = url.replace(url.partition(":///")[2].partition("?")[0], str(file), 1)
        return optuna.storages.RDBStorage(whole, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
    if url.startswith(("postgresql", "mysql")) and "connect_timeout" not in url:
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"connect_timeout": CONNECT_SECONDS}})
    return url


def file_of(url: str | None) -> Path | None:
    """The file of a storage that is one; `~` is the home folder."""
    kind, _, path = (url or "").partition(":///")
    path = path.partition("?")[0]
    if kind.partition("+")[0] not in ("sqlite", "journal") or not path or path.startswith((":memory:", "file:")):
        return None
    return Path(path).expanduser()


# --- journals --------------------------------------------------------------------------------------------------------


def _ends_whole(file: Path) -> bool:
    """Whether the last line of a journal is one."""
    with file.open("rb") as journal:
        journal.seek(max(0, os.path.getsize(file) - 2**16))
        *_, last, rest = [b"", *journal.read().split(b"\n")]
    return rest == b"" and (last == b"" or len(last) >= 2**16 or _is_operation(last))


def mend(file: Path) -> bool:
    """Takes out of a journal what a full disk or a power cut left of its last line; whether there was any.

    The next line may have been written on behind it. A line that is damaged in another way is refused: those after
    it lean on it.
    """
    with get_lock_file(JournalFileSymlinkLock(str(file))):
        content = file.read_bytes()
        lines = content.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        kept = []
        for number, line in enumerate(lines, 1):
            found = line if _is_operation(line) else _after_a_cut(line)
            if found is None and number < len(lines):
                raise ConfigError(
                    f"hydra.sweeper.storage=journal:///{file} is damaged in line {number}: take it and what follows "
                    "out, or give another storage"
                )
            kept += [] if found is None else [found]
        mended = b"".join(line + b"\n" for line in kept)
        if mended == content:
            return False
        files.write_bytes(file, mended, durable=True)
    log.warning(
        f"warning: {file} was cut short, as by a full disk or a power cut: what it does not tell any more is done again"
    )
    return True


def _after_a_cut(line: bytes) -> bytes | None:
    """The whole operation that was written behind the rest of another."""
    begin = line.find(OPERATION, 1)
    while begin >= 0:
        if _is_operation(line[begin:]):
            return line[begin:]
        begin = line.find(OPERATION, begin + 1)
    return None


def _is_operation(line: bytes) -> bool:
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False
