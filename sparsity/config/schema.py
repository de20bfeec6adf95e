"""The settings of a run, as checked dataclasses: their annotations are what `typed` checks."""

import typing
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from sparsity.front import OBJECTIVES
from sparsity.kinds import NonNegative, Positive, PositiveCount, Range, Seed
from sparsity.limits import Budget
from sparsity.nodes import (
    Augment,
    Average,
    Call,
    Export,
    Loader,
    Loss,
    Model,
    Optimizer,
    Quantizer,
    Regularizer,
    Rule,
    StageSchedule,
    Track,
)

Objectives = list[Literal[tuple(OBJECTIVES)]]


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of pixels in [0, 1], one number or one a channel."""

    mean: list[float]
    std: list[Positive]


@dataclass(frozen=True)
class Data:
    """The data set, and what is held out for validation."""

    loader: Loader
    validation: NonNegative
    validation_seed: Seed
    normalize: Normalization | None
    root: str | None = None


@dataclass(frozen=True)
class Schedule:
    """The numbers of the training stages."""

    batch_size: PositiveCount
    others: dict[str, StageSchedule] = field(metadata={"others": True})  # each under the name that stages read it by


@dataclass(frozen=True)
class Tracks:
    """The programs that follow a run."""

    others: dict[str, Track] = field(metadata={"others": True})  # each under its name


@dataclass(frozen=True)
class Exports:
    """The forms in which the network is handed to other programs."""

    others: dict[str, Export] = field(metadata={"others": True})  # each under its name


@dataclass(frozen=True)
class Ramp:
    """How the strength of a rule rises from round to round, to the number that is asked for in the last."""

    curve: Literal["constant", "linear", "geometric", "cubic"]
    start: float | None = field(metadata={"typed": "from"})  # a word that Python takes for itself


@dataclass(frozen=True)
class Stage:
    """One stage of a run, as its recipe resolves it."""

    name: str  # unlike those of all other stages of the run: prune, prune-2, …
    node: str  # its name in the recipe
    call: Call
    sources: dict[str, str]  # of its arguments that are read from elsewhere: the key that each is typed by
    round: int | None = None  # of a repeated one, from 1


@dataclass(frozen=True)
class Run:
    """One run of the pipeline."""

    model: Model
    data: Data
    reg: Regularizer
    prune: Rule
    schedule: Schedule
    loss: Loss
    augment: Augment
    average: Average
    optimizer: Optimizer
    quantize: Quantizer
    stages: list[Any]  # as they are listed: names, and repeats of names
    recipe: list[Stage]  # the same in order, each with all that determines it
    rounds: Annotated[int, Range(1, 1000)]
    rewind_to: str
    ramp: Ramp
    seed: Seed
    device: str
    precision: Literal["auto", "float32", "bfloat16"]
    threads: Annotated[int, Range(1, 1024)] | None
    step: Literal["auto", "eager", "recorded", "compiled", "kernels"]
    sensitivity: float | None
    budget: Budget
    track: Tracks
    export: Exports
    plots: bool | None  # None: of a single run, not of a sweep's members
    compact: bool | None  # the same
    card: bool | None  # the same
    store: str | None  # the folder of finished stages
    objectives: Objectives
    trust: list[str]
    name: dict[str, str]  # the choice made in each group, for people


_KINDS = typing.get_type_hints(Run)
# what a run is made of
METHODS = tuple(name for name, kind in _KINDS.items() if kind in (Model, Data, Regularizer, Rule))
RULE = next(name for name in METHODS if _KINDS[name] is Rule)
# the groups whose YAMLs name ranges to search, and what precedes the keys of these: a rule's number is a root key
SEARCHED = {
    name: "" if name == RULE else f"{name}."
    for name in METHODS
    if any(each.name == "search" for each in fields(_KINDS[name]))
}
