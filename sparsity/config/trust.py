"""What a config may call, and the code from outside that the user admits."""

import os
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

TRUSTED = ("sparsity.*", "torch.optim.*")  # Hydra's patterns for what a config may call


def admitted(arguments: Sequence[str]) -> list[str]:
    """The modules whose code the user admits: `trust=` of a command line, and SPARSITY_TRUST.

    To be asked before Hydra composes: a YAML can set variables and overrides, and must not admit code.
    """
    given = [argument.lstrip("+") for argument in arguments]
    named = [name for argument in given if argument.startswith("trust=") for name in _named(argument)]
    return named + [entry for entry in os.environ.get("SPARSITY_TRUST", "").split(",") if entry]


def _named(override: str) -> list[str]:
    """The modules of an override; what is no list of them is refused when it is composed and read."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except Exception:  # whatever the grammar raises
        return []
    return [str(entry) for entry in value] if isinstance(value, list) else []


def patterns(trust: Sequence[str]) -> list[str]:
    """Hydra's patterns for modules and functions."""
    bare = [entry.removesuffix(".*") for entry in trust]
    return [pattern for entry in bare for pattern in (entry, f"{entry}.*")]
