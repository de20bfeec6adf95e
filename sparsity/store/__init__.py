"""Finished stages on disk, each under the hash of everything that determined it: `python -m sparsity.store --help`.

A stage is computed once, whoever asks: while one process computes it, others wait for its lock, which the operating
system takes from a process that dies.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sparsity import files
from sparsity.errors import ConfigError, reason
from sparsity.store.code import code_of, our_code
from sparsity.tensors import Tensors

__all__ = ["Damaged", "Kept", "Store", "code_of", "digest", "key_of", "our_code", "read_description"]

log = logging.getLogger("sparsity")

FORMAT = 3  # of the files and of what a stage computes: raised when either changes, so that old files are not used
METADATA_KEY = "sparsity"
KEY_LENGTH = 32  # hexadecimal digits
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Kept:
    """One member's finished stage."""

    tensors: Tensors
    note: dict[str, Any]  # what else there is to say of it, as JSON takes it


# --- keys ------------------------------------------------------------------------------------------------------------


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key of a stage: the hash of its ingredients, as JSON takes them."""
    return hashlib.sha256(_canonical(ingredients).encode()).hexdigest()[:KEY_LENGTH]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The hash of named tensors: names, types, shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return hashed.hexdigest()


# --- the store -------------------------------------------------------------------------------------------------------


class Store:
    """A folder of finished stages: `<stage>/<key>.safetensors`."""

    def __init__(self, folder: str | Path):
        """Refuses a folder that cannot be written, before anything is computed for it; one with stages is then read."""
        self.folder = Path(folder).absolute()
        self.told: set[str] = set()  # lines that are said once
        error = files.why_not_writable(self.folder)
        self.keeps = error is None
        if error is not None and files.is_read_only(error) and any(self.folder.glob(f"*/*{SUFFIX}")):
            self._warn(f"cannot be written ({_cause(error)}): the stages that it holds are used, and none is kept")
        elif error is not None:
            raise ConfigError(
                f"store={folder} cannot be written ({_cause(error)}): give another folder by store=FOLDER, "
                "or store=null to keep no stages"
            ) from error

    def _warn(self, line: str) -> None:
        if line not in self.told:
            self.told.add(line)
            log.warning(f"warning: store={self.folder} {line}")

    def path(self, stage: str, key: str) -> Path:
        """Where a stage lies, or would."""
        return self.folder / stage / f"{key}{SUFFIX}"

    def find(self, stage: str, key: str, check: Callable[[Kept], None] | None = None) -> Kept | None:
        """The finished stage of a key, or None; a damaged file is set aside with a warning.

        check: raises where a stage is not what it should be, whatever its checksum says.
        """
        path = self.path(stage, key)
        try:
            os.lstat(path)
            kept = _read(path, stage, key)
            if check is not None:
                check(kept)
        except (FileNotFoundError, NotADirectoryError):  # never computed, or cleaned away meanwhile
            return None
        except OSError as error:  # it may be whole: another user's, or on a disk that is away
            self._warn(f"holds {stage} in a file that cannot be read ({_cause(error)}): it is computed again")
            return None
        except Exception as error:  # whatever a damaged file makes its reader trip over
            aside = files.set_aside(path)
            done = "it cannot be set aside" if aside is None else f"set aside as {aside.name}"
            log.warning(f"warning: {path} is damaged ({reason(error)}): {done}, computed again")
            return None
        with contextlib.suppress(OSError):  # another user's
            os.utime(path)  # `clean` goes by when a stage was last used
        return kept

    def keep(self, stage: str, key: str, ingredients: Mapping[str, Any], *, kept: Kept) -> None:
        """Writes a finished stage, whole or not at all; a disk that refuses it costs a warning, not the run."""
        if not self.keeps:
            return
        path = self.path(stage, key)
        description = {"format": FORMAT, "stage": stage, "ingredients": ingredients, "note": kept.note}
        described = {**description, "checksum": _checksum(kept.tensors, description)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, safetensors.torch.save(kept.tensors, {METADATA_KEY: json.dumps(described)}))
        except (OSError, safetensors.SafetensorError) as error:
            self._warn(f"cannot keep {stage} ({_cause(error)}): the run continues without")

    @contextlib.contextmanager
    def claim(self, stage: str, keys: Sequence[str]) -> Iterator[None]:
        """Holds the locks of stages; while another process holds one, waits for it, in an order that all share."""
        with contextlib.ExitStack() as held:
            for key in sorted(set(keys)) if self.keeps else ():
                held.enter_context(self._lock(stage, key))
            yield

    @contextlib.contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        path = self.path(stage, key)
        with files.claimed(
            path.with_suffix(".lock"),
            waits=lambda: log.info(f"{stage:<10} waits for another process that computes it"),
            is_done=path.is_file,
        ) as error:
            if error is not None:
                self._warn(f"has no lock for {stage} ({_cause(error)}): it may be computed more than once")
            yield


def _cause(error: BaseException) -> str:
    """Why the disk refuses, in a few words."""
    return getattr(error, "strerror", None) or reason(error)


class Damaged(Exception):
    """What is wrong with a file of the store."""


def _read(path: Path, stage: str, key: str) -> Kept:
    described = read_description(path)
    description = {name: described[name] for name in ("format", "stage", "ingredients", "note")}
    if key_of(described["ingredients"]) != key or described["stage"] != stage:
        raise Damaged("its ingredients are not those of its name")
    tensors = safetensors.torch.load_file(path)
    if _checksum(tensors, description) != described["checksum"]:
        raise Damaged("its checksum differs")
    if not isinstance(described["note"], dict):
        raise Damaged("its note says nothing")
    return Kept(tensors, described["note"])


def read_description(path: Path) -> dict[str, Any]:
    """What a stage's file says of itself: format, stage, ingredients, note and checksum."""
    other = files.obstacle(path)
    if other is not None:
        raise Damaged(f"it is {other}")
    path.open("rb").close()  # where it may not be read, the system says so
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    described = json.loads(metadata.get(METADATA_KEY, "null"))
    if not isinstance(described, dict):
        raise Damaged("it says nothing of itself")
    return described


def _checksum(tensors: Tensors, description: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{digest(tensors)} {_canonical(description)}".encode()).hexdigest()
