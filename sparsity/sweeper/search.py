"""A search that resumes: hydra-optuna-sweeper's, with trials that are owned, counted and run again.

Beyond the stock sweeper: `n_trials` is a total; a trial whose process was killed is closed and its point run again, in
the same folder; no point is proposed twice; a member that fails does not end the search; every mistake is one line.
What a study says of its trials is believed no further than it can be checked: others may write into a shared one.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import optuna
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, Trial, TrialState

from sparsity import config as schema
from sparsity.errors import ConfigError, DivergedError, SparsityError, reason
from sparsity.processes import is_gone, this_process
from sparsity.results.sealed import is_finished
from sparsity.sweeper.space import (
    Place,
    Space,
    Unrepeated,
    check_one_range,
    ends,
    fits,
    parsed,
    place,
    shown,
    size,
    whole_numbers,
)
from sparsity.sweeper.storage import file_of, mend, storage_of

log = logging.getLogger("sparsity")

SAMPLERS = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")  # what a YAML may name as one
MISTAKES_IN_A_ROW = 3  # members that fail by the user's mistake before the search ends: all others would
REMEDY = "give sqlite:///FILE, journal:///FILE, or the URL of a database that runs"  # for a storage
EXAMPLES = {"budget.compression": "tag(log,interval(10,300))", "budget.macs_reduction": "tag(log,interval(2,30))"}
EXAMPLES |= dict.fromkeys(("budget.nonzero", "budget.macs"), "range(1000,20000,1000)")
EXAMPLES |= {"sensitivity": "interval(0.1,1)"}  # of ranges, the last one where no budget is typed
TRIES = 4  # to open a database whose tables another process may just be making
FOLDER = re.compile(r"0|[1-9][0-9]{0,8}")  # the name of a member's folder: a number


class Search(OptunaSweeperImpl):
    """Asks Optuna for members, has them launched, and tells it what they came to."""

    def __init__(self, *, sampler: DictConfig, **settings: Any):
        super().__init__(None, **settings)
        self.sampler_config = sampler
        self.failures: list[str] = []
        self.mistakes = 0  # in a row

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what the search works with."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    def sweep(self, arguments: list[str]) -> None:
        """Searches until n_trials members are finished, or all points are; raises at the end if some failed."""
        self._check_numbers()
        space, fixed, deletions = self._space(arguments)
        self._try(space, fixed, deletions)
        with self._telling_what_fails():
            study = self._open(space, fixed)
            self._say_where_it_is(study)
            self._restore(study, space, fixed, deletions)
            while batch := self._ask(study, space, fixed, deletions):
                self._launch(study, *batch)
            self._say_if_all_is_run(study, space)
            self._write(study)
        if self.failures:
            raise SparsityError(f"{len(self.failures)} of {_finished(study)} members failed; {self.failures[-1]}")

    @contextlib.contextmanager
    def _telling_what_fails(self) -> Iterator[None]:
        """Turns what a storage or a disk refuses into one line."""
        try:
            yield
        except (optuna.exceptions.StorageInternalError, json.JSONDecodeError, OSError) as error:
            cause = reason(error.__cause__ or error)
            raise ConfigError(
                f"hydra.sweeper.storage={self.storage} or hydra.sweep.dir cannot be written ({cause}): mend that, and "
                "the same command resumes"
            ) from error

    def _launch(self, study: optuna.Study, trials: list[Trial], overrides: list[list[str]]) -> None:
        """Has a batch of members run, and tells the study what they came to."""
        for trial, job in zip(trials, self._run(trials, overrides)):
            self._tell(study, trial, job)
        self._check_failures(study)

    def _run(self, trials: Sequence[Trial | FrozenTrial], overrides: list[list[str]]) -> Sequence[JobReturn]:
        """What the launcher makes of a batch of members, each in its trial's folder."""
        folders = [trial.user_attrs["folder"] for trial in trials]
        placed = [[*own, *self._folder(name)] for own, name in zip(overrides, folders)]
        return self.launcher.launch(placed, initial_job_idx=int(folders[0]))

    def _restore(self, study: optuna.Study, space: Space, fixed: Mapping[str, str], deletions: Sequence[str]) -> None:
        """Runs finished members whose results are gone again, where the sweep's folder is another, or emptied."""
        gone = self._without_result(study, space)
        if gone:
            log.info(
                f"{len(gone)} finished members have no result in {self.config.hydra.sweep.dir}: they are run again"
            )
        for start in range(0, len(gone), self.n_jobs):
            batch = gone[start : start + self.n_jobs]
            overrides = [_overrides({**fixed, **trial.params}, deletions) for trial in batch]
            for trial, job in zip(batch, self._run(batch, overrides)):
                _, cause = self._values(job)
                if cause is not None:
                    self._note(trial, cause)

    def _without_result(self, study: optuna.Study, space: Space) -> list[FrozenTrial]:
        """The completed trials of this search whose folder, by its number, holds no result."""
        if not self._is_numbered():
            return []
        complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        extends = self.custom_search_space_extender is not None
        own = [trial for trial in complete if _folder_of(trial) and (extends or fits(space, trial.params))]
        return [trial for trial in own if not is_finished(Path(self.config.hydra.sweep.dir) / _folder_of(trial))]

    # --- the space ---------------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        for name in ("n_trials", "n_jobs"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"hydra.sweeper.{name} must be a whole number ≥ 1, got {number}")
        if not isinstance(self.storage, str | None):
            raise ConfigError(f"hydra.sweeper.storage must be the URL of a storage, got {self.storage}: {REMEDY}")

    def _space(self, arguments: Sequence[str]) -> tuple[Space, dict[str, str], list[str]]:
        """The ranges, the fixed overrides and the deletions; the command line wins over the YAMLs."""
        given = [*self._parse_sweeper_params_config(), *arguments]
        named = {text.lstrip("+").partition("=")[0] for text in given}
        ranges = schema.search_ranges(self.config)
        check_one_range(ranges, given)
        texts = [f"{key}={text}" for key, text in ranges.items() if key not in named] + given
        space: Space = {}
        fixed: dict[str, str] = {}
        deletions: list[str] = []
        for text in texts:
            ranged, single, deleted = parsed(text)
            for key in (*ranged, *single):
                space.pop(key, None), fixed.pop(key, None)  # the last one counts
            space, fixed, deletions = space | ranged, fixed | single, deletions + deleted
        if not space:
            search = self.config.hydra.runtime.choices.get("search")
            such = next((key for key in EXAMPLES if key in fixed), "sensitivity")
            raise ConfigError(f"search={search} has nothing to search: give a range, such as '{such}={EXAMPLES[such]}'")
        return dict(sorted(space.items())), fixed, deletions

    def _try(self, space: Space, fixed: Mapping[str, str], deletions: Sequence[str]) -> None:
        """Refuses a space whose ends make no valid run, or make no use of a range, before a study is made for it."""
        idle = set(space)
        for end in (0, -1):
            point = {key: ends(distribution)[end] for key, distribution in space.items()} | fixed
            try:
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, _overrides(point, deletions))
            except HydraException as error:
                raise ConfigError(schema.said(error)) from error
            choices = composed.hydra.runtime.choices
            if not self._is_numbered():
                schema.folder_of_member(composed.hydra, 0)
            with open_dict(composed):
                del composed["hydra"]
            try:
                typed = [*schema.typed_in(self.config.hydra), *_overrides(point, deletions)]
                schema.read(composed, trust=schema.admitted([]), choices=choices, typed=typed)
            except ConfigError as error:
                remedy = whole_numbers(space, str(error))
                raise (ConfigError(f"{error}: give {remedy}") if remedy else error) from error
            idle = schema.unread(composed, idle)
        if idle and not {"recipe", "stages"} & space.keys():
            raise ConfigError(f"{min(idle)} is searched, and no stage reads it: drop it, or list a stage that does")

    # --- the study ---------------------------------------------------------------------------------------------------

    def _open(self, space: Space, fixed: Mapping[str, str]) -> optuna.Study:
        """The study of this search: a new one, or the one that an earlier start made."""
        asked = {
            "objectives": list(self.config.objectives),
            "space": {key: distribution_to_json(distribution) for key, distribution in space.items()},
            "config": schema.sweep_name(self.config),
        }
        try:
            with self._alone():  # the tables of a new database are made without a lock
                study = self._created(self.study_name or asked["config"])
                _check_same(study, asked, self.storage)
                if study.user_attrs.get("asked") != asked:
                    study.set_user_attr("asked", asked)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(asked["objectives"])  # what a dashboard shows
        except ConfigError:
            raise
        except Exception as error:  # each database refuses in its own way
            is_missing = isinstance(error, ImportError)
            remedy = "install its driver, as pip install -e '.[postgresql]' does" if is_missing else REMEDY
            raise ConfigError(
                f"hydra.sweeper.storage={self.storage} cannot be opened ({reason(error)}): {remedy}"
            ) from error
        return study

    def _created(self, name: str) -> optuna.Study:
        """The study of a name; of two machines that ask a new server for it at once, one may be refused at first."""
        create = functools.partial(
            optuna.create_study, study_name=name, directions=self._get_directions(), load_if_exists=True
        )
        file = file_of(self.storage)
        for tried in itertools.count(1):
            try:
                return create(storage=storage_of(self.storage))
            except (ValueError, KeyError, AssertionError):
                if not str(self.storage).startswith("journal:") or not file.is_file() or not mend(file):
                    raise
            except (optuna.exceptions.StorageInternalError, optuna.exceptions.DuplicatedStudyError):
                if tried == TRIES or file is not None:
                    raise
                time.sleep(tried / 10)

    def _say_where_it_is(self, study: optuna.Study) -> None:
        before = _finished(study)
        where = f"study {study.study_name} in {self.storage}"
        if before >= self.n_trials:
            return
        log.info(f"{where}: {before} of {self.n_trials} members are finished")
        named = [f"hydra.sweeper.sampler.{key}" for key in ("n_startup_trials", "population_size")]
        for key in named:
            first = self.sampler_config.get(key.rpartition(".")[2])
            if isinstance(first, int) and before < first:
                log.info(
                    f"points are random until {first} members are finished ({key}={first}), which the sampler learns "
                    f"from: {'all' if self.n_trials <= first else f'the next {first - before}'} of this search"
                )
                return

    def _say_if_all_is_run(self, study: optuna.Study, space: Space) -> None:
        finished = _finished(study)
        if finished < self.n_trials and self._left(study, space) < 1:
            log.info(f"all {size(space):g} points of the search are run: {finished} members instead of {self.n_trials}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Held while trials are asked for, so that a running trial without an owner can only be an orphan."""
        file = file_of(self.storage) or Path(self.config.hydra.sweep.dir) / "search"
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_name(f".{file.name}.lock")):
            yield

    def _ask(
        self, study: optuna.Study, space: Space, fixed: dict[str, str], deletions: list[str]
    ) -> tuple[list[Trial], list[list[str]]] | None:
        """The next batch: its trials and each one's overrides; None when all are finished or being run."""
        with self._alone():
            _close_orphans(study)
            wanted = min(self.n_jobs, self.n_trials - _finished(study) - _running(study))
            if wanted < 1:
                return None
            study.sampler = self._sampler(len(study.get_trials(deepcopy=False)), space)
            trials = []
            while len(trials) < wanted and (_waiting(study) or self._left(study, space) >= 1):
                trial = study.ask()
                trial.set_user_attr("owner", this_process())
                trial.set_user_attr("folder", _own_folder(study, trial))
                if self._is_suggested(study, trial, space):
                    trials.append(trial)
        return (trials, [_overrides({**fixed, **trial.params}, deletions) for trial in trials]) if trials else None

    def _is_suggested(self, study: optuna.Study, trial: Trial, space: Space) -> bool:
        """Gives a trial its point; not where that lies outside the space, or is run already."""
        extends = self.custom_search_space_extender is not None
        given = study._storage.get_trial_system_attrs(trial._trial_id).get("fixed_params", {})
        if extends or fits(space, given):
            for key, distribution in space.items():
                trial._suggest(key, distribution)
            if extends:
                self.custom_search_space_extender(self.config, trial)
            if extends or place(space, trial.params) not in _run(space, study, trial.number):
                return True
        if given:
            log.warning(
                f"warning: a queued point of {study.study_name} is run already, or not of this search: left out"
            )
        _drop(study, trial)
        return False

    def _left(self, study: optuna.Study, space: Space) -> float:
        """How many points of the space nobody was given yet."""
        extends = self.custom_search_space_extender is not None
        total = size(space)
        return total if extends or total == float("inf") else total - len(_taken(space, study))

    def _is_numbered(self) -> bool:
        """Whether the folders of members are numbered, and not named by the user."""
        return schema.is_numbered(self.config)

    def _folder(self, name: str) -> list[str]:
        """The override that puts a job into its trial's folder; none where the user names folders."""
        quoted = QuotedString(name, Quote.double).with_quotes()
        return [f"hydra.sweep.subdir={quoted}"] if self._is_numbered() else []

    def _sampler(self, num_trials: int, space: Space) -> optuna.samplers.BaseSampler:
        """The sampler, seeded anew for every batch: one that starts again would draw its first points again."""
        settings = OmegaConf.to_container(self.sampler_config, resolve=True)
        counts_itself = settings["_target_"].endswith("QMCSampler")  # and must go on with the same sequence
        if settings.get("seed") is not None and not counts_itself:
            text = f"{settings['seed']}/{num_trials}"
            settings["seed"] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = instantiate(settings, _execution_whitelist_=SAMPLERS)
        except Exception as error:  # each sampler refuses its settings in its own way
            raise ConfigError(f"hydra.sweeper.sampler cannot be made: {reason(error.__cause__ or error)}") from error
        if not isinstance(sampler, optuna.samplers.BaseSampler):
            raise ConfigError("hydra/sweeper/sampler=grid needs no search: list the values, without search=…")
        if self.custom_search_space_extender is not None:
            return sampler
        return Unrepeated(sampler, space, lambda study, trial: _taken(space, study, but=trial.number))

    # --- what came out -----------------------------------------------------------------------------------------------

    def _tell(self, study: optuna.Study, trial: Trial, job: JobReturn) -> None:
        """Tells the study what a member came to; a failure is kept with its cause."""
        values, cause = self._values(job)
        if cause is None:
            self.mistakes = 0
            study.tell(trial, values)
            return
        error = job._return_value if job.status is JobStatus.FAILED else None
        is_mistake = isinstance(error, SparsityError) and not isinstance(error, DivergedError)
        self.mistakes = self.mistakes + 1 if is_mistake else 0
        none_works = not any(other.state is TrialState.COMPLETE for other in study.get_trials(deepcopy=False))
        if is_mistake and (none_works or self.mistakes == MISTAKES_IN_A_ROW):
            _close(study, trial._trial_id)
            raise error
        trial.set_user_attr("error", cause)
        study.tell(trial, state=TrialState.FAIL)
        self._note(trial, cause)

    def _note(self, trial: Trial | FrozenTrial, cause: str) -> None:
        """Keeps why a member failed, for the end."""
        self.failures.append(f"member {trial.user_attrs['folder']}: {cause}")
        log.error(f"member {trial.user_attrs['folder']} failed: {cause}")

    def _values(self, job: JobReturn) -> tuple[list[float], str | None]:
        """A member's objectives, or why it has none."""
        if job.status is JobStatus.FAILED:
            error = job._return_value
            own = isinstance(error, SparsityError)
            return [], reason(error) if own else f"{type(error).__name__}: {reason(error)}"
        values = [float(value) for value in job.return_value]
        lacking = [name for name, value in zip(self.config.objectives, values) if value != value]
        return values, f"{', '.join(lacking)} has no value: nothing is left of the network" if lacking else None

    def _check_failures(self, study: optuna.Study) -> None:
        rate = len(self.failures) / max(1, _finished(study))
        if rate > self.max_failure_rate:
            raise SparsityError(
                f"{len(self.failures)} members failed, more than hydra.sweeper.max_failure_rate="
                f"{self.max_failure_rate:g}; {self.failures[-1]}"
            )

    def _write(self, study: optuna.Study) -> None:
        """`optimization_results.yaml`, as the stock sweeper leaves it."""
        front = [] if not _has_complete(study) else study.best_trials
        found = {"name": "optuna", "solutions": [{"params": trial.params, "values": trial.values} for trial in front]}
        OmegaConf.save(OmegaConf.create(found), Path(self.config.hydra.sweep.dir) / "optimization_results.yaml")


def _overrides(point: Mapping[str, Any], deletions: Sequence[str]) -> list[str]:
    return [*(f"{key}={value}" for key, value in point.items()), *deletions]


def _check_same(study: optuna.Study, asked: Mapping[str, Any], storage: str | None) -> None:
    """Refuses a study that was made for another search."""
    made = study.user_attrs.get("asked")
    if made is None and not study.get_trials(deepcopy=False):
        return
    remedy = "give another hydra.sweeper.study_name, or ask for what it was made for"
    name = f"study {study.study_name} in {storage}"
    if not isinstance(made, dict) or made.keys() != asked.keys() or not isinstance(made["space"], dict):
        raise ConfigError(f"{name} was made by another program: {remedy}")
    if made["objectives"] != asked["objectives"]:
        raise ConfigError(f"{name} has objectives={made['objectives']}, asked are {asked['objectives']}: {remedy}")
    for key in sorted(made["space"].keys() | asked["space"].keys()):
        there, here = made["space"].get(key), asked["space"].get(key)
        if there != here:
            raise ConfigError(f"{name} searches {key} in {shown(there)}, asked is {shown(here)}: {remedy}")
    if made["config"] != asked["config"]:
        raise ConfigError(f"{name} was made for {made['config']}, this is {asked['config']}: {remedy}")


# --- trials and their owners -----------------------------------------------------------------------------------------


def _folder_of(trial: FrozenTrial | Trial) -> str | None:
    """The name of a member's folder, a number; None where a study says anything else, which may lie anywhere."""
    name = trial.user_attrs.get("folder")
    return name if isinstance(name, str) and FOLDER.fullmatch(name) else None


def _own_folder(study: optuna.Study, trial: Trial) -> str:
    """The folder of a trial: its own where it is run again, unless another has it; else a new one."""
    own = _folder_of(trial)
    others = study.get_trials(deepcopy=False)
    taken = {_folder_of(each) for each in others if each.number != trial.number and not each.user_attrs.get("orphan")}
    return own if own is not None and own not in taken else _next_folder(study)


def _next_folder(study: optuna.Study) -> str:
    """The name of a new member's folder: the first number that no other member's has."""
    others = study.get_trials(deepcopy=False)
    taken = {_folder_of(other) for other in others if not (other.user_attrs.get("orphan") and not _point(other))}
    return next(name for name in map(str, itertools.count()) if name not in taken)


def _point(trial: FrozenTrial) -> dict[str, Any]:
    """What is known of a trial's point: a process may end before it suggests all, or any, of it."""
    given = trial.system_attrs.get("fixed_params", {})
    return {**(given if isinstance(given, dict) else {}), **trial.params}


def _taken(space: Space, study: optuna.Study, but: int | None = None) -> set[Place]:
    """The places of all points that were proposed, or queued; but: the trial of this number."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.number != but]
    return {place(space, _point(trial)) for trial in trials} - {None}


def _run(space: Space, study: optuna.Study, number: int) -> set[Place]:
    """The places of all points that are finished, or run by trials before that of a number."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.number != number]
    own = [each for each in trials if _counts(each) or (each.state is TrialState.RUNNING and each.number < number)]
    return {place(space, trial.params) for trial in own} - {None}


def _close_orphans(study: optuna.Study) -> None:
    """Closes running trials whose owner is gone, and queues their points to be run again in the same folders."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        owner = trial.user_attrs.get("owner")
        if is_gone(owner):
            _close(study, trial._trial_id)
            log.info(f"member {_folder_of(trial) or trial.number} was cut off: it is run again")


def _close(study: optuna.Study, trial_id: int) -> None:
    """Ends a trial that does not count, its point queued first, so that it is not lost between the two."""
    trial = study._storage.get_trial(trial_id)
    queued = any(other.user_attrs.get("retry_of") == trial.number for other in study.get_trials(deepcopy=False))
    if _point(trial) and not queued:
        again = {"retry_of": trial.number, "folder": _folder_of(trial) or _next_folder(study)}
        study.enqueue_trial(_point(trial), user_attrs=again)
    study._storage.set_trial_user_attr(trial_id, "orphan", True)
    study.tell(trial.number, state=TrialState.FAIL)


def _drop(study: optuna.Study, trial: Trial) -> None:
    """Ends a trial whose point is of no use, and which does not count."""
    study._storage.set_trial_user_attr(trial._trial_id, "orphan", True)
    study.tell(trial, state=TrialState.FAIL)


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is finished: completed, or failed by itself."""
    return trial.state is TrialState.COMPLETE or (trial.state is TrialState.FAIL and not trial.user_attrs.get("orphan"))


def _finished(study: optuna.Study) -> int:
    return sum(_counts(trial) for trial in study.get_trials(deepcopy=False))


def _running(study: optuna.Study) -> int:
    """The number of trials that other processes run."""
    return len(study.get_trials(deepcopy=False, states=[TrialState.RUNNING]))


def _waiting(study: optuna.Study) -> bool:
    """Whether points are queued."""
    return bool(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))


def _has_complete(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
