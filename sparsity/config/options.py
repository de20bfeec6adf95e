"""The options of the command line, such as -m and --cfg: Hydra's, checked before it reads them."""

import argparse
import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from sparsity.errors import ConfigError, nearest


def check_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options and the overrides of a command line; refuses options that are unknown or lack a value."""
    parser = get_args_parser()
    names = [name for action in parser._actions for name in action.option_strings]

    def refuse(message: str) -> None:
        raise ConfigError(_told(message, names))

    parser.error = refuse
    options = parser.parse_intermixed_args(list(arguments))
    if options.package is not None and options.cfg is None:
        raise ConfigError(f"--package {options.package} does nothing without --cfg job")
    return options


def _told(message: str, names: Sequence[str]) -> str:
    """What argparse says, in one line."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        bare = {name.lstrip("-"): name for name in names}
        close = nearest(unknown[1].partition("=")[0].lstrip("-"), bare)
        meant = f"did you mean {bare[close]}?" if close else "a setting is written KEY=VALUE"
        return f"{unknown[1]} is no option: {meant}"
    if chosen := re.match(r"argument (--[\w-]+)\S*: invalid choice: (.*) \(choose from (.*)\)", message):
        return f"{chosen[1]} must be one of {chosen[3].replace(chr(39), '')}; got {chosen[2]}"
    if lacking := re.match(r"argument (--[\w-]+)\S*: expected one argument", message):
        return f"{lacking[1]} needs a value, as in {lacking[1]} VALUE"
    return message
