"""What a method's signature says of its arguments: the signature is the schema of the keys beside `_target_`."""

import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from sparsity.nodes import Methods


class Arguments(NamedTuple):
    """What a function takes: from the pipeline, from the YAML, of that without fail, and whether any other name."""

    given: set[str]
    named: list[str]
    required: list[str]
    any_other: bool
    is_method: bool  # nothing is passed by its place but what the pipeline passes


def arguments(function: Callable[..., Any], methods: Methods) -> Arguments | None:
    """What a function takes; None where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    by_place = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    given = {*methods.given, *by_place[: methods.positional]}
    stars = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [each for each in parameters if each.name not in given and each.kind not in stars]
    named = [each.name for each in own if each.kind is not each.POSITIONAL_ONLY]
    required = [each.name for each in own if each.default is each.empty]
    any_other = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return Arguments(given, named, required, any_other, not set(required) & set(by_place))


def marked(function: Callable[..., Any], marker: Any) -> list[str]:
    """The arguments of a stage's function whose annotation carries a marker."""
    kinds = typing.get_type_hints(function, include_extras=True)
    parts = {name: (kind, *typing.get_args(kind)) for name, kind in kinds.items()}  # it may be one of a union
    return [name for name, each in parts.items() if any(marker in getattr(part, "__metadata__", ()) for part in each)]
