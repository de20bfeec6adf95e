"""The source files that a stage's numbers follow from, by their hashes: our own, and all that a user's code imports.

A user's module counts as a whole but for comments and docstrings, so with its constants, and with every other module
that it names, by an import wherever in it; where it imports by names that it makes up, all files beside it count. An
installed package counts by its version and by the hashes of its files that its installer noted.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Collection, Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

OURS = __name__.partition(".")[0]
RECORDED = ("torch", "torchvision", "numpy")  # whose versions a result says; a key does not change with them
INSTALLED = {"site-packages", "dist-packages"}  # folders
REACHING = {
    "importlib",
    "runpy",
    "pkgutil",
    "imp",
    "pydoc",
    "hydra",
    "__import__",
    "exec",
    "eval",
}  # names of what imports by text
SOURCES = (".py", ".c", ".cc", ".cpp", ".cu", ".pyx")  # ends of texts that name a file
HASH_LENGTH = 32  # hexadecimal digits


def our_code(left_out: Collection[str] = ()) -> dict[str, str]:
    """The hash of every source file of this package; left_out: rooms, or files of them such as `experiment.keys`."""
    out = set(left_out)
    return {name: hashed for name, hashed in _our_files().items() if not {name, name.partition(".")[0]} & out}


@functools.cache
def _our_files() -> dict[str, str]:
    root = Path(__file__).parent.parent
    files = [path for path in root.rglob("*.py") if "conf" not in path.relative_to(root).parts]
    found = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(files)}
    found |= {".".join(path.relative_to(root).parts): path for path in sorted(root.rglob("*.hpp"))}
    return {name: _hash(path.read_bytes()) for name, path in found.items()}


def code_of(target: str, function: Any) -> dict[str, str]:
    """The hashes of all that the results of a user's function may follow from, by module; {} of torch's and of ours.

    target: the name that the function was found by, such as `my_methods.penalty`.
    """
    found: dict[str, str] = {}
    named, defined = _module_of(target), getattr(function, "__module__", None) or ""
    waiting = [name for name in (named, defined) if _counts(name)]
    for name in waiting:
        if _place(name) is None:  # typed in, as in a notebook
            found |= _typed(function, waiting)
    while waiting:
        for name in _with_parents(waiting.pop()):
            place = None if name in found else _place(name)
            if place is None:
                continue
            if place.version is not None:
                found[name.partition(".")[0]] = place.version
                continue
            found[name], names = _read(name, place)
            waiting += [other for other in names if other not in found and _counts(other)]
    return found


# --- which module ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a module lies."""

    path: Path | None  # None: a folder of modules without a file of its own
    folders: tuple[str, ...] | None  # of its submodules, if it is a package
    version: str | None = None  # of an installed package, with the hash of its files
    spec: Any = None  # of an imported module: another one where it was imported again


def _module_of(target: str) -> str:
    """The module that a dotted name begins with."""
    parts = target.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in sys.modules), "")


def _counts(name: str) -> bool:
    top = name.partition(".")[0]
    return bool(top) and top not in (OURS, *RECORDED) and top not in sys.stdlib_module_names


def _with_parents(name: str) -> Iterator[str]:
    """a, a.b and a.b.c of a.b.c: importing the last imports all."""
    parts = name.split(".")
    return (".".join(parts[: end + 1]) for end in range(len(parts)))


def _place(name: str) -> Place | None:
    """Where a module lies, imported or not; None where there is none, or none with a file. Executes no code."""
    module = sys.modules.get(name)
    try:
        if module is None:
            spec = _spec(name)
            path, folders = spec and spec.origin, spec and spec.submodule_search_locations
        else:
            spec, path, folders = (vars(module).get(key) for key in ("__spec__", "__file__", "__path__"))
        folders = None if folders is None else tuple(map(str, folders))
        own = Path(path) if path and path not in ("built-in", "frozen", "namespace") else None
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return None
    if own is None and folders is None:
        return None
    parts = {part for folder in (own, *(folders or ())) if folder is not None for part in Path(folder).parts}
    version = _version(name.partition(".")[0]) if parts & INSTALLED else None
    return Place(own, folders, version, None if module is None else spec or module)


def _spec(name: str) -> Any:
    parent, _, _ = name.rpartition(".")
    if not parent:
        return importlib.util.find_spec(name)
    place = _place(parent)
    return None if place is None or place.folders is None else PathFinder.find_spec(name, list(place.folders))


@functools.cache
def _version(top: str) -> str | None:
    """The version of an installed package and the hash of its files; None of a file that no installer put there."""
    try:
        found = metadata.distribution(top)
    except metadata.PackageNotFoundError:
        names = _distributions().get(top)
        if not names:
            return None
        found = metadata.distribution(names[0])
    listed = sorted(line for line in (found.read_text("RECORD") or "").splitlines() if ".py," in line or ".so," in line)
    return f"{found.metadata['Name']} {found.version} {_hash(chr(10).join(listed).encode())}"


@functools.cache
def _distributions() -> Any:
    return metadata.packages_distributions()


# --- what is in it ---------------------------------------------------------------------------------------------------

_seen: dict[str, tuple[Any, tuple[str, list[str]]]] = {}  # by module: as read when it was imported


def _read(name: str, place: Place) -> tuple[str, list[str]]:
    """The hash of a module, and the names that it may import.

    What runs is what was imported: while a module is not imported again, its file is not read again.
    """
    if name in _seen and place.spec is not None and _seen[name][0] is place.spec:
        return _seen[name][1]
    read = _read_file(name, place)
    if place.spec is not None:
        _seen[name] = place.spec, read
    return read


def _read_file(name: str, place: Place) -> tuple[str, list[str]]:
    if place.path is None:
        return "", []
    try:
        content = place.path.read_bytes()
    except OSError:  # in an archive, or gone
        content = (_source_in_archive(name) or "").encode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes and the like in somebody's text
            tree = ast.parse(content)
        package = name if place.folders is not None else name.rpartition(".")[0]
        names = list(dict.fromkeys(_names_in(tree, package, place)))
        files = sorted(set(_files_in(tree, place.path.parent)))
        text = content if b"__doc__" in content else ast.unparse(_without_docstrings(tree)).encode()
    except (SyntaxError, ValueError, RecursionError):  # no source: compiled
        return _hash(content), []
    return _hash(text + b"".join(path.read_bytes() for path in files)), names


def _source_in_archive(name: str) -> str | None:
    loader = getattr(getattr(sys.modules.get(name), "__spec__", None), "loader", None)
    return loader.get_source(name) if hasattr(loader, "get_source") else None


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        is_block = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        if is_block and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _names_in(tree: ast.AST, package: str, place: Place) -> Iterator[str]:
    """The names of all modules that a module's imports may mean."""
    reaches = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            reaches |= any(alias.name.partition(".")[0] in REACHING for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.level, node.module or "", package)
            reaches |= base.partition(".")[0] in REACHING or (base == "sys" and node.names[0].name in ("modules", "*"))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
            if node.names[0].name == "*":
                yield from _submodules(base)
        elif isinstance(node, ast.Name):
            reaches |= node.id in REACHING
        elif isinstance(node, ast.Attribute):
            reaches |= node.attr == "modules" and isinstance(node.value, ast.Name) and node.value.id == "sys"
    if reaches:
        yield from _texts_as_modules(tree, package)
        yield from _beside(package, place)


def _absolute(level: int, module: str, package: str) -> str:
    """The module that an import means: `..a` in the package x.y is x.a."""
    if not level:
        return module
    parts = package.split(".")
    return ".".join(part for part in (*parts[: len(parts) - level + 1], module) if part)


def _texts_as_modules(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            dots = len(node.value) - len(node.value.lstrip("."))
            bare = node.value[dots:]
            if bare and all(part.isidentifier() for part in bare.split(".")):
                yield _absolute(dots, bare, package)
                yield from [f"{package}.{bare}"] if package else []


def _beside(package: str, place: Place) -> Iterator[str]:
    """The modules of the whole package; of a module alone those of its folder."""
    top = package.partition(".")[0]
    if top:
        yield from _submodules(top)
    elif place.path is not None:
        yield from (path.stem for path in sorted(place.path.parent.glob("*.py")))


def _submodules(name: str) -> Iterator[str]:
    """The modules below a package, at every depth."""
    place = _place(name) if _counts(name) else None
    for folder in (place.folders or ()) if place is not None and place.version is None else ():
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            own = parts[:-1] if parts[-1] == "__init__" else parts
            if own and all(part.isidentifier() for part in own):
                yield ".".join((name, *own))


def _files_in(tree: ast.AST, folder: Path) -> Iterator[Path]:
    """The source files beside a module that a text in it names."""
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.endswith(SOURCES) and len(text) < 4096 and "\0" not in text:
            yield from (path for path in {folder / text, Path(text).absolute()} if path.is_file())


# --- what has no file ------------------------------------------------------------------------------------------------


def _typed(function: Any, waiting: list[str]) -> dict[str, str]:
    """The hashes of a function that was typed in and of all that it names; what it names of modules joins `waiting`."""
    found: dict[str, str] = {}
    things = [(getattr(function, "__qualname__", type(function).__qualname__), function)]
    while things:
        name, thing = things.pop()
        key = f"{getattr(thing, '__module__', '')}.{name}"
        if isinstance(thing, types.ModuleType):
            waiting += [thing.__name__] if _counts(thing.__name__) else []
        elif key not in found:
            code = inspect.isfunction(thing) or inspect.isclass(thing)
            text = _source(thing) if code else repr(thing)
            found[key] = _hash(text.encode())
            things += _named_in(thing) if code else []
    return found


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return " ".join(str((code.co_code, _bare(code.co_consts), code.co_names)) for code in _codes(thing))


def _bare(constants: tuple[Any, ...]) -> list[Any]:
    """Constants without the code objects among them, whose names hold addresses."""
    return [each for each in constants if not isinstance(each, types.CodeType)]


def _named_in(thing: Any) -> list[tuple[str, Any]]:
    """What the code of a function, or of a class's methods and bases, names in its module."""
    if inspect.isclass(thing):
        functions = [getattr(entry, "__func__", entry) for entry in vars(thing).values()]
        bases = [(base.__qualname__, base) for base in thing.__bases__ if _counts(base.__module__)]
        return [*bases, *(named for each in functions if inspect.isfunction(each) for named in _named_in(each))]
    own = {name for code in _codes(thing) for name in code.co_names}
    named = [(name, thing.__globals__[name]) for name in sorted(own) if name in thing.__globals__]
    wrapped = getattr(thing, "__wrapped__", None)
    cells = [cell.cell_contents for cell in thing.__closure__ or () if cell.cell_contents is not None]
    inner = [(getattr(each, "__qualname__", "value"), each) for each in (wrapped, *cells) if each is not None]
    own_code = [(name, each) for name, each in (*named, *inner) if _is_own(each)]
    return own_code


def _is_own(thing: Any) -> bool:
    if isinstance(thing, types.ModuleType):
        return True
    if inspect.isfunction(thing) or inspect.isclass(thing):
        return _counts(thing.__module__) or thing.__module__ == "__main__"
    return isinstance(thing, int | float | complex | str | bytes | bool | tuple | list | dict | set | frozenset | None)


def _codes(thing: Any) -> Iterator[types.CodeType]:
    """The code objects of a function, or of a class's methods, and of the functions inside."""
    functions = [
        getattr(entry, "__func__", entry) for entry in (vars(thing).values() if inspect.isclass(thing) else [thing])
    ]
    waiting = [each.__code__ for each in functions if inspect.isfunction(each)]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
