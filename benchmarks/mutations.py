"""How well the tests guard the kernels: `python -m benchmarks.mutations`.

Draws small changes of lines of `sparsity/kernels/*.hpp`, each alone, and runs the kernels' tests on each: a change that
fails a test, crashes or hangs is caught. Results are written as they come, and the same command goes on with them.
"""

import argparse
import csv
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = Path("sparsity") / "kernels"
PARTS = ("sparsity", "conf", "tests", "benchmarks", "main.py", "pyproject.toml", "setup.cfg", "README.md")
SECONDS = 1200  # that a change's tests are given: what hangs is caught
FLAGS = "-O1"  # compiled in half of the time, for the same results
PLAIN = r"(?<=\s){}(?=\s)"  # an operator between spaces, as no template's brackets are

SWAPPED = {"+": "-", "-": "+", "*": "+", "/": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
SWAPPED |= {"&&": "||", "||": "&&", "+=": "-=", "%": "/", "|": "&", "&": "|"}
NUMBER = re.compile(r"(?<![\w.\"'])\d+(?![\w.\"'])")
TRUTH = re.compile(r"\b(true|false)\b")
TERNARY = re.compile(r"\? ([^?:,;]+) : ([^?:,;)]+)")
STATEMENT = re.compile(
    r"^\s*(?!return|using|template|typedef|static|const|else|break|continue|public|private)[a-z][\w.>-]*[\[(= +].*;$"
)
TYPES = re.compile(r"^\s*(int|int64_t|float|double|auto|bool|char|uint8_t|std::\w+(<.*>)?) ")


@dataclass(frozen=True)
class Mutation:
    """A change of one line, its number from 1."""

    kind: str
    file: str
    line: int
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """What came of it: caught by a test, or survived."""

    kind: str
    file: str
    line: int
    before: str
    after: str
    outcome: str


def main() -> None:
    """Runs the tests on every change that has no outcome yet, and says which survived."""
    parser = argparse.ArgumentParser("benchmarks.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tested at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs/mutations.csv"), help="%(default)s")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        unchanged = tested(copied(Path(name)))
    if unchanged != SURVIVED:
        sys.exit(f"without a change the tests fail: {unchanged}")
    known = read(asked.out)
    drawn = candidates(random.Random(asked.seed))
    tried = [mutation for mutation, _ in zip(drawn, range(3 * asked.count))]
    with ThreadPoolExecutor(asked.jobs) as pool:
        counted = 0
        for start in range(0, len(tried), asked.jobs):
            some = tried[start : start + asked.jobs]
            for found in pool.map(lambda each: known.get(key(each)) or outcome(each), some):
                if key(found) not in known:
                    write(asked.out, found)
                    known[key(found)] = found
                counted += found.outcome != NONE
                print(
                    f"{counted:>4} {found.outcome:<60.60} {found.file}:{found.line} {found.after.strip()}", flush=True
                )
            if counted >= asked.count:
                break
    judged = [each for each in map(known.get, map(key, tried)) if each is not None and each.outcome != NONE]
    survivors = [each for each in judged if each.outcome == SURVIVED]
    print(f"\n{len(judged) - len(survivors)} of {len(judged)} changes are caught; the others:")
    for each in survivors:
        print(f"{each.file}:{each.line}\n- {each.before.strip()}\n+ {each.after.strip()}")


SURVIVED, NONE = "survived", "no change: it does not compile, or is not compiled here"


def candidates(generator: random.Random) -> Iterator[Mutation]:
    """Changes in a random order, of each kind as often as long as there are some."""
    by_kind: dict[str, list[Mutation]] = {}
    for path in sorted((ROOT / KERNELS).glob("*.hpp")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for kind, after in changes(line):
                by_kind.setdefault(kind, []).append(Mutation(kind, path.name, number, line, after))
    for each in by_kind.values():
        generator.shuffle(each)
    while any(by_kind.values()):
        kind = generator.choice(sorted(kind for kind, each in by_kind.items() if each))
        yield by_kind[kind].pop()


def changes(line: str) -> Iterator[tuple[str, str]]:
    """The kinds of small changes of a line of C++, and the line after each; comments and directives stay."""
    code, slashes, comment = line.partition("//")
    if code.lstrip().startswith(("#", "static_assert", "template", "typedef", "using", "class", "struct")):
        return
    rest = slashes + comment
    for operator, other in SWAPPED.items():
        for found in re.finditer(PLAIN.format(re.escape(operator)), code):
            yield "operator", code[: found.start()] + other + code[found.end() :] + rest
    for found in NUMBER.finditer(code):
        yield "number", f"{code[: found.start()]}{int(found.group()) + 1}{code[found.end() :]}{rest}"
    for found in TRUTH.finditer(code):
        other = "false" if found.group() == "true" else "true"
        yield "truth", code[: found.start()] + other + code[found.end() :] + rest
    for found in TERNARY.finditer(code):
        yield "ternary", f"{code[: found.start()]}? {found.group(2)} : {found.group(1)}{code[found.end() :]}{rest}"
    whole = code.rstrip()
    if STATEMENT.match(whole) and not TYPES.match(whole) and whole.count("(") == whole.count(")"):
        yield "statement", code[: len(code) - len(code.lstrip())] + ";" + code[len(whole) :] + rest


def outcome(mutation: Mutation) -> Outcome:
    """What the tests make of a change, in a copy of the project."""
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        path = folder / KERNELS / mutation.file
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[mutation.line - 1] == mutation.before, mutation
        before = preprocessed(folder)
        lines[mutation.line - 1] = mutation.after
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        is_none = preprocessed(folder) == before or not compiles(folder)
        return Outcome(*astuple(mutation), NONE if is_none else tested(folder))


def copied(folder: Path) -> Path:
    """A folder with all that tests need."""
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def preprocessed(folder: Path) -> str:
    """The kernels as the compiler of this machine sees them."""
    command = [*COMPILER, "-std=c++20", "-march=native", "-E", "-P", "library.hpp"]
    return subprocess.run(command, cwd=folder / KERNELS, capture_output=True, text=True, check=True).stdout


COMPILER = os.environ.get("CXX", "c++").split()
EVERYTHING = """#include "library.hpp"
LIBRARY(kernels::Padding<1, 9, 8, 1, 1>, kernels::Convolution<1, 11, 10, 33, 3, 3, 1, 1, 1, 1, true>,
        kernels::Pooling<33, 9, 8, 2, 2, 1, 1, true>, kernels::Rectifier<1848, 0u>,
        kernels::Convolution<33, 8, 7, 5, 2, 3, 2, 1, 1, 1, false>, kernels::Linear<100, 3, true>)
"""


def compiles(folder: Path) -> bool:
    """Whether a program with all kinds of layers compiles."""
    (folder / "everything.cpp").write_text(EVERYTHING)
    command = [*COMPILER, "-std=c++20", "-march=native", "-w", "-fsyntax-only", f"-I{KERNELS}", "everything.cpp"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def tested(folder: Path) -> str:
    """The first test that fails, or that all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "SPARSITY_KERNELS": str(folder / "libraries")}
    environment |= {"SPARSITY_KERNELS_FLAGS": FLAGS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_kernels.py"]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return "caught: it hangs"
    if done.returncode == 0:
        return SURVIVED
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    return f"caught by {failed.group(1)}" if failed else "caught: it crashes"


def key(each: Mutation | Outcome) -> tuple[str, str, str]:
    """What a change is known by, wherever its line has moved."""
    return each.file, each.before.strip(), each.after.strip()


def read(path: Path) -> dict[tuple[str, str, str], Outcome]:
    """The outcomes so far."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        found = [Outcome(**{**row, "line": int(row["line"])}) for row in csv.DictReader(file)]
    return {key(each): each for each in found}


def write(path: Path, found: Outcome) -> None:
    """Adds an outcome to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow([field.name for field in fields(Outcome)])
        writer.writerow(astuple(found))


if __name__ == "__main__":
    main()
