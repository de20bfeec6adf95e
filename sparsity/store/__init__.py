"""Finished stages on disk, each under the hash of everything that determined it: `python -m sparsity.store --help`.

A stage is computed once, whoever asks: while one process computes it, others wait for its lock, which the operating
system takes from a process that dies.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import logging
import os
import textwrap
import types
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
from sparsity.tensors import Tensors

log = logging.getLogger("sparsity")

FORMAT = 2  # of the files and of what a stage computes: raised when either changes, so that old files are not used
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


def code_of(function: Any) -> dict[str, str]:
    """The hash of a function's or class's source, and of all that it names in its own package; {} of torch's own.

    Comments, docstrings and blank lines do not count, so that only a change of what is computed changes the hash.
    """
    found: dict[str, str] = {}
    package = _package(function)
    waiting = [] if package in ("torch", "torchvision", "builtins") else [function]
    while waiting:
        each = waiting.pop()
        name = f"{each.__module__}.{each.__qualname__}"
        source = None if name in found else _bare_source(each)
        if source is not None:
            found[name] = hashlib.sha256(source.encode()).hexdigest()[:KEY_LENGTH]
            waiting += [other for other in _named_in(each) if _package(other) == package]
    return found


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def _bare_source(thing: Any) -> str | None:
    """The source of a function or class without comments and docstrings; None where there is none to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _named_in(thing: Any) -> list[Any]:
    """The functions and classes that the code of a function, or of a class's methods and bases, names."""
    if inspect.isclass(thing):
        methods = [getattr(entry, "__func__", entry) for entry in vars(thing).values()]
        inner = [named for method in methods if inspect.isfunction(method) for named in _named_in(method)]
        return [*thing.__bases__, *inner]
    if not inspect.isfunction(thing):
        return []
    names = {name for code in _codes(thing.__code__) for name in code.co_names}
    named = [thing.__globals__[name] for name in sorted(names) if name in thing.__globals__]
    return [each for each in named if inspect.isfunction(each) or inspect.isclass(each)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


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
