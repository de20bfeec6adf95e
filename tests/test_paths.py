"""Paths: `~` is the home folder wherever a path may stand, and hydra.job.chdir moves no path."""

import os

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_callbacks import multirun

import sparsity
from sparsity import config
from sparsity.callbacks import Sweep
from sparsity.errors import ConfigError

SMALL = ["data=digits", "schedule=smoke", "model=mlp", "model.factory.hidden=[8]", "stages=[pretrain]", "store=null"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["data.root=~/pics"], ['data.root="HOME/pics"']),
        (["+a.b@c=~"], ['+a.b@c="HOME"']),
        (["model.weights=~/a.pth,~/b.pth,c.pth"], ['model.weights="HOME/a.pth","HOME/b.pth",c.pth']),
        (["hydra.sweeper.storage=sqlite:///~/s.db"], ['hydra.sweeper.storage="sqlite:///HOME/s.db"']),
        (["--config-dir=~/conf", "-m"], ["--config-dir=HOME/conf", "-m"]),
        (["--config-dir", "~/conf"], ["--config-dir", "HOME/conf"]),
        (["~reg", "a=b~c", 'a="~/x"', "a=[~/x]", "a=choice(~,b)", "=~/x"], None),  # as they are
    ],
)
def test_a_command_line_means_the_home_folder(typed, meant, home):
    assert config.shell_home(typed) == [text.replace("HOME", str(home)) for text in meant or typed]


@pytest.mark.slow
def test_what_is_quoted_means_it_too(home):
    composed, _ = config.compose(['model.weights="~/a b.pth"', "store=~/store", "data.root=relative"])
    settled = config.settle(composed, None)
    assert settled.model.weights == f"{home}/a b.pth" and settled.store == f"{home}/store"
    assert settled.data.root == settled.data.loader.root == "relative"
    moved = config.settle(config.compose(["model.weights=a.pth", "data.root=/whole"])[0], "/start")
    assert (moved.model.weights, moved.store, moved.data.root) == ("/start/a.pth", "/start/outputs/store", "/whole")
    assert config.settle(config.compose(["store=null"])[0], "/start").store is None


def test_data_at_home(home, monkeypatch):
    monkeypatch.setenv("SPARSITY_DATA", "~/pics")
    assert config.settle(config.compose([])[0], None).data.loader.root == f"{home}/pics"


@pytest.mark.slow
def test_folders_at_home(home, tmp_path):
    composed = multirun("seed=0,1", 'hydra.sweep.dir="~/made"', 'store="~/kept"')
    Sweep().on_multirun_start(composed)
    assert composed.hydra.sweep.dir == f"{home}/made" and sorted(p.name for p in home.iterdir()) == ["kept", "made"]
    single = multirun('hydra.run.dir="~/one"')
    Sweep().on_run_start(single)
    assert single.hydra.run.dir == f"{home}/one" and (home / "one").is_dir()
    assert not (tmp_path / "~").exists() and config.folder_of_run(single.hydra) == home / "one"


# --- inside another application --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inside_another_application_of_hydra(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("a: 1\nb: ${hydra:job.name}\n")
    with hydra.initialize_config_dir(str(tmp_path / "mine"), job_name="mine"):
        theirs = hydra.compose("config", return_hydra_config=True)
        HydraConfig.instance().set_config(theirs)
        try:
            result = sparsity.run([*SMALL, "hydra.run.dir=${hydra:runtime.cwd}/x", "hydra.job.name=ours"])
            with pytest.raises(ConfigError):
                sparsity.run([*SMALL, "reg=nothing"])
            assert HydraConfig.get().job.name == "mine"
            assert GlobalHydra.instance().is_initialized() and hydra.compose("config").a == 1
            assert hydra.compose("config", return_hydra_config=True).hydra.job.name == "mine"
        finally:
            HydraConfig.instance().cfg = None
    assert result["folder"] == f"{tmp_path}/x" and not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_what_hydra_alone_knows_is_refused_in_a_line():
    for text in ("data.validation_seed=${hydra:job.num}", "hydra.run.dir=${hydra:nothing}", "hydra.run.dir=${nothing}"):
        with pytest.raises(ConfigError) as error:
            sparsity.run([*SMALL, text])
        assert "\n" not in str(error.value)
    assert not HydraConfig.initialized() and os.listdir() == []


@pytest.mark.slow
def test_interpolations_of_a_run_are_its_own():
    composed, own = config.compose(["seed=7", "hydra.run.dir=${hydra.job.name}/${hydra:job.override_dirname}/${seed}"])
    with config.hydra_of(own):
        assert str(config.folder_of_run(own)).endswith("/seed=7/7")
    assert not OmegaConf.is_missing(composed, "seed")
