"""The architecture: who imports whom, and who knows Hydra."""

import ast
import configparser
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

LEVELS = [
    {"errors", "processes", "kinds", "uses", "front", "memory", "streams", "schedules"},
    {"files", "tensors", "tables", "nodes", "limits"},
    {
        "models",
        "data",
        "losses",
        "augmentation",
        "regularizers",
        "shrinking",
        "quantizing",
        "pruning",
        "graph",
        "capture",
    },
    {"population", "weights", "teachers"},
    {"step", "artifact"},
    {"evaluation", "csr", "kernels"},
    {"training", "accounting", "compaction"},
    {"budgets"},
    {"stages", "config", "results", "console", "store", "tracking", "exports"},
    {"experiment"},
    {"sweeper", "callbacks", "launcher"},
]
KNOW_HYDRA = {"config", "experiment", "sweeper", "callbacks", "launcher"}
ROOMS = sorted(
    path.stem for path in (ROOT / "sparsity").glob("*") if path.suffix == ".py" or (path / "__init__.py").exists()
)
ROOMS.remove("__init__")
COMMANDS = {path.parent.name: path for path in (ROOT / "sparsity").rglob("__main__.py")}  # of the rooms that have one


def imports_of(room):
    """The modules that a room's files import, anywhere in them, but for its command, which is above all rooms."""
    folder = ROOT / "sparsity" / room
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        if path not in COMMANDS.values():
            yield from _imports_in(path)


def _imports_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level_of(room):
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


def test_every_room_has_a_level():
    assert set(ROOMS) == set().union(*LEVELS)


def test_every_room_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {f"sparsity.{path.parent.name}" for path in (ROOT / "sparsity").glob("*/__init__.py")}
    assert set(setup["options"]["packages"].split()) == {"sparsity", "sparsity.conf"} | folders


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room):
    for module in imports_of(room):
        parts = module.split(".")
        if parts[0] == "sparsity" and parts[1] in ROOMS and parts[1] != room:
            assert level_of(parts[1]) < level_of(room), f"{room} imports {module}"


REACH_UP = {  # what runs a network, for a word of the command
    "results": {"sparsity.experiment.probing.sensitivity", "sparsity.experiment.compacting.export_compact"}
}


@pytest.mark.parametrize("room", COMMANDS)
def test_commands_reach_no_higher_than_they_say(room):
    def is_above(module):
        parts = module.split(".")
        return (
            parts[0] == "sparsity" and parts[1] in ROOMS and parts[1] != room and level_of(parts[1]) >= level_of(room)
        )

    assert {module for module in _imports_in(COMMANDS[room]) if is_above(module)} == REACH_UP.get(room, set())


def test_no_file_imports_a_command():
    for path in (ROOT / "sparsity").rglob("*.py"):
        assert not re.search(r"^\s*(from|import)\b.*__main__", path.read_text(), re.MULTILINE), path


def test_no_file_imports_itself_by_others():
    """Imports inside functions and for types alone count too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "sparsity").rglob("*.py")
    }
    imported = {name: {_file_of(module, files) for module in _imports_in(path)} for name, path in files.items()}
    waiting = {name: found - {None, name, "sparsity"} for name, found in imported.items()}
    while ready := {name for name, found in waiting.items() if not found & waiting.keys()}:
        waiting = {name: found for name, found in waiting.items() if name not in ready}
    assert not waiting


def _file_of(module, files):
    """The file of an imported name: a module, or one that defines the name."""
    return module if module in files else module.rpartition(".")[0] if module.rpartition(".")[0] in files else None


NAMES = {
    name
    for path in (ROOT / "conf" / "recipe").glob("*.yaml")
    for name in yaml.safe_load(path.read_text()).get("recipe", {})
}


def test_no_string_names_a_stage():
    """Stages are known by what they do; `train` is the name of a set of images too."""
    assert {"pretrain", "regularize", "prune", "finetune", "rewind"} <= NAMES
    for path in (ROOT / "sparsity").rglob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & (NAMES - {"train"}), path


@pytest.mark.parametrize("room", sorted(set(ROOMS) - KNOW_HYDRA))
def test_configuration_stops_at_the_door(room):
    command = _imports_in(COMMANDS[room]) if room in COMMANDS else ()
    known = {module.split(".")[0] for module in (*imports_of(room), *command)}
    assert not known & {"hydra", "omegaconf", "optuna"}


@pytest.mark.parametrize("argument", ["--help", "--cfg=job"])
def test_help_and_composition_need_no_torch(argument):
    command = [sys.executable, "-X", "importtime", "main.py", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and "torch" not in imported


def test_what_the_readme_loads_needs_no_other_import():
    code = "import sparsity; print(sparsity.csr.load.__name__, sparsity.load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "load load\n"


def test_public_names():
    import sparsity

    for name in sparsity.__all__:
        found = getattr(sparsity, name)
        assert callable(found) or callable(found.load), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparsity.nothing  # noqa: B018
