"""Networks' libraries: compiled by the machine's own compiler, and kept under the hash of all that they follow from."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from sparsity.files import cache_folder, write_bytes
from sparsity.kernels.chain import Chain

log = logging.getLogger("sparsity")

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared")
FLAGS += ("-fPIC", "-pthread", "-fvisibility=hidden", "-w")
X86 = ("x86_64", "AMD64")
LONGEST = 300  # seconds that a compiler is given

FOLDER = "SPARSITY_KERNELS"  # the variable that says where libraries are kept
MORE_FLAGS = "SPARSITY_KERNELS_FLAGS"  # the variable with flags beside ours, such as a sanitizer's


class Library:
    """A network's compiled library; a state of it belongs to one member."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))  # which lets other threads run while a function of it does
        self.functions.make.restype = ctypes.c_void_p
        self.functions.drop.argtypes = [ctypes.c_void_p]
        self.functions.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.functions.correct.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.functions.correct.restype = ctypes.c_int64


def library_of(chain: Chain) -> Library | None:
    """The library of a chain; None, told once, where it cannot be built."""
    place = _place(chain.source)
    return None if place is None else _loaded(chain.source, place)


@functools.cache
def _loaded(source: str, place: Path) -> Library | None:
    try:
        return Library(_kept(place) or _build(source, place))
    except (OSError, subprocess.SubprocessError) as error:
        _tell(error)
    return None


def _kept(place: Path) -> Path | None:
    """The file of a library, whose name ends in the hash of what it holds: loading half of one ends the process."""
    with contextlib.suppress(OSError):
        for path in sorted(place.parent.glob(f"{place.name}-*.so")):
            if path.stem == f"{place.name}-{_hash(path.read_bytes())}":
                return path
    return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _build(source: str, place: Path) -> Path:
    """Compiles a program aside, and puts the library in its place whole."""
    with tempfile.TemporaryDirectory() as folder:
        program, library = Path(folder) / "network.cpp", Path(folder) / "network.so"
        program.write_text(source, encoding="utf-8")
        command = [*_compiler()[0], *_flags(), "-I", str(HERE), str(program), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST)
        content = library.read_bytes()
        path = place.with_name(f"{place.name}-{_hash(content)}.so")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        return path


def _tell(error: OSError | subprocess.SubprocessError) -> None:
    said = getattr(error, "stderr", None) or str(error)
    line = next((line for line in said.splitlines() if "error" in line), said.strip().partition("\n")[0])
    _warn(f"warning: kernels cannot be compiled ({line.strip()}): training runs without them")


@functools.cache
def _warn(text: str) -> None:
    """Warns once."""
    log.warning(text)


def _place(source: str) -> Path | None:
    """Where a program's library is kept, but for the end of its name; None without a compiler, which is told once."""
    command, version = _compiler()
    if not command:
        _warn("warning: no C++ compiler is found (set CXX): training runs without kernels")
        return None
    parts = [source, *_headers(), version, *_flags(), processor()]
    folder = Path(os.environ.get(FOLDER) or cache_folder() / "kernels")
    return folder / _hash(chr(0).join(parts).encode())


@functools.cache
def _headers() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.hpp"))]


def _compiler() -> tuple[list[str], str]:
    """The command of the machine's compiler and its version; empty where there is none."""
    return _compiler_of(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.cache
def _compiler_of(asked: str, _: str) -> tuple[list[str], str]:
    for command in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                asking = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=60)
                return command, asking.stdout
    return [], ""


def _flags() -> list[str]:
    # compilers that know a processor by its features alone take half its vectors
    wide = ["-mprefer-vector-width=512"] if platform.machine() in X86 else []
    return [*FLAGS, *wide, *shlex.split(os.environ.get(MORE_FLAGS, ""))]


@functools.cache
def processor() -> str:
    """The processor's name and all that it can do, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        told = {line.partition(":")[2].strip() for line in file if line.startswith(("model name", "flags", "Features"))}
        return " | ".join(sorted(told, key=len))
    return platform.processor() or platform.machine()
