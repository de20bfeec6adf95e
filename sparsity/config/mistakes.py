"""What Hydra, OmegaConf and YAML say of a mistake, as one line: what is wrong, and what exists in its place."""

import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import yaml
from hydra._internal import utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsity.config.paths import folder_of_yamls
from sparsity.errors import SparsityError, nearest

HELP = "python main.py --help lists all"
SEARCH = "search=pareto"  # brings the keys that all searches have


def mistake(error: BaseException, typed: Sequence[str] = ()) -> str | None:
    """What a user did wrong, in one line; None for an error of a job, or of this program.

    typed: the overrides of the command line.
    """
    if isinstance(error, SparsityError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return said(error, typed)
    modules = [frame.f_globals.get("__name__", "") for frame in _frames(error)]
    ours = [name for name in modules if name.startswith("sparsity.") and not name.startswith("sparsity.config")]
    if utils._job_traceback(error.__traceback__) or any("sparsity.experiment" in name for name in ours):
        return None
    is_hydras = isinstance(error, HydraException) or (modules[-1:] and modules[-1].startswith(("hydra.", "omegaconf.")))
    return said(error, typed) if is_hydras or not ours else None


def said(error: BaseException, typed: Sequence[str] = ()) -> str:
    """What is wrong with a composition, in one line, with the nearest name that exists."""
    known = _Known(typed)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, str(error), known)
    if isinstance(error, MissingConfigException) and error.options:
        return _no_choice(error, known)
    for cause in _chain(error):
        if isinstance(cause, yaml.YAMLError | UnicodeDecodeError):
            return _broken_yaml(cause, _file_of(error))
    text = str(error)
    for pattern, tell in _TOLD.items():
        if found := re.search(pattern, text, re.DOTALL):
            return tell(known, error, *found.groups())
    line = _short(error)
    if not isinstance(error, HydraException) and line.count(" ") < 3:
        line = f"{type(error).__name__}: {line}"
    hydras = [text for text in typed if text.startswith("hydra")]
    unread = [] if isinstance(error, HydraException | OmegaConfBaseException) else [t for t in typed if not _reads(t)]
    place = getattr(error, "full_key", None) or _file_of(error) or " ".join(unread or hydras)
    return f"{place}: {line}" if place and place not in line else line


def _short(error: BaseException) -> str:
    """An error's text without Hydra's advice, and what caused it."""
    kept = [line.strip() for line in str(error).splitlines() if not line.strip().startswith(_ADVICE)]
    text = " ".join(" ".join(kept).split())
    cause = next(iter(str(error.__cause__ or "").splitlines()), "")
    return " ".join(f"{text} {cause if cause not in text else ''}".split()) or "it cannot be used"


_ADVICE = ("See https://", "To append to your", "Alias expansion", "object_type=", "full_key:", "reference_type=")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _file_of(error: BaseException) -> str | None:
    """The YAML that Hydra was reading when an error came up."""
    paths = [
        frame.f_locals.get("full_path")
        for each in _chain(error)
        for frame in _frames(each)
        if frame.f_globals.get("__name__", "").endswith("config_source")
    ]
    return next((path for path in paths if isinstance(path, str)), None)


def _broken_yaml(error: BaseException, file: str | None) -> str:
    """What a parser says of a YAML: its file, the line, and what it found there."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{file or getattr(mark, 'name', 'a YAML')}{f', line {mark.line + 1}' if mark else ''}"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{place} is no YAML: {f'{context}: ' if context else ''}{problem}"


def watch_warnings() -> None:
    """Makes errors of the warnings in which Hydra says that a setting does nothing; leaves out its plans."""
    for message in (r"provider=.* is not available", r"\s*Running Hydra app with --multirun"):
        warnings.filterwarnings("error", message, UserWarning)
    warnings.filterwarnings("ignore", r".* is deprecated and will be removed in Hydra", UserWarning)


# --- what exists -----------------------------------------------------------------------------------------------------


class _Known:
    """The groups, choices and keys that exist, looked up when they are asked for."""

    def __init__(self, typed: Sequence[str]):
        self.typed = typed

    @cached_property
    def loader(self) -> Any:
        """Hydra's, while it runs; else one of the same YAMLs."""
        running = GlobalHydra.instance()
        if running.is_initialized():
            return running.config_loader()
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        return ConfigLoaderImpl(utils.create_config_search_path(str(folder_of_yamls())))

    @cached_property
    def groups(self) -> list[str]:
        """All groups, such as model and hydra/launcher."""
        top = self.loader.list_groups("")
        return [*top, *(f"{group}/{inner}" for group in top for inner in self.loader.list_groups(group))]

    def choices(self, group: str) -> list[str]:
        """The YAMLs of a group."""
        return sorted(self.loader.get_group_options(group, results_filter=ObjectType.CONFIG))

    @cached_property
    def all_choices(self) -> set[str]:
        """Every group with every choice, as it is typed."""
        return {f"{group}={choice}" for group in self.groups for choice in self.choices(group)}

    @cached_property
    def chosen(self) -> list[str]:
        """The overrides of the command line that choose something that exists."""
        return [text for text in self.typed if text in self.all_choices]

    @cached_property
    def keys(self) -> list[str]:
        """The keys of the config as it is without what cannot be composed, innermost and outer ones."""
        return self._compose(self.chosen) or self._compose([])

    def names_in(self, parent: str) -> list[str]:
        """The keys right inside another; at the top level of ''."""
        before = f"{parent}." if parent else ""
        names = [key.removeprefix(before) for key in self.keys if key.startswith(before)]
        return [name for name in names if "." not in name]

    @cached_property
    def keys_of_searches(self) -> list[str]:
        """The keys that a search adds."""
        found = self._compose([*(text for text in self.chosen if not text.startswith("search=")), SEARCH])
        return [key for key in found if key not in self.keys]

    def _compose(self, overrides: list[str]) -> list[str]:
        try:
            composed = self.loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
        except Exception:  # one mistake at a time
            return []
        return list(_keys_of(OmegaConf.to_container(composed, resolve=False)))

    def choices_with(self, key: str) -> list[str]:
        """The choices of a key's group that have the key."""
        group, _, inner = key.partition(".")
        if not inner or group not in self.groups:
            return []
        return [choice for choice in self.choices(group) if inner in self.keys_of(f"{group}={choice}")]

    def keys_of(self, choice: str) -> list[str]:
        """The keys that the YAML of a choice itself has; none if it is broken, of which is told when it is chosen."""
        try:
            config = self.loader.repository.load_config(choice.replace("=", "/")).config
            return list(_keys_of(OmegaConf.to_container(config, resolve=False)))
        except Exception:
            return []


def _keys_of(node: Any, before: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, inner in node.items():
            yield f"{before}{name}"
            yield from _keys_of(inner, f"{before}{name}.")


# --- what is said ----------------------------------------------------------------------------------------------------


def _no_key(known: _Known, error: BaseException, typed: str) -> str:
    """A key or group that does not exist, and the nearest that does."""
    key = typed.lstrip("+~").partition("@")[0]
    value = next((text.partition("=")[2] for text in known.typed if text.lstrip("+~").startswith(f"{typed}=")), "")
    if not key:
        return (
            f"{next((text for text in known.typed if text.lstrip('+~')[:1] in '='), '~')} names no key: write KEY=VALUE"
        )
    if key != typed and key in known.groups:
        return f"{typed} is no group: write {key}={value or 'CHOICE'}"
    if key in known.keys:  # what is new is inside the value
        return f"{getattr(error.__cause__, 'full_key', key)} is no key yet: write ++{key}={value} to add it"
    return f"{key} is no key: {_instead(key, value, known) or HELP}"


def _instead(key: str, value: str, known: _Known) -> str | None:
    """What may be meant by a key that does not exist: what has its name elsewhere, or is spelt much like it."""
    dotted = key.replace("/", ".")
    parent, _, leaf = dotted.rpartition(".")
    if parent == "hydra.sweeper" and dotted in known.keys_of_searches:
        return f"it belongs to a search: add -m {SEARCH}, or another one"
    groups = [group for group in known.groups if value and f"{group}={value}" in known.all_choices]
    if close := nearest(key, groups) or (groups[0] if len(groups) == 1 else None):
        return f"did you mean {close}={value}?"
    if dotted != key:
        close = dotted if dotted in known.keys else nearest(key, known.groups)
        return f"did you mean {close}?" if close else f"the groups are {', '.join(known.groups)}"
    if others := known.choices_with(key):
        group = key.partition(".")[0]
        now = next((text for text in known.typed if text.startswith(f"{group}=")), f"the default of {group}")
        return f"{now} has none; {', '.join(f'{group}={other}' for other in others[:3])} has"
    beside = [name for name in known.names_in(parent) if name != leaf]
    if close := nearest(leaf, beside if parent else [*beside, *known.groups]):
        return f"did you mean {parent}.{close}?" if parent else f"did you mean {close}?"
    return _elsewhere(dotted, known) or (f"{parent} has {', '.join(beside)}" if parent and beside else None)


def _elsewhere(key: str, known: _Known) -> str | None:
    """Which keys in other places may be meant."""
    parent, _, leaf = key.rpartition(".")
    others = [each for each in known.keys if not key.startswith(f"{each}.")]
    if parent not in known.keys and (close := nearest(key, others)):
        return f"did you mean {close}?"
    if same := [each for each in others if each.rpartition(".")[2] == leaf and len(leaf) > 1]:
        return f"did you mean {' or '.join(same[:3])}?"
    searched = {each.rpartition(".")[2]: each for each in known.keys_of_searches}
    if close := nearest(leaf, searched):
        return f"did you mean {searched[close]}? It belongs to a search: add -m {SEARCH}, or another one"
    if parent in known.keys and not known.names_in(parent):
        return f"{parent} holds a value, no keys"
    leaves = {each.rpartition(".")[2]: each for each in others}
    if close := nearest(leaf, leaves):
        return f"did you mean {leaves[close]}?"
    brought = [(choice, each) for choice in sorted(known.all_choices) for each in known.keys_of(choice)]
    found = [
        f"{choice.partition('=')[0]}.{each} of {choice}" for choice, each in brought if each.split(".")[-1] == leaf
    ]
    return f"did you mean {' or '.join(found[:3])}?" if found else None


def _no_choice(error: MissingConfigException, known: _Known) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or [])
    where = re.match(r"In '(.*?)': ", str(error))
    file = f" (in {where[1]}.yaml)" if where and where[1] not in ("config", "hydra/config") else ""
    close = nearest(choice, options)
    meant = f"did you mean {group}={close}? " if close else ""
    return f"{group}={choice} is no choice{file}: {meant}{group} has {', '.join(options)}"


def _none_of_the_listed(known: _Known, error: BaseException, path: str) -> str:
    """A choice of a list that does not exist."""
    group, _, choice = path.rpartition("/")
    close = nearest(choice, known.choices(group))
    meant = f"did you mean {close}? " if close else ""
    return f"{group}=[…,{choice},…]: {choice} is no choice: {meant}{group} has {', '.join(known.choices(group))}"


def _no_text(known: _Known, error: BaseException, kind: str) -> str:
    """A group that is given a number, null or nothing."""
    for text in known.typed:
        key, _, value = text.lstrip("+").partition("=")
        if not key:
            return f"{text} names no key: write KEY=VALUE"
        group = key.partition("@")[0]
        if group not in known.groups or value in known.choices(group):
            continue
        optional = "take it out, or " if value == "null" and group in ("search", "experiment") else ""
        return f"{text} is no choice: {optional}give one of {', '.join(known.choices(group))}"
    return _short(error)


def _wrong_value(known: _Known, error: BaseException, typed: str) -> str:
    """A value that Hydra's own schema refuses."""
    key, _, value = typed.lstrip("+").partition("=")
    text = str(error.__cause__ or "is of another kind")
    for words, wanted in _WANTED.items():
        if words in text:
            return f"{key} must be {wanted}, got {value or repr('')}"
    return f"{typed}: {text.splitlines()[0]}"


_WANTED = {  # by what OmegaConf says, the first that fits
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "is not a valid bool": "true or false",
    "is not Optional": "something else",
    "to string": "text",
    "incompatible container types": "of another kind",
    "Cannot assign": "a group of keys",
    "object_type=dict": "a group of keys",
}


def _not_called(known: _Known, error: BaseException, target: str) -> str:
    package = target.partition(".")[0]
    if "whitelist because" in str(error) or "blacklisted" in str(error):
        return f"{target} may not be called by a config: it can run anything"
    return f"{target} is not for a config to call: code from outside is admitted by trust=[{package}]"


def _sweep_alone(known: _Known, error: BaseException, typed: str) -> str:
    key, _, values = typed.partition("=")
    remedy = f", or write {key}=[{values}] for a list" if re.fullmatch(r"[^()\[\]{}]*", values) else ""
    return f"{typed} is several values: add -m for a sweep over them{remedy}"


def _chosen_twice(known: _Known, error: BaseException, group: str) -> str:
    typed = next((text for text in known.typed if text.startswith(f"+{group}=")), None)
    return f"{typed or group}: {group} is chosen already, take the + out" if typed else f"{group} is chosen twice"


def _there_already(known: _Known, error: BaseException, key: str) -> str:
    return f"{key} is there already: take the + out"


def _no_folder(known: _Known, error: BaseException, folder: str) -> str:
    return f"--config-dir {folder}: there is no such folder"


def _no_config(known: _Known, error: BaseException, name: str) -> str:
    return f"--config-name {name}: there is no {name}.yaml beside config.yaml, nor in --config-dir"


def _no_primary(known: _Known, error: BaseException, folder: str) -> str:
    return f"--config-path {folder}: there is no such folder"


def _not_available(known: _Known, error: BaseException, path: str) -> str:
    return f"hydra.searchpath: {path} is no folder or package of YAMLs"


def _two_modes(known: _Known, error: BaseException) -> str:
    return "-m and hydra.mode=RUN contradict each other: drop one"


_TOLD: dict[str, Callable[..., str]] = {
    r"Could not override '(.*?)'\.": _no_key,
    r"Could not delete from config\. '(.*?)' does not exist": _no_key,
    r"Could not delete '(.*?)'\. No match": _no_key,
    r"config group '(.*?)' does not exist": _no_key,
    r"Config group override must be a string or a list\. Got (\w+)": _no_text,
    r"Error merging override (.*)": _wrong_value,
    r"Ambiguous value for argument '(.*?)'\n": _sweep_alone,
    r"Sweep parameters '(.*)' requires --multirun": _sweep_alone,
    r"(\S+) appears more than once in the final defaults list": _chosen_twice,
    r"Multiple values for (\S+)\.": _chosen_twice,
    r"An item is already at '(.*?)'": _there_already,
    r"(?:Logging t|T)arget '(.*?)'.* (?:is not in the Hydra|cannot be authorized|is blacklisted)": _not_called,
    r"Primary config directory not found.*config directory '(.*?)' exists": _no_primary,
    r"provider=.*?, path=(.*) is not available": _not_available,
    r"Running Hydra app with --multirun": _two_modes,
    r"In 'config': Could not load '(\w+/\w+)'": _none_of_the_listed,
    r"Additional config directory '(.*)' not found": _no_folder,
    r"Cannot find primary config '(.*?)'": _no_config,
}


def _unreadable(typed: str, text: str, known: _Known) -> str:
    """An override that Hydra's grammar does not take, with what it would take."""
    if inside := re.search(r"while evaluating '(.*?)': (.*?)\n", text, re.DOTALL):
        names = re.search(r"Available: (\S+)", text)
        called = inside[1].partition("(")[0]
        close = names and nearest(called, names[1].split(","))
        return f"{typed}: {inside[2]}{f': did you mean {close}(…)?' if close else ''}"
    key, equals, value = typed.partition("=")
    if not equals:
        flag = nearest(f"--{typed.lstrip('-')}", ["--help", "--multirun", "--cfg", "--info"]) if typed else None
        return f"{typed!r} is no setting: {f'did you mean {flag}?' if flag else 'write KEY=VALUE'}"
    if not _reads(f"{key}=1"):
        close = _instead(key.lstrip("+~"), value, known) if key.strip("+~") else None
        return f"{typed!r} is no setting, as {key!r} is no key: {close or 'write KEY=VALUE'}"
    if any(value.count(opened) != value.count(closed) for opened, closed in ("[]", "()", "{}")):
        return f"{typed} cannot be read: a bracket is not closed, or not opened; text is quoted, as in '{key}=\"…\"'"
    quoted = f'{key}="{value}"'
    if '"' not in value and "\\" not in value and _reads(quoted):
        return f"{typed} cannot be read: quote the value if it is meant as text, as in '{quoted}'"
    return f"{typed} cannot be read: a quote is not closed, or a character would have to be quoted"


def _reads(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except Exception:  # whatever the grammar raises
        return False
    return True
