"""A grid is refused before its first member trains, in one line that names what is wrong."""

import time

import hydra
import pytest
from conftest import ROOT, compose
from omegaconf import OmegaConf

from sparsity import config
from sparsity.errors import ConfigError

LARGE = ["sensitivity=range(0.1,0.7,0.1)", "reg.decay=1e-5,1e-4"]


@pytest.fixture
def checked():
    """Checks the grid of a command line; gives how often a config was composed."""

    def checked(*overrides):
        config.register()
        with hydra.initialize_config_dir(str(ROOT / "conf")):
            own = [text for text in overrides if text.startswith(("hydra", "+hydra"))]
            composed = hydra.compose("config", overrides=own, return_hydra_config=True)
            OmegaConf.set_readonly(composed.hydra, False)
            composed.hydra.overrides.task = [text for text in overrides if not text.startswith(("hydra", "+hydra"))]
            counting = Counting(hydra.core.global_hydra.GlobalHydra.instance().config_loader())
            config.check_grid(composed, counting)
            return counting.count

    return checked


class Counting:
    """Hydra's loader, counting what it composes."""

    def __init__(self, loader):
        self.loader, self.count = loader, 0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def load_sweep_config(self, *arguments):
        self.count += 1
        return self.loader.load_sweep_config(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=0,1", "schedule.pretrain.shape=glob(*)"], r"schedule.pretrain.shape=glob\(\*\) stands for no value"),
        (["sensitivity=0.1,-1"], "sensitivity must be a number ≥ 0, got -1"),
        ([*LARGE, "seed=0,1,2,x"], "seed must be a whole number .*got 'x'"),
        ([*LARGE, "seed=0,1,2", "schedule.pretrain.shape=constant,cosin"], "schedule.pretrain.shape must be one of"),
        (["sensitivity=0.1,0.2", "reg.penalty.nothing=1,2"], "nothing"),
        (["prune.exclude=[],[fc3]", "+prune.layers.fc3=0.1,0.2"], "prune.layers.fc3 does nothing, as prune.exclude"),
        (["recipe=magnitude", "reg.decay=1e-5,1e-4"], "reg.decay is swept, and no stage of any member reads it"),
        (["recipe=magnitude", "reg=hs,l1"], "reg is swept, and no stage of any member reads it"),
        (["rounds=1,2"], "rounds is swept, and no stage of any member reads it"),
        (["recipe=iterative", "recipe.prune.rule.scope=tensor,network"], "type prune.scope=tensor,network"),
        (["recipe=lottery", "rewind_to=start,finetune"], "rewind_to=finetune names a state that is not there"),
        (["sensitivity=0.1,0.2", "budget.compression=5"], "budget.compression takes the place of sensitivity"),
        (["hydra.sweep.subdir=one", "seed=0,1"], "hydra.sweep.subdir=one is the folder of members 0 and 1"),
    ],
)
def test_what_no_member_takes_is_refused(overrides, line, checked):
    with pytest.raises((ConfigError, hydra.errors.HydraException), match=line):
        checked(*overrides)


@pytest.mark.slow
def test_what_some_members_read_may_be_swept(checked):
    assert checked("recipe=standard,magnitude", "reg.decay=1e-5,1e-4") == 4
    assert checked("recipe=standard,lottery", "rounds=1,2", "budget.compression=10,30") == 8


@pytest.mark.slow
def test_what_is_given_in_a_yaml_is_checked_too(checked):
    with pytest.raises(ConfigError, match=r"seed must be a whole number ≥ 0.*got -1"):
        checked("+hydra.sweeper.params={seed:'0,-1'}", "sensitivity=0.1")
    checked("+hydra.sweeper.params={seed:'0,-1'}", "seed=0,1")  # what is typed wins


@pytest.mark.slow
def test_a_large_grid_is_checked_value_by_value(checked):
    begin = time.perf_counter()
    assert checked(*LARGE, "seed=range(0,100)", "reg=hs,l1", "model=lenet300,mlp") == 1 + 1 + 1
    assert time.perf_counter() - begin < 20
    assert checked("seed=0,1", "reg=hs,l1") == 4


@pytest.mark.slow
def test_names_of_folders_that_no_disk_takes(checked):
    named = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    long = [f"data.root={'a' * 250}", "seed=0,1"]
    with pytest.raises(ConfigError, match="makes a folder's name of 267 bytes, of 255 at most: leave keys out by"):
        checked(named, *long)
    checked(named, "hydra.job.config.override_dirname.exclude_keys=[data.root]", *long)
    with pytest.raises(ConfigError, match="makes a folder's name of 400 bytes"):
        checked(f"hydra.sweep.subdir='a/{'ä' * 200}/b'", "seed=0,1")
    checked("hydra.sweep.subdir=x/${hydra.job.num}-${seed}", "seed=0,1")


@pytest.mark.parametrize("betas", ["[0.9,0.9,0.9]", "[0.9]", "0.9", "[]"])
def test_a_list_of_another_length_is_refused(betas):
    with pytest.raises(ConfigError, match=r"optimizer.betas must be a list of 2 numbers, got "):
        config.read(compose([f"optimizer.betas={betas}"])[0])
