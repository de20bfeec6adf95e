"""A network of one's own is found in the folder that the command is typed in, or the error says where it must lie."""

import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from sparsity import config
from sparsity.config.outside import bring_in
from sparsity.errors import ConfigError

NET = """
from torch import nn
from beside_{name} import WIDTH
class Net(nn.Module):
    class Inner(nn.Module):
        pass
    def __init__(self, num_classes):
        super().__init__()
        self.module = nn.Linear(784, num_classes)
    def forward(self, images):
        return self.module(images.flatten(1))
"""


@pytest.fixture
def lying_in(tmp_path, monkeypatch):
    """A function that writes a module with another beside it into a folder; what it puts on the path is taken off."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(name: str, folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(NET.format(name=name))
        (folder / f"beside_{name}.py").write_text("WIDTH = 3\n")
        return folder

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def typed(target: str) -> dict:
    return {"model": {"factory": {"_target_": target}}}


@pytest.mark.parametrize("target", ["own_nets.Net", "own_nets.Net.Inner", "own_nets"])
def test_a_module_in_the_folder_is_found_with_what_lies_beside_it(tmp_path, lying_in, target):
    folder = lying_in("own_nets", tmp_path / "elsewhere")
    bring_in(typed(target), ["own_nets"], folder)
    assert sys.modules["own_nets"].__file__ == str(folder / "own_nets.py")
    assert sys.path[-1] == str(folder)


@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize("trust", ["own_package", "own_package.inner.*"])
def test_so_is_one_in_a_package(tmp_path, lying_in, with_init, trust):
    inner = lying_in("nets", tmp_path / "own_package" / "inner")
    (inner / "nets.py").write_text("class Net: pass\n")
    if with_init:
        (tmp_path / "own_package" / "__init__.py").touch()
        (inner / "__init__.py").touch()
    bring_in(typed("own_package.inner.nets.Net"), [trust], tmp_path)
    assert sys.modules["own_package.inner.nets"].__file__ == str(inner / "nets.py")


@pytest.mark.parametrize("trust", [[], ["other"], ["own_net"], ["own_nets.other"]])
def test_what_is_not_admitted_is_not_imported_and_changes_no_path(tmp_path, lying_in, trust):
    lying_in("own_nets")
    before = [*sys.path]
    bring_in(typed("own_nets.Net"), trust, tmp_path)
    assert "own_nets" not in sys.modules and sys.path == before


def test_the_folder_hides_no_installed_module(tmp_path, lying_in, caplog):
    before = [*sys.path]
    (tmp_path / "yaml.py").write_text("raise SystemExit('imported')\n")
    with caplog.at_level(logging.WARNING, "sparsity"):
        bring_in(typed("yaml.Loader"), ["yaml"], tmp_path)
    assert sys.path == before
    assert f"which hides {tmp_path / 'yaml.py'}: rename that" in caplog.text
    with pytest.raises(ConfigError, match=rf"yaml .*has no Net: .*which hides {tmp_path / 'yaml.py'}"):
        bring_in(typed("yaml.Net"), ["yaml"], tmp_path)


def test_a_folder_of_the_name_elsewhere_hides_no_module(tmp_path, lying_in):
    (tmp_path / "first" / "own_nets").mkdir(parents=True)
    sys.path.append(str(tmp_path / "first"))
    folder = lying_in("own_nets", tmp_path / "second")
    bring_in(typed("own_nets.Net"), ["own_nets"], folder)
    assert sys.modules["own_nets"].__file__ == str(folder / "own_nets.py")


@pytest.mark.parametrize(
    "target, message",
    [
        ("own_net.Net", "no module own_net lies in {folder}, where the command was typed, and none is installed: put "
                        "own_net.py or a folder own_net/ there; own_nets lies there"),
        ("nowhere.deep.Net", "no module nowhere lies in {folder}"),
        ("own_nets.Nett", r"own_nets \({folder}/own_nets.py\) has no Nett: did you mean Net\?"),
        ("own_nets.zzz", "has no zzz: it has Net$"),
        ("own_package.net.Net", r"own_package \({folder}/own_package\) has no net: did you mean nets\?"),
        ("own_package.needs.Net", "own_package.needs cannot be imported: No module named 'nothing_there'"),
        ("own_package.wrong.Net", "own_package.wrong cannot be imported: SyntaxError: .*line 1"),
        ("own_package.ends.Net", "own_package.ends cannot be imported: SystemExit: 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_by_what_is_wrong(tmp_path, lying_in, target, message):
    folder = lying_in("own_nets", tmp_path / "here")
    package = folder / "own_package"
    package.mkdir()
    for name, text in {"nets": "", "needs": "import nothing_there", "wrong": "def f(:", "ends": "exit(3)"}.items():
        (package / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=message.replace("{folder}", str(folder))) as error:
        bring_in(typed(target), [target.split(".")[0]], folder)
    assert str(error.value).startswith(f"model.factory._target_={target} cannot be used: ")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_finds_a_network_in_the_current_folder(run, tmp_path, lying_in):
    lying_in("own_nets")
    result = run("model=custom", "model.factory._target_=own_nets.Net", "trust=[own_nets]", "stages=[pretrain]")
    assert result["total"]["weights"] == 7840


@pytest.mark.slow
def test_the_config_takes_the_folder_that_it_is_given(tmp_path, lying_in):
    folder = lying_in("own_nets", tmp_path / "elsewhere")
    composed, _ = config.compose(["data=digits", "model=custom", "model.factory._target_=own_nets.Net"])
    checked = config.read(composed, trust=["own_nets"], folder=str(folder))
    assert checked.model.factory.function.__module__ == "own_nets"


@pytest.mark.slow
def test_members_find_it_wherever_they_run(tmp_path, lying_in):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = lying_in("own_nets", tmp_path / "here")
    command = [sys.executable, str(ROOT / "main.py"), "-m", "model=custom", "model.factory._target_=own_nets.Net"]
    command += ["trust=[own_nets]", "data=digits", "schedule=smoke", "store=null", "stages=[pretrain]", "seed=0,1"]
    command += ["threads=1", "hydra/launcher=joblib", "hydra.job.chdir=true", "hydra.sweep.dir=sweep"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for member in "01":
        assert json.loads((folder / "sweep" / member / "result.json").read_text())["total"]["weights"] == 7840
