"""A composed config as the checked settings of a run, and what no single key can get wrong."""

import importlib.util
import inspect
import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sparsity.config.outside import bring_in
from sparsity.config.recipe import Readers, check_written, resolved
from sparsity.config.schema import RULE, SEARCHED, Run, Stage
from sparsity.config.signatures import marked
from sparsity.config.teachers import check_teacher, with_teachers
from sparsity.config.trust import check_trust, patterns
from sparsity.config.typed import check, check_names
from sparsity.errors import ConfigError
from sparsity.front import OBJECTIVES, OF_COMPACT
from sparsity.kinds import OWN_SHARE
from sparsity.limits import Budget
from sparsity.nodes import Loss, Regularizer, Rule, sensitivity_range


def read(
    config: DictConfig,
    *,
    trust: Sequence[str] = (),
    choices: Mapping[str, str | None] = types.MappingProxyType({}),
    folder: str | None = None,
    typed: Sequence[str] = (),
) -> Run:
    """The checked run of a composed config.

    trust: the modules that the user admits, from `admitted`; choices: of each group, for people to read; folder: the
    one that the command was typed in, if it is not the current one; typed: the overrides of the command line.
    """
    name = {group: str(choice) for group, choice in choices.items() if "/" not in group and choice is not None}
    one_strength(config, typed)
    raw = OmegaConf.to_container(config, resolve=False)
    if "name" in raw:
        raise ConfigError("name is no setting: a result is named by the choices of its groups")
    if "stages" not in raw:
        raise ConfigError(
            f"stages is missing: list those that recipe={name.get('recipe')} runs, as in stages=[pretrain]"
        )
    check_names("", {**raw, "name": name}, Run)  # before values that refer to others are looked up
    check_written(raw, typed)
    try:
        node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: give it one on the command line") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the config'}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError("the config: some value refers to what holds it: take that out") from error
    node = with_teachers(node)
    bring_in(node, trust, folder)
    run = check("", {**node, "recipe": [], "name": name}, Run, patterns(trust))
    check_trust(run.trust, trust)
    run = replace(run, recipe=resolved(node, raw, run.ramp, patterns(trust), str(name.get("recipe"))))
    _check_together(run, node["recipe"])
    return run


def typed_in(hydra: DictConfig) -> list[str]:
    """The overrides of a command line as they were typed, whatever they refer to; hydra: its own part of the config."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)


def one_strength(config: DictConfig, typed: Sequence[str]) -> None:
    """Lets a budget take the place of the sensitivity, or a typed sensitivity that of a YAML's budget; never both.

    Changes the config: what does not hold is null in it.
    """
    raw = OmegaConf.to_container(config, resolve=False)
    budget = raw.get("budget")
    if not isinstance(budget, dict):
        return
    keys = [override.lstrip("+~").partition("=")[0] for override in typed]
    held = [f"budget.{name}" for name, value in budget.items() if value is not None]
    given = [key for key in held if key in keys or "budget" in keys]
    has_number = "sensitivity" in keys and raw.get("sensitivity") is not None
    if given and has_number:
        raise ConfigError(f"{given[0]} takes the place of sensitivity, which it finds: give one of the two")
    with read_write(config), open_dict(config):
        if held and has_number:
            config.budget = dict.fromkeys(budget)
        elif held:
            config.sensitivity = None


def _check_together(run: Run, nodes: Mapping[str, Any]) -> None:
    """What no single key can get wrong; nodes: of the recipe, listed or not."""
    _check_trained(run, nodes)
    check_teacher(run.loss, "loss", is_used=False)
    for stage in run.recipe:
        for argument, value in stage.call.numbers.items():
            if isinstance(value, Loss):
                check_teacher(value, _source(stage, argument))
    for layer in run.prune.layers:
        if layer in run.prune.exclude:
            raise ConfigError(f"prune.layers.{layer} does nothing, as prune.exclude names {layer} too: drop one")
    if run.data.validation >= 1 and run.data.validation != int(run.data.validation):
        raise ConfigError(
            f"data.validation must be a share below 1 or a whole number of images, got {run.data.validation}"
        )
    _check_applies(run)
    numbers = {} if run.sensitivity is None else {"sensitivity": run.sensitivity}
    _check_strengths(run.prune, RULE, numbers, run)
    for stage in run.recipe:
        rule, value = (stage.call.numbers.get(name) for name in ("rule", "sensitivity"))
        if isinstance(rule, Rule):
            by = "" if run.ramp.start is None else f" by ramp.from={run.ramp.start:g}"
            key = _source(stage, "sensitivity") + ("" if stage.round is None else f" of {stage.name}{by}")
            numbers = {key: value} if isinstance(value, float) else {}
            _check_strengths(rule, _source(stage, "rule"), numbers, run)
    _check_budget(run)
    _check_packages(run)
    check_objectives(run.objectives)
    if run.compact is False and OF_COMPACT & {*run.objectives}:
        raise ConfigError("objectives=[bytes] counts the compact network's file, which compact=false leaves out")


def _check_trained(run: Run, nodes: Mapping[str, Any]) -> None:
    """Refuses stages that prune or hold a network that nothing trains."""
    if run.model.weights is not None:
        return
    trains = {stage.name: schedule for stage in run.recipe if (schedule := stage.call.numbers.get("schedule"))}
    fresh = [stage for stage in run.recipe if stage.name in trains and stage.call.numbers.get("hold") != "zeros"]
    holding = [stage for stage in run.recipe if stage.name in trains and stage not in fresh]
    if not fresh or (holding and run.recipe.index(holding[0]) < run.recipe.index(fresh[0])):
        can = [name for name, node in nodes.items() if "schedule" in node and node.get("hold") != "zeros"]
        remedy = f", or begin with {can[0]}" if can else ""
        raise ConfigError(f"stages={shown(run.stages)} needs a trained network: give model.weights=FILE{remedy}")
    idle = [stage for stage in fresh if not trains[stage.name].epochs]
    if len(idle) == len(fresh) and len(run.recipe) > len(fresh):
        keys = " and ".join(f"{_source(stage, 'schedule')}.epochs" for stage in fresh)
        are = "are" if len(fresh) > 1 else "is"
        raise ConfigError(
            f"{keys} {are} 0, so that nothing is trained before pruning or finetuning: raise one, or give "
            "model.weights=FILE"
        )


def _source(stage: Stage, argument: str) -> str:
    """The key that an argument of a stage is typed by."""
    return stage.sources.get(argument, f"recipe.{stage.node}.{argument}")


def _check_applies(run: Run) -> None:
    """Refuses methods that are given nothing to work on."""
    for key, kinds in (("reg.apply_to", run.reg.apply_to), ("prune.apply_to", run.prune.apply_to)):
        if len(kinds) != len(set(kinds)):
            raise ConfigError(f"{key} must name each kind once, got {shown(kinds)}")
    choice = f"reg={run.name.get('reg')}"
    if run.reg.penalty is not None and run.reg.shrink is not None:
        raise ConfigError(f"reg.penalty and reg.shrink of {choice} are two regularizers: make one of them null")
    if (of := run.reg.unit) is not None and marked(of.function.function, OWN_SHARE):
        raise ConfigError(f"reg/unit={of.function.target.rpartition('.')[2]} has no groups to regularize: take another")
    if run.reg.method is None and run.reg.decay and run.reg.apply_to:
        raise ConfigError(f"reg.penalty=null leaves reg.decay={run.reg.decay:g} of {choice} without use: take reg=none")
    is_used = any(isinstance(value, Regularizer) for stage in run.recipe for value in stage.call.numbers.values())
    if run.reg.method is not None and not run.reg.apply_to and is_used:
        raise ConfigError(f"reg.apply_to=[] leaves the penalty of {choice} nothing: take reg=none, or name kinds")
    for key, text in _search_keys(run):
        if not _is_range(text):
            raise ConfigError(f"{key} must be a range to search, such as interval(0.1,1), or a number; got {text!r}")


def _check_budget(run: Run) -> None:
    """Refuses a budget that nothing is pruned for, and a rule that is given no number."""
    named = [name for name, _ in run.budget.alone()]
    takers = [stage for stage in run.recipe if isinstance(stage.call.numbers.get("budget"), Budget)]
    if named and run.recipe and not takers:
        raise ConfigError(f"{named[0]} needs a stage that prunes, and stages={shown(run.stages)} has none: add one")
    for stage in run.recipe:
        numbers, strengths = stage.call.numbers, ("budget", "sensitivity")
        takes = inspect.signature(stage.call.function).parameters
        is_given = any(numbers.get(name) is not None for name in strengths)
        if isinstance(numbers.get("rule"), Rule) and not is_given and takes.keys() & {*strengths}:
            raise ConfigError(
                f"{stage.name} prunes by no number: give {_source(stage, 'sensitivity')}=NUMBER, or a budget such as "
                "budget.compression=50"
            )
        if "rule" in takes and "curve" in takes:
            _check_curve(stage)
        if numbers.get("regrow") is not None:
            _check_regrow(stage, run)
        if numbers.get("adapt") is not None:
            _check_adapt(stage)
        if isinstance(rule := numbers.get("rule"), Rule) and isinstance(numbers.get("budget"), Budget):
            _check_share(rule, numbers["budget"])


def _check_share(rule: Rule, budget: Budget) -> None:
    """Refuses a budget for a unit that leaves a share of its own."""
    unit = rule.unit.function
    for key, _ in budget.alone():
        if marked(unit.function, OWN_SHARE):
            name = unit.target.rpartition(".")[2]
            of = ", ".join(f"prune.unit.function.{each}={unit.numbers[each]}" for each in unit.numbers)
            raise ConfigError(f"{key} cannot be met: {name} leaves its own share, by {of}: drop the budget")


def _check_curve(stage: Stage) -> None:
    """Refuses what a stage that may prune along a curve lacks for it, and what is for it alone where it has no rule."""
    numbers, example = stage.call.numbers, {"curve": "{shape:cubic,until:0.5}", "every": "100"}
    if numbers.get("rule") is None:
        strengths = ("sensitivity",) if numbers.get("adapt") is not None else ("sensitivity", "budget")
        idle = next((name for name in (*example, *strengths) if numbers.get(name) is not None), None)
        idle = "straight_through" if idle is None and numbers.get("straight_through") else idle
        if idle is not None:
            raise ConfigError(f"recipe.{stage.node}.{idle} does nothing without a rule: give it rule: ${{{RULE}}}")
        return
    for name, text in example.items():
        if numbers.get(name) is None:
            raise ConfigError(
                f"recipe.{stage.node}.{name} is missing: {stage.name} prunes while it trains: add {name}={text}"
            )
    if not numbers["schedule"].epochs:
        raise ConfigError(f"{_source(stage, 'schedule')}.epochs=0 leaves {stage.name} no step to prune in: raise it")


def _check_regrow(stage: Stage, run: Run) -> None:
    """Refuses an exchange of entries where none are masked, or where masks are of more than entries."""
    key, numbers = f"recipe.{stage.node}.regrow", stage.call.numbers
    if numbers.get("rule") is not None:
        raise ConfigError(f"{key} and recipe.{stage.node}.rule both change masks in {stage.name}: drop one")
    before = [each.call.numbers for each in run.recipe[: run.recipe.index(stage)]]
    rules = [each["rule"] for each in before if isinstance(each.get("rule"), Rule)]
    if not rules and numbers.get("hold") != "zeros":
        raise ConfigError(f"{key} does nothing: no stage before {stage.name} masks anything: list one that does")
    for unit in (rule.unit.function for rule in rules):
        if not unit.target.endswith(".entry"):
            name = unit.target.rpartition(".")[2]
            raise ConfigError(
                f"{key} exchanges entries, and prune/unit={name} keeps more together: take prune/unit=entry"
            )


def _check_adapt(stage: Stage) -> None:
    """Refuses to look for a decay where there is none, or no budget to find it by."""
    key, numbers = f"recipe.{stage.node}.adapt", stage.call.numbers
    regularizer, budget = numbers.get("penalty"), numbers.get("budget")
    if not isinstance(regularizer, Regularizer) or regularizer.method is None or not regularizer.decay:
        raise ConfigError(f"{key} does nothing: {stage.name} has no regularizer whose decay it could find: take reg=hs")
    if numbers.get("rule") is not None:
        raise ConfigError(f"{key} and recipe.{stage.node}.rule do not go together: drop one")
    if not isinstance(budget, Budget) or not budget.given:
        raise ConfigError(f"{key} finds {stage.name}'s decay by a budget: give one, such as budget.compression=50")


def _check_packages(run: Run) -> None:
    """Refuses a tracker and an export whose packages are not there."""
    needs = [("track", name, [track.package]) for name, track in run.track.others.items()]
    needs += [("export", name, export.packages) for name, export in run.export.others.items()]
    for group, name, packages in needs:
        for package in packages:
            if importlib.util.find_spec(package.partition(".")[0]) is None:
                remedy = f"pip install -e '.[{name}]', or take {group}=none"
                raise ConfigError(f"{group}={name} needs the package {package}: {remedy}")


def _search_keys(run: Run) -> list[tuple[str, str]]:
    """The keys of the ranges that a search draws from, with their texts."""
    return [(f"{group}.search.{name}", text) for group in SEARCHED for name, text in getattr(run, group).search.items()]


def _is_range(text: str) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        return override.is_sweep_override() or isinstance(override.value(), int | float)
    except Exception:  # whatever the grammar raises
        return False


def _check_strengths(rule: Rule, key: str, numbers: Mapping[str, float], run: Run) -> None:
    """Refuses sensitivities that are none of the rule's: some by their keys, and layers' own; key: that of the rule."""
    layers = {f"{key}.layers.{layer}": value for layer, value in rule.layers.items()}
    interval = sensitivity_range(rule)
    for each, value in {**numbers, **layers}.items():
        if value not in interval:
            name = f"{RULE}={run.name.get(RULE)}" if key == RULE else f"{key}.cut._target_={rule.cut.function.target}"
            raise ConfigError(f"{each} must be a number {interval}, got {value:g}: {name}")


def check_objectives(names: Sequence[str]) -> None:
    """Refuses none, and one that is named twice."""
    if len(names) != len(set(names)) or not names:
        raise ConfigError(
            f"objectives must name each objective once, of {', '.join(OBJECTIVES)}; got {shown(list(names))}"
        )


def shown(entries: Sequence[Any]) -> str:
    """A list as it is typed on the command line."""
    each = [f"{{repeat:{e['repeat']},stages:{shown(e['stages'])}}}" if isinstance(e, dict) else str(e) for e in entries]
    return f"[{','.join(each)}]"


def idle_settings(run: Run, composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """A line for each setting of the command line that a run makes no use of; composed: the config that it is of."""
    readers = Readers(OmegaConf.to_container(composed, resolve=False))
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    lines = []
    for key in keys:
        place = key.rpartition("@")[2].replace("/", ".")  # of a group in a group, or of one in another's place
        if is_of_stages(place) and (not readers.is_read(place) or (_is_of_ramp(key) and not _rises(run))):
            lines.append(f"{key} does nothing: {_why_idle(place, run, readers)}")
        elif key == "reg.decay" and run.reg.method is None and run.reg.decay:
            lines.append(f"reg.decay={run.reg.decay:g} does nothing: reg={run.name.get('reg')} has no penalty")
        elif place.startswith("reg.unit") and run.reg.method is None:
            lines.append(f"{key} does nothing: reg={run.name.get('reg')} regularizes nothing")
        elif key == "average.start" and run.average.kind == "none":
            lines.append(f"average.start={run.average.start:g} does nothing: average.kind=none: take mean or ema")
        elif key == "average.decay" and run.average.kind != "ema":
            lines.append(f"average.decay={run.average.decay:g} does nothing: average.kind={run.average.kind}: take ema")
        elif key == "model.head" and run.model.head and run.model.weights is None:
            lines.append("model.head=new does nothing: without model.weights=FILE every layer is drawn anew")
        elif key == "data.validation_seed" and not run.data.validation:
            lines.append("data.validation_seed does nothing: data.validation=0 splits nothing off")
    return lines


def unread(composed: DictConfig, keys: Collection[str]) -> set[str]:
    """Those of some keys that are of use to stages alone, and that no listed stage of a composed config reads."""
    readers = Readers(OmegaConf.to_container(composed, resolve=False))
    places = {key: key.rpartition("@")[2].replace("/", ".") for key in keys}
    return {key for key, place in places.items() if is_of_stages(place) and not readers.is_read(place)}


# Keys that are read whatever the stages are; all others are of use to the stages that read them.
ALWAYS = (
    "model",
    "data",
    "seed",
    "device",
    "precision",
    "threads",
    "step",
    "track",
    "export",
    "plots",
    "compact",
    "card",
    "store",
    "objectives",
    "trust",
)
ALWAYS += ("stages", "experiment", "search", "hydra", "name")


def is_of_stages(key: str) -> bool:
    """Whether a key is of use to stages alone."""
    group, _, rest = key.partition(".")
    if group == "recipe":
        return bool(rest)
    return group not in ALWAYS and not group.startswith("hydra/") and rest.partition(".")[0] != "search"


def _is_of_ramp(key: str) -> bool:
    return key.partition(".")[0] == "ramp"


def _rises(run: Run) -> bool:
    """Whether there is a strength that may differ from round to round."""
    return any((stage.round or 0) > 1 and {"sensitivity", "budget"} & stage.call.numbers.keys() for stage in run.recipe)


def _why_idle(key: str, run: Run, readers: Readers) -> str:
    if _is_of_ramp(key):
        return f"stages={shown(run.stages)} repeats nothing that prunes"
    needs = readers.of(key)
    if not needs:
        return f"no stage of recipe={run.name.get('recipe')} reads it"
    *most, last = needs
    return f"stages={shown(run.stages)} has no {', '.join(most)}{' or ' if most else ''}{last}"


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
