"""Command lines and YAMLs into a composed config, by Hydra."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsity.config.mistakes import said, watch_warnings
from sparsity.config.paths import at_home, folder_of_yamls, shell_home
from sparsity.config.schema import RULE
from sparsity.config.yamls import check_yamls
from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES


def register() -> None:
    """Tells Hydra which keys take any sub-key, so that `prune.layers.fc3=0.1` needs no plus, and our resolver."""
    open_keys = OmegaConf.create({RULE: {"layers": {}}})
    OmegaConf.set_struct(open_keys[RULE].layers, False)
    ConfigStore.instance().store(name="open_keys", node=open_keys, replace=True)
    OmegaConf.register_resolver("directions", _directions, replace=True)


def _directions(objectives: Sequence[str]) -> list[str]:
    """The direction of each objective; an unknown one is refused by `read`, which says more."""
    return [OBJECTIVES[name].direction if name in OBJECTIVES else "maximize" for name in objectives]


def compose(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The config that a command line composes, and Hydra's own part of it."""
    register()
    folder = str(folder_of_yamls())
    with _own_hydra(), hydra.initialize_config_dir(config_dir=folder), warnings.catch_warnings():
        watch_warnings()
        try:
            composed = hydra.compose("config", overrides=shell_home(overrides), return_hydra_config=True)
            check_yamls(GlobalHydra.instance().config_loader(), composed)
        except ConfigError:
            raise
        except Exception as error:  # of Hydra, OmegaConf, a YAML's parser
            raise ConfigError(said(error, overrides)) from error
    bare = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    OmegaConf.set_struct(bare, True)
    return bare, composed.hydra  # whose interpolations still mean the whole


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra as if nothing else used it in this process; another application's is as before afterwards."""
    running, runtime = GlobalHydra.instance(), JobRuntime.instance()
    before, named = running.hydra, dict(runtime.conf)
    running.clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before
        runtime.conf.clear(), runtime.conf.update(named)


@contextlib.contextmanager
def hydra_of(own: DictConfig) -> Iterator[None]:
    """Lets `${hydra:…}` mean a job's own settings, as it does where Hydra itself runs the job."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(own._get_root())
    try:
        yield
    finally:
        instance.cfg = before


def folder_of_run(own: DictConfig) -> Path:
    """The folder of a single run, as a whole path."""
    try:
        return Path(at_home(own.run.dir)).absolute()
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.run.dir: {said(error)}") from error
