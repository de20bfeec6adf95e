"""The space of a search: the ranges of its keys, and a sampler that proposes no point of it twice."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optuna
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from sparsity.config import RULE
from sparsity.errors import ConfigError, reason

Space = dict[str, BaseDistribution]
Point = Mapping[str, Any]
Place = tuple[Any, ...]  # of a point: equal for points that are one

DRAWS = 4  # of a sampler that repeats itself, before a random point is taken
RANDOM_DRAWS = 1000  # before what is left of a space is counted out


def parsed(text: str) -> tuple[Space, dict[str, str], list[str]]:
    """One override as a range, a fixed value or a deletion."""
    key, _, value = text.partition("=")
    try:
        space, fixed, deletions = create_params_from_overrides([text])
    except HydraException:
        raise
    except Exception as error:  # Optuna and Hydra refuse ranges in many ways
        raise ConfigError(f"{key}={value} is no range to search: {reason(error)}") from error
    for name, distribution in space.items():
        if size({name: distribution}) == 1:
            only = ends(distribution)[0]
            raise ConfigError(f"{name}={value} holds one value only: give {name}={only}, or a wider range")
    return space, fixed, deletions


def ends(distribution: BaseDistribution) -> tuple[Any, Any]:
    """The first and the last value of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0], distribution.choices[-1]
    return distribution.low, distribution.high


def check_one_range(ranges: Mapping[str, str], given: Sequence[str]) -> None:
    """Refuses a search over regularizers, or rules, whose numbers have ranges of their own."""
    named = {text.partition("=")[0] for text in given}
    swept = {text.partition("=")[0] for text in given if parsed(text)[0]}
    for key in ranges:
        group = RULE if key == "sensitivity" else key.partition(".")[0]
        if group in swept and key not in named:
            raise ConfigError(
                f"{group} is searched, and each of its choices has a range of its own for {key}: give one for all, "
                f"such as '{key}={ranges[key]}'"
            )


def whole_numbers(space: Space, refusal: str) -> str | None:
    """How a range draws whole numbers, where a refusal says that its key takes nothing else."""
    key = refusal.partition(" ")[0]
    distribution = space.get(key)
    if distribution is None or "must be a whole number" not in refusal or not hasattr(distribution, "low"):
        return None
    low, high = math.ceil(distribution.low), math.floor(distribution.high)
    if distribution.log:
        return f"'{key}=tag(log,int(interval({low},{high})))'"
    return f"'{key}=range({low},{high + 1})' or '{key}=int(interval({low},{high}))'"


def shown(distribution: str | None) -> str:
    """A range that a study keeps, as it is typed."""
    if distribution is None:
        return "no range"
    found = optuna.distributions.json_to_distribution(distribution)
    if isinstance(found, CategoricalDistribution):
        return ",".join(map(str, found.choices))
    interval = f"interval({found.low:g}, {found.high:g})"
    return f"tag(log, {interval})" if found.log else interval


# --- points ----------------------------------------------------------------------------------------------------------


def size(space: Space) -> float:
    """How many points a space has; infinite where a range is continuous."""
    return math.prod(_size(distribution) for distribution in space.values())


def _size(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len({_place(distribution, choice) for choice in distribution.choices})
    if distribution.low == distribution.high:
        return 1
    if distribution.step is None:
        return math.inf
    return round((distribution.high - distribution.low) / distribution.step) + 1


def fits(space: Space, point: Point) -> bool:
    """Whether a point, which may be of some keys only, lies in a space."""
    try:
        return all(
            key in space and space[key]._contains(space[key].to_internal_repr(value)) for key, value in point.items()
        )
    except (ValueError, TypeError):
        return False


def place(space: Space, point: Point) -> Place | None:
    """Where a point lies in a space, such that equal points are told; None for no whole point of it."""
    own = {key: point[key] for key in space if key in point}
    if len(own) < len(space) or not fits(space, own):
        return None
    return tuple(_place(distribution, point[key]) for key, distribution in space.items())


def _place(distribution: BaseDistribution, value: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):  # 0.3,0.30 is one choice
        return next(index for index, choice in enumerate(distribution.choices) if choice == value)
    return value if distribution.step is None else round((value - distribution.low) / distribution.step)


def _values(distribution: BaseDistribution) -> Iterable[Any]:
    """All values of a range that is not continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    low, high, step = distribution.low, distribution.high, distribution.step
    return (min(low + index * step, high) for index in range(int(_size(distribution))))


class Unrepeated(optuna.samplers.BaseSampler):
    """Draws a sampler's points, and draws again what was proposed before: by itself, by any process, or as given."""

    def __init__(
        self,
        sampler: optuna.samplers.BaseSampler,
        space: Space,
        taken: Callable[[optuna.Study, FrozenTrial], set[Place]],
    ):
        """taken: the places of all points of a study but one trial's."""
        self.sampler, self.space, self.taken = sampler, space, taken

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """The whole space: a point is drawn as one."""
        return dict(self.space)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """A point that nobody was given before; where all are, the sampler's."""
        fixed = trial.system_attrs.get("fixed_params", {})
        if self.space.keys() <= fixed.keys():
            return {}
        taken = self.taken(study, trial)
        draws = (self._draw(study, trial, fixed) for _ in range(DRAWS))
        own = next(draws)
        for point in itertools.chain([own], draws, self._others(study, trial, fixed)):
            if place(self.space, {**point, **fixed}) not in taken:
                return point
        return own

    def _draw(self, study: optuna.Study, trial: FrozenTrial, fixed: Point) -> dict[str, Any]:
        """The sampler's own point, drawn as Optuna draws one."""
        inferred = self.sampler.infer_relative_search_space(study, trial)
        together = self.sampler.sample_relative(study, trial, inferred)
        point = {}
        for key, distribution in self.space.items():
            if key in together and fits(self.space, {key: together[key]}):
                point[key] = together[key]
            elif key not in fixed:
                point[key] = self.sampler.sample_independent(study, trial, key, distribution)
        return point

    def _others(self, study: optuna.Study, trial: FrozenTrial, fixed: Point) -> Iterable[dict[str, Any]]:
        """Random points, and at last all that there are."""
        random = optuna.samplers.RandomSampler(seed=trial.number)
        free = {key: distribution for key, distribution in self.space.items() if key not in fixed}
        for _ in range(RANDOM_DRAWS):
            yield {key: random.sample_independent(study, trial, key, each) for key, each in free.items()}
        if math.isfinite(size(free)):
            yield from (dict(zip(free, values)) for values in itertools.product(*map(_values, free.values())))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value of a key that is not of the space."""
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """What the sampler does before a trial."""
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        """What the sampler does after a trial."""
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """What the sampler does before it draws elsewhere."""
        self.sampler.reseed_rng()
