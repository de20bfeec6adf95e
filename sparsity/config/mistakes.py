"""What Hydra, OmegaConf and YAML say of a mistake, as one line: what is wrong, and what exists in its place."""

import re
import types
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

from sparsity.errors import SparsityError, nearest

HELP = "python main.py --help lists all"
SEARCH = "search=pareto"  # brings the keys that all searches have


def mistake(error: BaseException, typed: Sequence[str] = ()) -> str | None:
    """What a user did wrong, in one line; None for an error of a job, or of this program.

    typed: the overrides of the command line.
    """
    if isinstance(error, SparsityError):
        return str(error)
    modules = [frame.f_globals.get("__name__", "") for frame in _frames(error)]
    ours = [name for name in modules if name.startswith("sparsity.") and not name.startswith("sparsity.config")]
    is_of_job = utils._job_traceback(error.__traceback__) or any("sparsity.experiment" in name for name in ours)
    if is_of_job or (ours and not isinstance(error, HydraException | OmegaConfBaseException)):
        return None
    return said(error, typed)


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
    file = _file_of(error)
    line = _short(error)
    return f"{file}: {line}" if file and file not in line else line


def _short(error: BaseException) -> str:
    """An error's text without Hydra's advice, and what caused it."""
    kept = [line for line in str(error).splitlines() if not line.startswith(_ADVICE)]
    text = " ".join(" ".join(kept).split()) or (type(error).__name__ if not error.__cause__ else "")
    cause = next(iter(str(error.__cause__ or "").splitlines()), "")
    return " ".join(f"{text} {cause if cause not in text else ''}".split())


_ADVICE = ("See https://", "To append to your", "Alias expansion", "    full_key:", "    object_type=", "full_key:")


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

        from sparsity.config.composing import folder_of_yamls

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
    def chosen(self) -> list[str]:
        """The overrides of the command line that choose something that exists."""
        pairs = [text.partition("=") for text in self.typed]
        return [
            f"{group}={choice}" for group, _, choice in pairs if group in self.groups and choice in self.choices(group)
        ]

    @cached_property
    def keys(self) -> list[str]:
        """The keys of the config as it is without what cannot be composed, innermost and outer ones."""
        return self._compose(self.chosen) or self._compose([])

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
        """The other choices of a key's group that have the key."""
        group, _, inner = key.partition(".")
        if not inner or group not in self.groups:
            return []
        return [choice for choice in self.choices(group) if inner in self._keys_in(group, choice)]

    def _keys_in(self, group: str, choice: str) -> list[str]:
        try:
            config = self.loader.repository.load_config(f"{group}/{choice}").config
            return list(_keys_of(OmegaConf.to_container(config, resolve=False)))
        except Exception:  # a YAML that is broken is told of when it is chosen
            return []


def _keys_of(node: Any, before: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, inner in node.items():
            yield f"{before}{name}"
            yield from _keys_of(inner, f"{before}{name}.")


# --- what is said ----------------------------------------------------------------------------------------------------


def _no_key(known: _Known, error: BaseException, typed: str) -> str:
    """A key or group that does not exist, and the nearest that does."""
    bare = typed.lstrip("+~").partition("@")[0]
    value = next((text.partition("=")[2] for text in known.typed if text.lstrip("+~").startswith(f"{typed}=")), "")
    if bare != typed and bare in known.groups:
        return f"{typed} is no group: write {bare}={value or 'CHOICE'}"
    close = _nearest_key(bare, value, known)
    if close:
        return f"{bare} is no key: {close}"
    parent = bare.rpartition(".")[0]
    beside = [key.removeprefix(f"{parent}.") for key in known.keys if key.startswith(f"{parent}.")]
    beside = [name for name in beside if "." not in name]
    if parent and beside:
        return f"{bare} is no key: {parent} has {', '.join(beside)}"
    if parent in known.keys:
        return f"{bare} is no key: {parent} is no group of keys"
    return f"{bare} is no key: {HELP}"


def _nearest_key(key: str, value: str, known: _Known) -> str | None:
    """Which key may be meant: of that name elsewhere, or spelt much like it."""
    dotted = key.replace("/", ".")
    leaf = dotted.rpartition(".")[2]
    if dotted != key and dotted in known.keys:
        return f"did you mean {dotted}?"
    if value and (groups := [group for group in known.groups if value in known.choices(group)]):
        close = nearest(key, groups)
        if close:
            return f"did you mean {close}={value}?"
    group = key.partition(".")[0]
    if others := known.choices_with(dotted):
        now = next((text for text in known.chosen if text.startswith(f"{group}=")), f"the default of {group}")
        return f"{now} has none, " + " and ".join(f"{group}={other}" for other in others[:3]) + " do"
    same = [each for each in known.keys if each.rpartition(".")[2] == leaf and each != dotted]
    if close := nearest(dotted, [*known.keys, *known.groups]):
        return f"did you mean {close}?"
    if same and len(leaf) > 1:
        return f"did you mean {' or '.join(same[:3])}?"
    searched = [each for each in known.keys_of_searches if each.rpartition(".")[2] == leaf]
    if close := next(iter(searched), nearest(dotted, known.keys_of_searches)):
        return f"did you mean {close}, which needs {SEARCH} or another search?"
    parent, _, _ = dotted.rpartition(".")
    inner = {each.rpartition(".")[2]: each for each in known.keys if not parent or each.startswith(f"{parent}.")}
    close = nearest(leaf, inner)
    return f"did you mean {inner[close]}?" if close else None


def _no_choice(error: MissingConfigException, known: _Known) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or [])
    where = re.match(r"In '(.*?)': ", str(error))
    file = f" (in {where[1]}.yaml)" if where and where[1] not in ("config", "hydra/config") else ""
    close = nearest(choice, options)
    meant = f"did you mean {group}={close}? " if close else ""
    return f"{group}={choice} is no choice{file}: {meant}{group} has {', '.join(options)}"


def _no_text(known: _Known, error: BaseException, kind: str) -> str:
    """A group that is given a number, null or nothing."""
    for text in known.typed:
        key, _, value = text.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if group not in known.groups or value in known.choices(group):
            continue
        optional = "take it out, or " if value == "null" and group in ("search", "experiment") else ""
        return f"{text} is no choice: {optional}give one of {', '.join(known.choices(group))}"
    return f"{' '.join(known.typed)}: {_short(error)}" if known.typed else _short(error)


def _wrong_value(known: _Known, error: BaseException, typed: str) -> str:
    """A value that Hydra's own schema refuses."""
    key, _, value = typed.lstrip("+").partition("=")
    cause = next(iter(str(error.__cause__ or "").splitlines()), "is of the wrong kind")
    for words, wanted in _WANTED.items():
        if words in cause:
            return f"{key} must be {wanted}, got {value or repr('')}"
    return f"{typed}: {cause}"


_WANTED = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "is not a valid bool": "true or false",
    "is not Optional": "something else than null",
    "to Dict[": "a group of keys",
    "to string": "text",
    "Cannot assign": "a group of keys",
    "incompatible container types": "of the kind that it is",
    "index out of range": "in the list, whose end it is beyond",
}


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


def _told_by(known: _Known, error: BaseException, *groups: str) -> str:
    return _short(error)


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
        close = _nearest_key(key.lstrip("+~"), value, known)
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
