"""Command lines and YAMLs into a composed config, by Hydra."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict

from sparsity.config.mistakes import said
from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES


def register() -> None:
    """Tells Hydra which keys take any sub-key, so that `prune.layers.fc3=0.1` needs no plus, and our resolver."""
    open_keys = OmegaConf.create({"prune": {"layers": {}}})
    OmegaConf.set_struct(open_keys.prune.layers, False)
    ConfigStore.instance().store(name="open_keys", node=open_keys, replace=True)
    OmegaConf.register_resolver("directions", _directions, replace=True)


def _directions(objectives: Sequence[str]) -> list[str]:
    """The direction of each objective; an unknown one is refused by `read`, which says more."""
    return [OBJECTIVES.get(name, "maximize") for name in objectives]


def compose(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The config that a command line composes, and Hydra's own part of it."""
    register()
    with hydra.initialize_config_dir(config_dir=str(folder_of_yamls())):
        try:
            composed = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        except Exception as error:  # of Hydra, OmegaConf, a YAML's parser
            raise ConfigError(said(error, overrides)) from error
    with open_dict(composed):
        own = composed.pop("hydra")
    return composed, own


def folder_of_yamls() -> Path:
    """The folder of YAMLs: beside the package in a checkout, inside it when installed from a wheel."""
    inside = Path(__file__).parent.parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "conf"
