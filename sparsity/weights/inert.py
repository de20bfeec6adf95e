"""A pickle read without executing anything: plain data and tensors as they are, a stand-in for everything else.

Given to `torch.load` in place of the module `pickle`. No name in the file is ever looked up: a few stand for functions
of this file, every other for a `Name`; calling one makes an `Inert`, and setting an object's state sets nothing.
"""

import builtins
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class ExecutesCode(pickle.UnpicklingError):
    """A file that names what only a program that is to be run would name."""


class Name:
    """What a class or a function is called in the file."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    @property
    def __name__(self) -> str:
        """The same, for what torch says of it."""
        return self.name


class Inert(dict):
    """Stands for an object of a class that was not looked up; of what it held, only a mapping's items are kept."""

    __hash__ = object.__hash__

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.is_module = False

    def append(self, *_: Any) -> None:
        """Keeps nothing."""

    extend = add = append


class Unpickler(pickle._Unpickler):
    """pickle's own reader in Python, in which no instruction reaches code that the file names."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if self.proto < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        is_function = module == "builtins" and name != "getattr" and not isinstance(vars(builtins).get(name), type)
        if is_function or module.split(".")[0] in PROGRAMS:
            raise ExecutesCode(full)
        return Name(full)

    def get_extension(self, code: int) -> None:
        """Refuses numbers that stand for names: torch writes none."""
        raise pickle.UnpicklingError(f"extension {code}")

    def _made(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What a call of the file's comes to."""
        if isinstance(function, Name):
            is_reconstructed = function.name in RECONSTRUCTORS and args and isinstance(args[0], Name)
            return Inert(args[0].name if is_reconstructed else function.name)
        if any(function is each for each in CALLED):
            return function(*args)
        raise pickle.UnpicklingError(f"a call of {type(function).__name__}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._made(klass, tuple(args)))

    def load_reduce(self) -> None:
        """Calls a function."""
        args = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)

    def load_newobj(self) -> None:
        """Makes an object."""
        args = self.stack.pop()
        self.append(self._made(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        """Makes an object with arguments by keyword."""
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        """Would set the state of an object; notes only whether it is that of a module."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert) and isinstance(state, dict):
            self.stack[-1].is_module = {"_parameters", "_modules"} <= state.keys()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build


def load(file: Any, **how: Any) -> Any:
    """The object of one pickle."""
    return Unpickler(file, **how).load()


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())


def _tensor_of_type(storage: Any, offset: int, size: Any, stride: Any, _: Any, __: Any, dtype: torch.dtype, *___: Any):
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, OrderedDict(), dtype)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _subclass(function: Callable[..., Tensor], _: Any, args: tuple[Any, ...], *__: Any) -> Any:
    """A tensor with attributes, without them; of a class of its own: a stand-in."""
    is_plain = any(function is each for each in CALLED[1:])
    return function(*args) if is_plain else Inert(getattr(function, "name", "a tensor's subclass"))


CALLED: list[Callable[..., Any]] = [OrderedDict, _tensor, _tensor_of_type, _parameter, _subclass]
KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.storage.UntypedStorage": torch.UntypedStorage,  # compared with, never called
}
RECONSTRUCTORS = ("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")
# Nothing of these would be called here either; a file that names them is one to warn of, not to read.
# fmt: off
PROGRAMS = frozenset((
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib", "imp", "ctypes", "pty", "code",
    "codeop", "pickle", "_pickle", "marshal", "webbrowser", "signal", "multiprocessing", "threading", "_thread",
    "asyncio", "tempfile", "urllib", "http", "ftplib", "smtplib", "requests", "timeit", "cProfile", "profile", "pdb",
    "bdb", "doctest", "inspect", "gc", "atexit", "site", "pip", "pkgutil", "zipimport", "io", "_io",
))
# fmt: on
