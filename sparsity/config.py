"""The schema of a run: a composed config in, checked dataclasses out; every mistake names key, value and remedy."""

import functools
import hashlib
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES
from sparsity.kinds import Count, NonNegative, Positive, PositiveCount, Range, Seed
from sparsity.schedules import SHAPES

STAGES = ("pretrain", "regularize", "prune", "finetune")
TRUSTED = ("sparsity.*", "torch.optim.*")  # Hydra's patterns for what a config may call

Kinds = list[Literal["weight", "bias", "normalization"]]
Objectives = list[Literal[tuple(OBJECTIVES)]]


@dataclass(frozen=True)
class Call:
    """A function and its own numbers, as `_target_` and the keys beside it name them."""

    key: str
    target: str
    function: Callable[..., Any]
    numbers: dict[str, Any]

    def partial(self, **more: Any) -> Callable[..., Any]:
        """The function with its numbers filled in."""
        return functools.partial(self.function, **self.numbers, **more)


@dataclass(frozen=True)
class Model:
    """The network, and the weights that it starts from."""

    factory: Call
    weights: str | None


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of pixels in [0, 1], one number or one a channel."""

    mean: list[float]
    std: list[Positive]


@dataclass(frozen=True)
class Data:
    """The data set, and what is held out for validation."""

    loader: Call
    validation: NonNegative
    validation_seed: Seed
    normalize: Normalization | None
    root: str | None = None


@dataclass(frozen=True)
class Regularizer:
    """The penalty, its coefficient, and the parameters that it is applied to."""

    penalty: Call | None
    decay: NonNegative
    apply_to: Kinds
    weight_decay: NonNegative
    search: dict[str, str] = field(default_factory=dict)  # ranges that a search draws from


@dataclass(frozen=True)
class Rule:
    """The pruning rule, and the parameters that it is applied to."""

    rule: Call
    cut: Call | None  # the threshold that the report shows
    apply_to: Kinds
    scope: Literal["tensor", "network"]
    structural: bool  # takes whole groups: a filter that goes takes its bias
    layers: dict[str, float]
    exclude: list[str]
    search: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageSchedule:
    """The numbers of one training stage."""

    epochs: Count
    lr: Positive
    shape: Literal[tuple(SHAPES)]
    warmup: Annotated[float, Range(0, 1, below=True)]
    weight_decay: NonNegative


@dataclass(frozen=True)
class Schedule:
    """The numbers of the training stages."""

    batch_size: PositiveCount
    pretrain: StageSchedule
    regularize: StageSchedule
    finetune: StageSchedule


@dataclass(frozen=True)
class Run:
    """One run of the pipeline."""

    model: Model
    data: Data
    reg: Regularizer
    prune: Rule
    schedule: Schedule
    optimizer: Call
    stages: list[Literal["pretrain", "regularize", "prune", "finetune"]]
    seed: Seed
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    threads: Annotated[int, Range(1, 1024)] | None
    step: Literal["auto", "eager", "recorded", "compiled"]
    sensitivity: float
    plots: bool | None  # None: of a single run, not of a sweep's members
    store: str | None  # the folder of finished stages
    objectives: Objectives
    trust: list[str]
    name: dict[str, str]  # the choice made in each group, for people


def register() -> None:
    """Tells Hydra which keys take any sub-key, so that `prune.layers.fc3=0.1` needs no plus, and our resolver."""
    open_keys = OmegaConf.create({"prune": {"layers": {}}})
    OmegaConf.set_struct(open_keys.prune.layers, False)
    ConfigStore.instance().store(name="open_keys", node=open_keys, replace=True)
    OmegaConf.register_resolver("directions", _directions, replace=True)


def _directions(objectives: Sequence[str]) -> list[str]:
    """The direction of each objective; an unknown one is refused by `read`, which says more."""
    return [OBJECTIVES.get(name, "maximize") for name in objectives]


# --- sweeps ----------------------------------------------------------------------------------------------------------

NEUTRAL = ("plots", "step", "store", "threads", "trust")  # keys that change no number, and so no sweep
NAMING = ("search", "model", "data", "reg", "prune")  # groups whose choices make a sweep's name


def search_ranges(composed: DictConfig) -> dict[str, str]:
    """The ranges of a search, each as it stands beside the number that it ranges over: `reg.search.decay`."""
    ranges = {}
    for group, root in (("reg", "reg."), ("prune", "")):
        own = OmegaConf.to_container(composed[group].search, resolve=True) or {}
        ranges |= {f"{root}{key}": str(text) for key, text in _flatten(own).items()}
    return ranges


def sweep_name(composed: DictConfig) -> str:
    """The name of a sweep: the choices made in its groups, and the hash of its config and of what it ranges over.

    composed: the config of a multirun, with `hydra` in it.
    """
    own = composed.hydra
    typed = [text for text in own.overrides.task if _key(text) not in NEUTRAL]
    config = {key: node for key, node in _plain(composed).items() if key not in (*NEUTRAL, "hydra")}
    config.get("data", {}).pop("root", None)  # where the images lie; what they are, the stages look at
    settings = {key: _plain(own.sweeper).get(key) for key in ("params", "sampler")}
    swept = sorted(text for text in typed if swept_keys([text]))
    text = json.dumps([config, swept, settings], sort_keys=True, default=str)
    chosen = [str(own.runtime.choices.get(group)) for group in NAMING if group not in swept_keys(typed)]
    names = [name for name in chosen if name != "None"]
    return "-".join([*names, hashlib.sha256(text.encode()).hexdigest()[:8]])


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that overrides give several values or a range."""
    return [override.get_key_element().lstrip("+") for override in _parsed(overrides) if override.is_sweep_override()]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides by Hydra's grammar; while Hydra runs, it knows the choices that a glob stands for."""
    running = GlobalHydra.instance()
    loader = running.config_loader() if running.is_initialized() else None
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def count_members(overrides: Sequence[str]) -> int | None:
    """The number of jobs of a grid; None where an override is no list of values. Of equal keys the last one holds."""
    last = {override.get_key_element(): override for override in _parsed(overrides)}
    swept = [override for override in last.values() if override.is_sweep_override()]
    if not all(override.is_discrete_sweep() for override in swept):
        return None
    return math.prod(len(list(override.sweep_string_iterator())) for override in swept)


def check_sweep(composed: DictConfig) -> None:
    """Refuses a sweep whose members would all be refused; composed: the config of a multirun, with `hydra` in it."""
    own = composed.hydra
    _check_objectives(check("objectives", _plain(composed)["objectives"], Objectives))
    if own.runtime.choices["hydra/sweeper"] == "basic":
        for override in _parsed(own.overrides.task):
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line} is a range, which a search draws from: add search=pareto, or list values"
                )


def _check_objectives(names: Sequence[str]) -> None:
    if len(names) != len(set(names)) or not names:
        shown = _shown(list(names))
        raise ConfigError(f"objectives must name each objective once, of {', '.join(OBJECTIVES)}; got {shown}")


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=False)


def compose(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The config that a command line composes, and Hydra's own part of it."""
    register()
    try:
        with hydra.initialize_config_dir(config_dir=str(_config_dir())):
            composed = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise ConfigError(said(error)) from error
    with open_dict(composed):
        own = composed.pop("hydra")
    return composed, own


def said(error: BaseException) -> str:
    """What Hydra says of a mistake, in one line; its causes know more."""
    text = " ".join(str(error).split())
    cause = str(error.__cause__ or "").splitlines()
    return f"{text} {cause[0]}" if cause and cause[0] not in text else text


def _config_dir() -> Path:
    """The folder of YAMLs: beside the package in a checkout, inside it when installed from a wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def admitted(arguments: Sequence[str]) -> list[str]:
    """The modules whose code the user admits: `trust=` of a command line, and SPARSITY_TRUST.

    To be asked before Hydra composes: a YAML can set variables and overrides, and must not admit code.
    """
    given = [argument.lstrip("+") for argument in arguments]
    values = [OverridesParser.create().parse_override(entry).value() for entry in given if entry.startswith("trust=")]
    named = [str(entry) for value in values for entry in (value if isinstance(value, list) else [value])]
    return named + [entry for entry in os.environ.get("SPARSITY_TRUST", "").split(",") if entry]


def read(
    config: DictConfig, *, trust: Sequence[str] = (), choices: Mapping[str, str | None] = types.MappingProxyType({})
) -> Run:
    """The checked run of a composed config.

    trust: the modules that the user admits, from `admitted`; choices: of each group, for people to read.
    """
    try:
        node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: give it one on the command line") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the config'}: {str(error).splitlines()[0]}") from error
    name = {group: str(choice) for group, choice in choices.items() if "/" not in group and choice is not None}
    run = check("", {**node, "name": name}, Run, (*TRUSTED, *_patterns(trust)))
    for entry in run.trust:
        if entry not in trust:
            raise ConfigError(f"trust=[{entry}] stands in a YAML: give it on the command line or in SPARSITY_TRUST")
    _check_together(run)
    return run


def _patterns(trust: Sequence[str]) -> list[str]:
    """Hydra's patterns for modules and functions."""
    bare = [entry.removesuffix(".*") for entry in trust]
    return [pattern for entry in bare for pattern in (entry, f"{entry}.*")]


def _check_together(run: Run) -> None:
    """What no single key can get wrong."""
    order = [STAGES.index(stage) for stage in run.stages]
    if order != sorted(set(order)):
        raise ConfigError(
            f"stages must be in the order {', '.join(STAGES)}, each once at most, got {_shown(run.stages)}"
        )
    if run.model.weights is None and not {"pretrain", "regularize"} & set(run.stages):
        raise ConfigError(
            f"stages={_shown(run.stages)} needs a trained network: give model.weights=FILE, or begin with pretrain"
        )
    epochs = sum(getattr(run.schedule, stage).epochs for stage in run.stages if stage in ("pretrain", "regularize"))
    if run.model.weights is None and not epochs and {"prune", "finetune"} & set(run.stages):
        raise ConfigError(
            "schedule.pretrain.epochs and schedule.regularize.epochs are 0, so that nothing is trained before pruning "
            "or finetuning: raise one, or give model.weights=FILE"
        )
    for layer in run.prune.layers:
        if layer in run.prune.exclude:
            raise ConfigError(f"prune.layers.{layer} does nothing, as prune.exclude names {layer} too: drop one")
    if run.data.validation >= 1 and run.data.validation != int(run.data.validation):
        raise ConfigError(
            f"data.validation must be a share below 1 or a whole number of images, got {run.data.validation}"
        )
    interval = sensitivity_range(run.prune.rule)
    for key, value in {"sensitivity": run.sensitivity, **_layer_keys(run.prune.layers)}.items():
        if value not in interval:
            raise ConfigError(f"{key} must be a number {interval}, got {value:g}: prune={run.name.get('prune')}")
    _check_objectives(run.objectives)


def _layer_keys(layers: dict[str, float]) -> dict[str, float]:
    return {f"prune.layers.{layer}": value for layer, value in layers.items()}


def sensitivity_range(rule: Call) -> Range:
    """The interval of a rule's sensitivity, as its signature annotates it; finite and ≥ 0 where it does not."""
    parameter = inspect.signature(rule.function).parameters.get("sensitivity")
    if parameter is None:
        raise ConfigError(f"{rule.key}._target_={rule.target} is no pruning rule: it takes no sensitivity")
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Range)), Range(0))


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
                raise ConfigError(f"{_join(key, name)} is no setting: {key or 'the top level'} has {', '.join(known)}")
        for name, entry in known.items():
            if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
                raise ConfigError(f"{_join(key, name)} is missing: add it to the YAML of {key.split('.')[0]}")
        kinds = typing.get_type_hints(kind, include_extras=True)
        return kind(**{name: self.read(_join(key, name), entry, kinds[name]) for name, entry in value.items()})

    def _list(self, key: str, value: Any, kind: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}: write {key}=[…]")
        return [self.read(f"{key}[{index}]", entry, kind) for index, entry in enumerate(value)]

    def _dict(self, key: str, value: Any, kind: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{key} must be a group of keys, got {value!r}")
        flat = _flatten(value)
        return {name: self.read(_join(key, name), entry, kind) for name, entry in flat.items()}

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
                raise ConfigError(f"{_join(key, name)} is passed by the pipeline: take it out")
            if name not in parameters and not takes_any:
                raise ConfigError(f"{_join(key, name)} is no setting: {target} takes {', '.join(parameters)}")
        for name, parameter in parameters.items():
            is_ours = target.startswith("sparsity.") and parameter.kind is parameter.KEYWORD_ONLY
            if is_ours and name not in numbers and name not in GIVEN and parameter.default is parameter.empty:
                raise ConfigError(f"{_join(key, name)} is missing: {target} needs it")
        kinds = typing.get_type_hints(function, include_extras=True) if target.startswith("sparsity.") else {}
        return {name: self.read(_join(key, name), entry, kinds.get(name, Any)) for name, entry in numbers.items()}


def _shown(names: list[str]) -> str:
    """A list as it is typed on the command line."""
    return f"[{','.join(names)}]"


NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
GIVEN = ("input_shape", "num_classes", "sensitivity")  # what the pipeline passes, not the YAML


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else str(name)


def _flatten(node: dict[Any, Any]) -> dict[str, Any]:
    """A dict of dicts as one dict of dotted keys: prune.layers.features.0=0.1 names the layer features.0."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{rest}": entry for rest, entry in _flatten(value).items()}
        else:
            flat[str(name)] = value
    return flat


def idle_settings(run: Run, overrides: Sequence[str]) -> list[str]:
    """A line for each setting of the command line that this run makes no use of."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    lines = []
    for key in keys:
        group, _, rest = key.partition(".")
        needs = {"reg": "regularize", "prune": "prune", "sensitivity": "prune"}.get(group)
        if group == "schedule" and rest.partition(".")[0] in STAGES:
            needs = rest.partition(".")[0]
        if needs and needs not in run.stages:
            lines.append(f"{key} does nothing: stages={_shown(run.stages)} has no {needs}")
        elif key == "reg.decay" and run.reg.penalty is None and run.reg.decay:
            lines.append(f"reg.decay={run.reg.decay:g} does nothing: reg={run.name.get('reg')} has no penalty")
        elif (group == "optimizer" or key in ("schedule", "schedule.batch_size")) and not set(run.stages) - {"prune"}:
            lines.append(f"{key} does nothing: stages={_shown(run.stages)} trains nothing")
        elif key == "data.validation_seed" and not run.data.validation:
            lines.append("data.validation_seed does nothing: data.validation=0 splits nothing off")
    return lines
