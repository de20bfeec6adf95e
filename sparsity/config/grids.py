"""A grid before its first member runs: that it has members, that all its values are taken, and where members lie."""

import copy
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from sparsity.config.reading import read, typed_in, unread
from sparsity.config.sweeps import is_numbered
from sparsity.config.trust import admitted
from sparsity.config.yamls import check_yamls
from sparsity.errors import ConfigError

MOST_TRIED = (
    32  # members of a grid up to which each is composed; of a larger one each value is, beside the first others
)
LONGEST_NAME = 255  # bytes that a folder's name may have
PLAIN = re.compile(r"[a-z_]\w*(\.\w+)+|seed|sensitivity")  # a key that is no group and adds none

Values = dict[str, list[str]]  # of each key, as overrides


def check_grid(composed: DictConfig, loader: ConfigLoader) -> None:
    """Refuses a grid of no members, a value that no member takes, and members that share a folder.

    composed: the config of a multirun, with `hydra` in it.
    """
    values = _values(composed, loader)
    trust = admitted(composed.hydra.overrides.task)
    folders: dict[str, int] = {}
    is_whole = math.prod(map(len, values.values())) <= MOST_TRIED
    idle = {key for key, each in values.items() if len(each) > 1}
    for number, (member, own) in enumerate(_members(composed, loader, values, is_whole)):
        if not is_numbered(composed):
            folder = folder_of_member(own, number)
            if folders.setdefault(folder, number) != number and is_whole:
                raise ConfigError(
                    f"hydra.sweep.subdir={folder} is the folder of members {folders[folder]} and {number}: name them "
                    "by what differs, or drop it"
                )
        check_yamls(loader, own._get_root())
        read(member, trust=trust, choices=own.runtime.choices, typed=typed_in(composed.hydra))
        idle = unread(member, idle)
    if idle:
        raise ConfigError(
            f"{min(idle)} is swept, and no stage of any member reads it: drop it, or list a stage that does"
        )


def folder_of_member(own: DictConfig, number: int) -> str:
    """The name of a member's folder in its sweep, if a disk takes it; own: Hydra's part of its config."""
    whole = copy.deepcopy(own._get_root())
    OmegaConf.set_readonly(whole.hydra, False)
    with open_dict(whole):
        whole.hydra.job.num, whole.hydra.job.id = number, str(number)
    folder = str(whole.hydra.sweep.subdir)
    longest = max(len(os.fsencode(name)) for name in folder.split("/"))
    if longest > LONGEST_NAME:
        raise ConfigError(
            f"hydra.sweep.subdir makes a folder's name of {longest} bytes, of {LONGEST_NAME} at most: leave keys out "
            "by hydra.job.config.override_dirname.exclude_keys=[KEY,…], or drop it"
        )
    return folder


def _values(composed: DictConfig, loader: ConfigLoader) -> Values:
    """What each key of a grid is given, as Hydra lists it: of equal keys the last one holds."""
    params = OmegaConf.to_container(composed.hydra.sweeper).get("params") or {}
    given = [*(f"{key}={text}" for key, text in params.items()), *composed.hydra.overrides.task]
    values: Values = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(given):
        key = override.get_key_element()
        if override.is_sweep_override():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not values[key]:
                raise ConfigError(f"{override.input_line} stands for no value, so that the sweep has no members")
        else:
            values[key] = [
                override.input_line if override.is_delete() else f"{key}={override.get_value_element_as_str()}"
            ]
    return values


def _members(
    composed: DictConfig, loader: ConfigLoader, values: Values, is_whole: bool
) -> Iterator[tuple[DictConfig, DictConfig]]:
    """Configs of members in which every value comes up, and Hydra's part of each; is_whole: of all members."""

    def whole(member: Iterable[str]) -> tuple[DictConfig, DictConfig]:
        found = loader.load_sweep_config(composed, list(member))
        bare = OmegaConf.masked_copy(found, [key for key in found if key != "hydra"])
        OmegaConf.set_struct(bare, True)
        return bare, found.hydra

    if is_whole:
        yield from map(whole, itertools.product(*values.values()))
        return
    first = {key: each[0] for key, each in values.items()}
    base, own = whole(first.values())
    yield base, own
    for key, each in values.items():
        for override in each[1:]:
            if PLAIN.fullmatch(key) and is_numbered(composed):  # composing anew would take many times as long
                member = copy.deepcopy(base)
                OmegaConf.update(member, key, OverridesParser.create().parse_override(override).value())
                yield member, own
            else:
                yield whole({**first, key: override}.values())
