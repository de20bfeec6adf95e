"""A recipe's listed stages in order, each with its function and resolved numbers; and which keys they read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsity.config.schema import Ramp, Stage
from sparsity.config.signatures import marked
from sparsity.config.typed import check, join
from sparsity.errors import ConfigError, nearest
from sparsity.limits import Budget, PartOfBudget
from sparsity.nodes import STATE, Call, Rule, StageFunction, sensitivity_range

MOST_ROUNDS = 1000
NAME = re.compile(r"[A-Za-z_]\w*")
READ = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")  # a value that is read from another key
START = "start"  # the state before the first stage


@dataclass(frozen=True)
class Listed:
    """One stage as it is listed: its own name, that of its node, and its round of how many."""

    name: str
    node: str
    round: int | None = None
    rounds: int = 1


def listed(entries: Sequence[Any], nodes: Sequence[str], recipe: str) -> list[Listed]:
    """The stages of a list of names and repeats of names, in order; a repeated name counts: prune, prune-2, …"""
    found: list[Listed] = []
    for node, number, rounds in _unrolled(entries):
        if not isinstance(node, str) or node not in nodes:
            close = nearest(str(node), nodes)
            meant = f"did you mean {close}? " if close else ""
            raise ConfigError(f"stages names {node!r}, which recipe={recipe} lacks: {meant}it has {', '.join(nodes)}")
        count = sum(each.node == node for each in found)
        found.append(Listed(f"{node}-{count + 1}" if count else node, node, number, rounds))
    if len(found) > MOST_ROUNDS:
        raise ConfigError(f"stages lists {len(found):,} stages, {MOST_ROUNDS:,} at most: repeat fewer")
    return found


def _unrolled(entries: Sequence[Any]) -> Iterator[tuple[Any, int | None, int]]:
    """The names of a list, each with its round and the number of rounds."""
    for entry in entries:
        if not isinstance(entry, dict):
            yield entry, None, 1
            continue
        if set(entry) != {"repeat", "stages"} or not isinstance(entry["stages"], list) or not entry["stages"]:
            raise ConfigError(f"stages holds names and {{repeat: 3, stages: [NAME, …]}}, got {entry!r}")
        rounds = entry["repeat"]
        if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MOST_ROUNDS:
            raise ConfigError(f"repeat in stages must be a whole number from 1 to {MOST_ROUNDS:,}, got {rounds!r}")
        if any(isinstance(inner, dict) for inner in entry["stages"]):
            raise ConfigError("a repeat in stages holds names, and no other repeat")
        for number in range(1, rounds + 1):
            yield from ((inner, number, rounds) for inner in entry["stages"])


def resolved(
    plain: Mapping[str, Any], raw: Mapping[str, Any], ramp: Ramp, trusted: Sequence[str], recipe: str
) -> list[Stage]:
    """The listed stages of a composed config.

    plain: the config, and raw: the same before values that are read from other keys are looked up; trusted: Hydra's
    patterns of the code from outside that may be called; recipe: the choice, for messages.
    """
    nodes = _nodes(plain)
    for name in nodes:
        if not NAME.fullmatch(str(name)):
            raise ConfigError(f"recipe.{name} is no name of a stage: letters, digits and _, and no digit first")
        if name == START:
            raise ConfigError(f"recipe.{name}: {START} is the state before the first stage: name the stage otherwise")
    if not isinstance(plain["stages"], list):
        raise ConfigError(f"stages must be a list, got {plain['stages']!r}: write stages=[…]")
    entries = listed(plain["stages"], list(nodes), recipe)
    calls = {name: check(f"recipe.{name}", node, StageFunction, trusted) for name, node in nodes.items()}
    sources = {name: _sources(raw["recipe"][name]) for name in nodes}
    found = [
        Stage(each.name, each.node, _strengthened(calls[each.node], each, ramp), sources[each.node], each.round)
        for each in entries
    ]
    for place, stage in enumerate(found):
        _check_states(stage, found[:place])
    return found


def _nodes(plain: Mapping[str, Any]) -> dict[str, Any]:
    nodes = plain["recipe"]
    if not isinstance(nodes, dict):
        raise ConfigError(f"recipe must be a group of stages, got {nodes!r}: choose one by recipe=standard")
    return nodes


def _sources(node: Any) -> dict[str, str]:
    """By argument of a node, the key that it is read from."""
    values = node.items() if isinstance(node, dict) else ()
    return {name: found[1] for name, value in values if (found := READ.fullmatch(str(value)))}


def _check_states(stage: Stage, before: Sequence[Stage]) -> None:
    """Refuses the name of a state that no earlier stage makes."""
    for name in marked(stage.call.function, STATE):
        text = stage.call.numbers.get(name)
        if text is None:
            continue
        key = f"{stage.sources.get(name, f'recipe.{stage.node}.{name}')}={text}"
        other, sign, epoch = text.partition("@")
        if other == START and not sign:
            continue
        made = next((each for each in before if each.name == other), None)
        if made is None:
            names = ", ".join([START, *(each.name for each in before)])
            raise ConfigError(f"{key} names a state that is not there before {stage.name}: choose of {names}")
        epochs = getattr(made.call.numbers.get("schedule"), "epochs", None)
        if sign and epoch not in map(str, range(1, (epochs or 0) + 1)):
            last = f"1 to {epochs}" if epochs else "none, as it trains nothing"
            raise ConfigError(f"{key} names no epoch of {other}: it has {last}")


# --- strengths from round to round -----------------------------------------------------------------------------------


def _strengthened(call: Call, stage: Listed, ramp: Ramp) -> Call:
    """A stage's function with the strength of its round; that of the last is the one asked for."""
    numbers = dict(call.numbers)
    if isinstance(numbers.get("budget"), Budget):
        budget: Budget = numbers["budget"]
        numbers["budget"] = _part(budget, stage, ramp) if budget.given else None
        if budget.given and "sensitivity" in numbers:
            numbers["sensitivity"] = None
    if isinstance(numbers.get("sensitivity"), float):
        numbers["sensitivity"] = _sensitivity(numbers["sensitivity"], numbers.get("rule"), stage, ramp)
    return replace(call, numbers=numbers)


def _sensitivity(last: float, rule: Rule | None, stage: Listed, ramp: Ramp) -> float:
    """The sensitivity of a round.

    A constant one is taken of what the round before left: of a rule that prunes a share of all, 1 − (1 − s)^round.
    """
    if stage.rounds == 1:
        return last
    if ramp.start is not None and ramp.start > last:
        raise ConfigError(f"ramp.from={ramp.start:g} is above {last:g} of the last round, and strengths rise: lower it")
    share = stage.round / stage.rounds
    if ramp.curve == "constant":
        each = last if ramp.start is None else ramp.start
        is_share = rule is not None and sensitivity_range(rule).high == 1
        if not is_share:
            return last if share == 1 else each
        risen = 1 - (1 - each) ** stage.round
        return risen if ramp.start is None else last if share == 1 else min(last, risen)
    return _between(last / 10 if ramp.start is None else ramp.start, last, share, ramp.curve)


def _between(first: float, last: float, share: float, curve: str) -> float:
    """A number `share` of the way from the first to the last, which is met exactly."""
    if share == 1:
        return last
    if curve == "geometric":
        if first <= 0 or last <= 0:
            raise ConfigError(f"ramp.curve=geometric needs numbers > 0, got {first:g} to {last:g}: take linear")
        return first * (last / first) ** share
    return first + (last - first) * (share if curve == "linear" else 1 - (1 - share) ** 3)


def _part(budget: Budget, stage: Listed, ramp: Ramp) -> Budget:
    """The budget of a round."""
    if stage.rounds == 1 or stage.round == stage.rounds:
        return budget
    share, given = stage.round / stage.rounds, budget.given
    if ramp.start is None:
        way = "geometric" if ramp.curve in ("constant", "geometric") else "linear"
        rising = "cubic" if ramp.curve == "cubic" else "linear"
        return PartOfBudget(**given, share=_between(0.0, 1.0, share, rising), way=way)
    if len(given) > 1:
        raise ConfigError(f"ramp.from={ramp.start:g} is of one number, and {len(given)} budgets are given: drop it")
    found = {}
    for name, last in given.items():
        is_ratio = isinstance(last, float)
        if ramp.curve == "constant":
            if not is_ratio or not 0 < ramp.start < 1:
                raise ConfigError(
                    f"ramp.from={ramp.start:g} with ramp.curve=constant must be the share in (0, 1) that each round "
                    f"prunes of what is left, for ratios such as budget.compression; budget.{name}={last:g}"
                )
            found[name] = min(last, (1 - ramp.start) ** -stage.round)
        else:
            if ramp.start < 1 or (ramp.start > last if is_ratio else ramp.start < last):
                raise ConfigError(
                    f"ramp.from={ramp.start:g} must be at least 1 and {'no more' if is_ratio else 'no less'} than "
                    f"budget.{name}={last:g}, as strengths rise"
                )
            number = _between(ramp.start, last, share, ramp.curve)
            found[name] = number if is_ratio else round(number)
    return Budget(**found)


# --- what stages read ------------------------------------------------------------------------------------------------


class Readers:
    """Remembers a config before values are looked up: which of its keys the nodes of a recipe read."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        nodes = raw.get("recipe")
        self.nodes = nodes if isinstance(nodes, dict) else {}
        self.keys = {name: {f"recipe.{name}", *self._keys(node)} for name, node in self.nodes.items()}
        stages = raw.get("stages")
        self.of_list = self._keys(stages)
        entries = stages if isinstance(stages, list) else []
        self.listed = {
            name
            for entry in entries
            for name in (entry.get("stages") or () if isinstance(entry, dict) else (entry,))
            if isinstance(name, str)
        }
        self.repeats = any(isinstance(entry, dict) for entry in entries)

    def _keys(self, node: Any, seen: frozenset[str] = frozenset()) -> set[str]:
        """The keys that a node reads, directly or through what it reads."""
        if isinstance(node, dict | list):
            values = node.values() if isinstance(node, dict) else node
            return {key for value in values for key in self._keys(value, seen)}
        found = set(READ.findall(str(node))) - seen if isinstance(node, str) else set()
        return found | {key for each in found for key in self._keys(_dig(self.raw, each), seen | found)}

    def of(self, key: str) -> list[str]:
        """The nodes of the recipe, listed or not, that read a key, some of what it holds, or all that it lies in."""
        return [name for name, keys in self.keys.items() if any(_touches(key, other) for other in keys)]

    def is_read(self, key: str) -> bool:
        """Whether a listed stage, or the list itself, reads a key."""
        if key.partition(".")[0] == "ramp":
            return self.repeats
        if any(_touches(key, other) for other in self.of_list):
            return True
        return bool(self.listed & {*self.of(key)})


def _touches(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _dig(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def check_written(raw: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuses keys of the command line that write through a node into what others read too."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        parts, node = key.split("."), raw
        for place, part in enumerate(parts):
            node = node.get(part) if isinstance(node, dict) else None
            found = READ.fullmatch(node) if isinstance(node, str) else None
            if parts[0] == "recipe" and found and place < len(parts) - 1:
                rest = ".".join(parts[place + 1 :])
                value = override.partition("=")[2]
                raise ConfigError(
                    f"{key} is read from {found[1]}, and by others too: type {join(found[1], rest)}={value}"
                )
