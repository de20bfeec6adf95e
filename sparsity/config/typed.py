"""Plain values as annotated types; every mistake names key, value and remedy."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from sparsity.config.schema import Call
from sparsity.config.trust import TRUSTED
from sparsity.errors import ConfigError
from sparsity.kinds import Range

NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}

GIVEN = ("input_shape", "num_classes", "sensitivity", "fixed")  # what the pipeline passes, not the YAML


def check(key: str, value: Any, kind: Any, trusted: Sequence[str] = TRUSTED) -> Any:
    """A plain value as an annotated type, or a ConfigError that names the key; `trusted`: Hydra's patterns."""
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
        if is_dataclass(kind):
            return self._record(key, value, kind) if kind is not Call else self._call(key, value)
        if get_origin(kind) is list:
            return self._list(key, value, get_args(kind)[0])
        if get_origin(kind) is dict:
            return self._dict(key, value, get_args(kind)[1])
        return self._scalar(key, value, kind)

    def _record(self, key: str, value: Any, kind: type) -> Any:
        if not isinstance(value, dict):
            raise ConfigError(f"{key} must be a group of keys, got {value!r}")
        known = {entry.name: entry for entry in fields(kind)}
        for name in value:
            if name not in known:
                raise ConfigError(f"{join(key, name)} is no setting: {key or 'the top level'} has {', '.join(known)}")
        for name, entry in known.items():
            if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{join(key, name)} is missing: add it to the YAML of {key.split('.')[0]}")
        kinds = typing.get_type_hints(kind, include_extras=True)
        return kind(**{name: self.read(join(key, name), entry, kinds[name]) for name, entry in value.items()})

    def _list(self, key: str, value: Any, kind: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}: write {key}=[…]")
        return [self.read(f"{key}[{index}]", entry, kind) for index, entry in enumerate(value)]

    def _dict(self, key: str, value: Any, kind: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{key} must be a group of keys, got {value!r}")
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
        given = value
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        wanted = f"{NAMES.get(base, 'a value')}{f' {interval}' if interval and str(interval) else ''}"
        fits = base is Any or (isinstance(value, base) and isinstance(value, bool) == (base is bool))
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{key} must be {wanted}, and below 2^63; got {given!r}")
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if not fits or not is_finite or (interval is not None and value not in interval):
            raise ConfigError(f"{key} must be {wanted}, got {given!r}")
        return value

    def _call(self, key: str, value: Any) -> Call:
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise ConfigError(f"{key} must name a function by _target_, got {value!r}")
        target = value["_target_"]
        numbers = {name: entry for name, entry in value.items() if name not in ("_target_", "_partial_")}
        function = self._locate(key, target)
        return Call(key, target, function, self._numbers(key, target, function, numbers))

    def _locate(self, key: str, target: str) -> Callable[..., Any]:
        try:
            return instantiate({"_target_": target, "_partial_": True}, _execution_whitelist_=self.trusted).func
        except InstantiationException as error:
            reason = str(error).splitlines()[0]
            package = target.split(".")[0]
            if "whitelist" not in str(error) or f"{package}.*" in self.trusted:
                raise ConfigError(f"{key}._target_={target} cannot be used: {reason}") from error
            raise ConfigError(
                f"{key}._target_={target} is code from outside: admit it by trust=[{package}] on the command line or "
                f"SPARSITY_TRUST={package}"
            ) from error

    def _numbers(self, key: str, target: str, function: Callable[..., Any], numbers: dict[str, Any]) -> dict[str, Any]:
        """The numbers beside a target, checked against its signature, which is their schema."""
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            return numbers
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for name in numbers:
            if name in GIVEN:
                raise ConfigError(f"{join(key, name)} is passed by the pipeline: take it out")
            if name not in parameters and not takes_any:
                raise ConfigError(f"{join(key, name)} is no setting: {target} takes {', '.join(parameters)}")
        for name, parameter in parameters.items():
            is_ours = target.startswith("sparsity.") and parameter.kind is parameter.KEYWORD_ONLY
            if is_ours and name not in numbers and name not in GIVEN and parameter.default is parameter.empty:
                raise ConfigError(f"{join(key, name)} is missing: {target} needs it")
        kinds = typing.get_type_hints(function, include_extras=True) if target.startswith("sparsity.") else {}
        return {name: self.read(join(key, name), entry, kinds.get(name, Any)) for name, entry in numbers.items()}


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
