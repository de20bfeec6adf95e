"""The options of the command line, such as -m and --cfg: Hydra's, checked before it reads them."""

import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser

from sparsity.errors import ConfigError, nearest


def check_options(arguments: Sequence[str]) -> list[str]:
    """Refuses options that are unknown or lack a value; returns the overrides, which stand beside them."""
    parser = get_args_parser()
    options = [name for action in parser._actions for name in action.option_strings]

    def refuse(message: str) -> None:
        raise ConfigError(_told(message, options))

    parser.error = refuse
    return parser.parse_intermixed_args(list(arguments)).overrides


def _told(message: str, options: Sequence[str]) -> str:
    """What argparse says, in one line."""
    if unknown := re.match(r"unrecognized arguments: (\S+)", message):
        close = nearest(unknown[1].partition("=")[0], options)
        return f"{unknown[1]} is no option: {f'did you mean {close}?' if close else 'a setting is written KEY=VALUE'}"
    if chosen := re.match(r"argument (--[\w-]+)\S*: invalid choice: (.*) \(choose from (.*)\)", message):
        return f"{chosen[1]} must be one of {chosen[3].replace(chr(39), '')}; got {chosen[2]}"
    if lacking := re.match(r"argument (--[\w-]+)\S*: expected one argument", message):
        return f"{lacking[1]} needs a value, as in {lacking[1]} VALUE"
    return message
