"""Paths in a config: `~` is the home folder, and relative ones mean the folder that the command was typed in."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

PATHS = ("model.weights", "data.root", "store", "loss.teacher")  # keys of a config that name files or folders
OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp")  # of the command line, likewise
SETTING = re.compile(r"([\w.@/+-]+=)(.*)", re.DOTALL)
AT_HOME = re.compile(r"([a-z+]+:///)?~(/.*)?", re.DOTALL)  # sqlite:///~/studies.db too


def at_home(path: str) -> str:
    """A path whose `~` is the home folder."""
    return os.path.expanduser(path)


def shell_home(arguments: Sequence[str]) -> list[str]:
    """A command line in which `key=~/folder` means the home folder, where no shell has seen to it, and is quoted."""
    return [_shell_home(argument, before) for before, argument in zip(["", *arguments], arguments)]


def _shell_home(argument: str, before: str) -> str:
    option, sign, path = argument.partition("=")
    if option in OPTIONS and sign:
        return f"{option}={at_home(path)}"
    if before in OPTIONS:
        return at_home(argument)
    found = SETTING.fullmatch(argument)
    values = found[2].split(",") if found else []
    if not any(AT_HOME.fullmatch(value) for value in values) or re.search(r"[\"'()\[\]{}]", argument):
        return argument
    return found[1] + ",".join(_quoted(value) if AT_HOME.fullmatch(value) else value for value in values)


def _quoted(value: str) -> str:
    scheme, path = re.fullmatch(r"([a-z+]+:///)?(.*)", value, re.DOTALL).groups()
    return f'"{scheme or ""}{at_home(path)}"'


def settle(composed: DictConfig, start: str | None) -> DictConfig:
    """A config whose paths mean the same wherever its job runs; start: what relative ones begin at, if they move."""
    for key in PATHS:
        try:
            path = OmegaConf.select(composed, key)
        except OmegaConfBaseException:  # told where the config is read
            continue
        if isinstance(path, str):
            whole = at_home(path) if start is None else os.path.join(start, at_home(path))
            if whole != path:
                with read_write(composed), open_dict(composed):
                    OmegaConf.update(composed, key, whole)
    return composed


def folder_of_yamls() -> Path:
    """The folder of YAMLs: beside the package in a checkout, inside it when installed from a wheel."""
    inside = Path(__file__).parent.parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "conf"
