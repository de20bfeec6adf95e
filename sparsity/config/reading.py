"""A composed config as the checked settings of a run, and what no single key can get wrong."""

import inspect
import re
import types
from collections.abc import Mapping, Sequence
from typing import get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sparsity.config.outside import bring_in
from sparsity.config.schema import STAGES, Call, Run
from sparsity.config.trust import check_trust, patterns
from sparsity.config.typed import check, check_names
from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES
from sparsity.kinds import Range


def read(
    config: DictConfig,
    *,
    trust: Sequence[str] = (),
    choices: Mapping[str, str | None] = types.MappingProxyType({}),
    folder: str | None = None,
) -> Run:
    """The checked run of a composed config.

    trust: the modules that the user admits, from `admitted`; choices: of each group, for people to read; folder: the
    one that the command was typed in, if it is not the current one.
    """
    name = {group: str(choice) for group, choice in choices.items() if "/" not in group and choice is not None}
    plain = OmegaConf.to_container(config, resolve=False)
    if "name" in plain:
        raise ConfigError("name is no setting: a result is named by the choices of its groups")
    check_names("", {**plain, "name": name}, Run)  # before values that refer to others are looked up
    try:
        node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: give it one on the command line") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the config'}: {str(error).splitlines()[0]}") from error
    bring_in(node, trust, folder)
    run = check("", {**node, "name": name}, Run, patterns(trust))
    check_trust(run.trust, trust)
    _check_together(run)
    return run


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
    _check_applies(run)
    interval = sensitivity_range(run.prune.rule)
    for key, value in {"sensitivity": run.sensitivity, **_layer_keys(run.prune.layers)}.items():
        if value not in interval:
            raise ConfigError(f"{key} must be a number {interval}, got {value:g}: prune={run.name.get('prune')}")
    check_objectives(run.objectives)


def _check_applies(run: Run) -> None:
    """Refuses methods that are given nothing to work on."""
    for key, kinds in (("reg.apply_to", run.reg.apply_to), ("prune.apply_to", run.prune.apply_to)):
        if len(kinds) != len(set(kinds)):
            raise ConfigError(f"{key} must name each kind once, got {_shown(kinds)}")
    choice = f"reg={run.name.get('reg')}"
    if run.reg.penalty is None and run.reg.decay and run.reg.apply_to:
        raise ConfigError(f"reg.penalty=null leaves reg.decay={run.reg.decay:g} of {choice} without use: take reg=none")
    if run.reg.penalty is not None and not run.reg.apply_to and "regularize" in run.stages:
        raise ConfigError(f"reg.apply_to=[] leaves the penalty of {choice} nothing: take reg=none, or name kinds")
    for key, text in _search_keys(run):
        if not _is_range(text):
            raise ConfigError(f"{key} must be a range to search, such as interval(0.1,1), or a number; got {text!r}")


def _search_keys(run: Run) -> list[tuple[str, str]]:
    """The keys of the ranges that a search draws from, with their texts."""
    groups = {"reg": run.reg.search, "prune": run.prune.search}
    return [(f"{group}.search.{name}", text) for group, own in groups.items() for name, text in own.items()]


def _is_range(text: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        return override.is_sweep_override() or isinstance(override.value(), int | float)
    except Exception:  # whatever the grammar raises
        return False


def _layer_keys(layers: dict[str, float]) -> dict[str, float]:
    return {f"prune.layers.{layer}": value for layer, value in layers.items()}


def sensitivity_range(rule: Call) -> Range:
    """The interval of a rule's sensitivity, as its signature annotates it; finite and ≥ 0 where it does not."""
    parameter = inspect.signature(rule.function).parameters.get("sensitivity")
    if parameter is None:
        raise ConfigError(f"{rule.key}._target_={rule.target} is no pruning rule: it takes no sensitivity")
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Range)), Range(0))


def check_objectives(names: Sequence[str]) -> None:
    """Refuses none, and one that is named twice."""
    if len(names) != len(set(names)) or not names:
        shown = _shown(list(names))
        raise ConfigError(f"objectives must name each objective once, of {', '.join(OBJECTIVES)}; got {shown}")


def _shown(names: list[str]) -> str:
    """A list as it is typed on the command line."""
    return f"[{','.join(names)}]"


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
        elif key == "model.head" and run.model.head and run.model.weights is None:
            lines.append("model.head=new does nothing: without model.weights=FILE every layer is drawn anew")
        elif key == "data.validation_seed" and not run.data.validation:
            lines.append("data.validation_seed does nothing: data.validation=0 splits nothing off")
    return lines


def idle_hydra(own: DictConfig) -> list[str]:
    """A line for each of Hydra's settings of the command line that this kind of start makes no use of."""
    is_sweep = own.mode is RunMode.MULTIRUN
    typed = OmegaConf.to_container(own.overrides.hydra, resolve=False)
    keys = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in typed]
    of_sweeps = [key for key in keys if re.match(r"hydra\.(sweep|sweeper|launcher)\b", key)]
    if is_sweep:
        return [f"{key} does nothing in a sweep: hydra.sweep.dir names its folder" for key in keys if key == RUN_DIR]
    return [f"{key} does nothing without -m" for key in of_sweeps]


RUN_DIR = "hydra.run.dir"
