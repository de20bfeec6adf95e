"""The Hydra callback of every sweep: names its folder, says how far it is, and sums it up at the end."""

import datetime
import json
import logging
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sparsity import config as schema

log = logging.getLogger("sparsity")

FORMAT = 1  # of sweep.json
NAME = "{name}"  # in hydra.sweep.dir
USER_MISTAKE = 2
SECONDS_BETWEEN_LOOKS = 2.0  # at the folder, where the members run in other processes


class Sweep(Callback):
    """Knows the folder of the sweep that runs, and what it has said of it."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def on_run_start(self, config: DictConfig, **rest: Any) -> None:
        """Refuses a folder that cannot be made, before Hydra makes it."""
        _make("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **rest: Any) -> None:
        """Names the sweep's folder and writes down what is swept."""
        _name_folder(config)
        self.folder = _make("hydra.sweep.dir", config.hydra.sweep.dir)
        _write_sweep(self.folder, config)


def _make(key: str, folder: str) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.error(f"{key}={folder} cannot be made: {error.strerror or error}")
        raise SystemExit(USER_MISTAKE) from error
    return path


def _name_folder(config: DictConfig) -> None:
    """Puts the sweep's name into `hydra.sweep.dir`, for this process and for the jobs that it sends out."""
    folder = str(config.hydra.sweep.dir)
    if NAME not in folder:
        return
    folder = folder.replace(NAME, schema.sweep_name(config))
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = folder
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={QuotedString(folder, Quote.double).with_quotes()}")


def _write_sweep(folder: Path, config: DictConfig) -> None:
    own = config.hydra
    params = [f"{key}={text}" for key, text in (OmegaConf.to_container(own.sweeper).get("params") or {}).items()]
    typed = [*params, *own.overrides.task]
    is_search = own.runtime.choices["hydra/sweeper"] != "basic"
    ranges = schema.search_ranges(config) if own.runtime.choices["hydra/sweeper"] == "search" else {}
    described = {
        "format": FORMAT,
        "kind": "search" if is_search else "grid",
        "name": schema.sweep_name(config),
        "overrides": list(own.overrides.task),
        "swept": list(dict.fromkeys([*ranges, *schema.swept_keys(typed)])),
        "objectives": list(config.objectives),
        "total": own.sweeper.n_trials if is_search else schema.count_members(typed),
        "command": sys.argv,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    (folder / "sweep.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
