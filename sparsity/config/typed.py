"""Plain values as annotated types; every mistake names key, value and remedy."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sparsity.config.signatures import arguments
from sparsity.config.trust import locate
from sparsity.errors import ConfigError, nearest
from sparsity.kinds import Range
from sparsity.nodes import EACH, Call, Methods, StageFunction

NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def check(key: str, value: Any, kind: Any, trusted: Sequence[str] = ()) -> Any:
    """A plain value as an annotated type, or a ConfigError that names the key.

    trusted: Hydra's patterns of the code from outside that may be called.
    """
    return _Reader(trusted).read(key, value, kind)


class _Reader:
    """Turns plain containers into annotated types; remembers which targets may be called."""

    def __init__(self, trusted: Sequence[str]):
        self.trusted = trusted

    def read(self, key: str, value: Any, kind: Any) -> Any:
        """The value as the type says, or an error that names the key."""
        if get_origin(kind) in (Union, types.UnionType):
            if value is None and type(None) in get_args(kind):
                return None
            return self.read(key, value, next(part for part in get_args(kind) if part is not type(None)))
        if get_origin(kind) is Annotated and get_args(kind)[0] is Call:
            return self._call(key, value, get_args(kind)[1])
        if get_origin(kind) is Annotated and EACH in get_args(kind):
            return self.read(key, value, get_args(get_args(kind)[0])[0])
        if is_dataclass(kind):
            return self._record(key, value, kind)
        if get_origin(kind) is list:
            return self._list(key, value, get_args(kind)[0])
        if get_origin(kind) is dict:
            return self._dict(key, value, get_args(kind)[1])
        return self._scalar(key, value, kind)

    def _record(self, key: str, value: Any, kind: type) -> Any:
        check_names(key, value, kind)
        kinds, others, known = typing.get_type_hints(kind, include_extras=True), _others(kind), _known(kind)
        found: dict[str, Any] = {others.name: {}} if others else {}
        for name, entry in value.items():
            if name in known:
                found[known[name].name] = self.read(join(key, name), entry, kinds[known[name].name])
            else:
                found[others.name][name] = self.read(join(key, name), entry, get_args(kinds[others.name])[1])
        return kind(**found)

    def _list(self, key: str, value: Any, kind: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}: write {key}=[…]")
        return [self.read(f"{key}[{index}]", entry, kind) for index, entry in enumerate(value)]

    def _dict(self, key: str, value: Any, kind: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(not_keys(key, value))
        flat = flatten(value)
        return {name: self.read(join(key, name), entry, kind) for name, entry in flat.items()}

    def _scalar(self, key: str, value: Any, kind: Any) -> Any:
        interval = next((part for part in get_args(kind) if isinstance(part, Range)), None)
        base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        if get_origin(base) is list:
            return self._list(key, value, get_args(base)[0])
        if get_origin(base) is Literal:
            if value not in get_args(base):
                raise ConfigError(f"{key} must be one of {', '.join(get_args(base))}; got {value!r}")
            return value
        if base is Any:
            self._check_any(key, value)
            return value
        wanted = f"{NAMES.get(base, 'a value')}{f' {interval}' if interval and str(interval) else ''}"
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{key} must be {wanted}, and below 2^63; got {value!r}")
        given = value
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        fits = isinstance(value, base) and isinstance(value, bool) == (base is bool)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        is_blank = isinstance(value, str) and (not value or "\0" in value)
        if not fits or not is_finite or is_blank or (interval is not None and value not in interval):
            raise ConfigError(f"{key} must be {wanted}, got {given!r}")
        return value

    def _check_any(self, key: str, value: Any) -> None:
        """Refuses what is no number, deep inside the arguments of code from outside too."""
        if isinstance(value, dict | list):
            for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
                self._check_any(f"{key}[{name}]" if isinstance(value, list) else join(key, name), entry)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value!r}")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{key} must be below 2^63, got {value!r}")

    def _call(self, key: str, value: Any, methods: Methods) -> Call:
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise ConfigError(f"{key} must name a function by _target_, got {value!r}")
        if value.get("_partial_", True) is not True:
            raise ConfigError(
                f"{key}._partial_ must be true, got {value['_partial_']!r}: the pipeline calls the function"
            )
        target = value["_target_"]
        numbers = {name: entry for name, entry in value.items() if name not in ("_target_", "_partial_")}
        function = locate(key, target, methods, self.trusted)
        return Call(key, target, function, self._numbers(key, target, function, numbers, methods))

    def _numbers(
        self, key: str, target: str, function: Callable[..., Any], numbers: dict[str, Any], methods: Methods
    ) -> dict[str, Any]:
        """The numbers beside a target, checked against its signature, which is their schema."""
        for name in numbers:
            if name in HYDRAS or not isinstance(name, str):
                raise ConfigError(f"{join(key, name)} is no setting: beside _target_ stand its own arguments alone")
        taken = arguments(function, methods)
        if taken is None:
            return numbers
        for name in numbers:
            if name in taken.given:
                raise ConfigError(f"{join(key, name)} is passed by the pipeline: take it out")
            if name not in taken.named and not taken.any_other:
                raise ConfigError(_unknown(key, name, taken.named, target, "takes"))
        for name in taken.required:
            if name not in numbers:
                raise ConfigError(f"{join(key, name)} is missing: {target} needs it")
        _check_lengths(key, function, numbers)
        is_ours = target.startswith("sparsity.") or methods is get_args(StageFunction)[1]
        kinds = typing.get_type_hints(function, include_extras=True) if is_ours else _scalars_of(function)
        read = {name: self.read(join(key, name), entry, kinds.get(name, Any)) for name, entry in numbers.items()}
        return read if is_ours else numbers  # as they are given, since a stage's key tells 0 from 0.0


def _scalars_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of an optimizer of torch's that are one number or a truth value; of other code none is known."""
    if not str(getattr(function, "__module__", "")).startswith("torch.optim."):
        return {}
    kinds = typing.get_type_hints(function.__init__)
    return {name: kind for name, kind in kinds.items() if kind in (bool, int, float, bool | None)}


def _check_lengths(key: str, function: Callable[..., Any], numbers: dict[str, Any]) -> None:
    """Refuses a list of another length than what a function takes by itself, such as three betas."""
    parameters = inspect.signature(function).parameters
    for name, value in numbers.items():
        usual = parameters[name].default if name in parameters else None
        is_numbers = isinstance(usual, tuple) and usual and all(isinstance(each, int | float) for each in usual)
        if is_numbers and (not isinstance(value, list) or len(value) != len(usual)):
            raise ConfigError(f"{join(key, name)} must be a list of {len(usual)} numbers, got {value!r}")


GROUPS = {"loss.teacher_model": "model@loss.teacher_model"}  # by a key that holds a choice of a group elsewhere
HYDRAS = ("_args_", "_convert_", "_recursive_")  # keys of Hydra's, which mean nothing here


def not_keys(key: str, value: Any) -> str:
    """What is wrong with a value in the place of keys, and how a group's choice is typed."""
    group = GROUPS.get(key, key.replace(".", "/"))
    typed = f": a choice of a group is typed {group}={value}" if isinstance(value, str) else ""
    return f"{key} must be a group of keys, got {value!r}{typed}"


def check_names(key: str, value: Any, kind: type) -> None:
    """Refuses keys of a group that are unknown or missing, here and in the groups inside, whatever their values."""
    if not isinstance(value, dict):
        raise ConfigError(not_keys(key, value))
    known, others = _known(kind), _others(kind)
    for name in value:
        if name not in known and not others:
            names = [each for each in known if key or each != "name"]
            raise ConfigError(_unknown(key, name, names, key or "the top level", "has"))
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            remedy = f"add it to the YAML of {key.split('.')[0]}" if key else "it cannot be taken out"
            raise ConfigError(f"{join(key, name)} is missing: {remedy}")
    kinds = typing.get_type_hints(kind)
    for name in value:
        inner = kinds[known[name].name] if name in known else get_args(kinds[others.name])[1]
        if is_dataclass(inner) and inner is not Call:
            check_names(join(key, name), value[name], inner)


def _known(kind: type) -> dict[str, Field]:
    """The fields of a record, by the names that they are typed by."""
    return {entry.metadata.get("typed", entry.name): entry for entry in fields(kind) if entry != _others(kind)}


def _others(kind: type) -> Field | None:
    """The field of a record that takes keys of any other name."""
    return next((entry for entry in fields(kind) if entry.metadata.get("others")), None)


def _unknown(key: str, name: Any, names: Sequence[str], owner: str, has: str) -> str:
    """That a name is none of those that there are, and which may be meant."""
    close = nearest(str(name), names)
    meant = f"did you mean {join(key, close)}? " if close else ""
    return f"{join(key, name)} is no setting: {meant}{owner} {has} {', '.join(names) or 'none'}"


def join(key: str, name: str) -> str:
    """A dotted key; the top level is ''."""
    return f"{key}.{name}" if key else str(name)


def flatten(node: dict[Any, Any]) -> dict[str, Any]:
    """A dict of dicts as one dict of dotted keys: prune.layers.features.0=0.1 names the layer features.0."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{rest}": entry for rest, entry in flatten(value).items()}
        else:
            flat[str(name)] = value
    return flat
