"""The settings of a run, as checked dataclasses: their annotations are what `typed` checks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sparsity.front import OBJECTIVES
from sparsity.kinds import Count, NonNegative, Positive, PositiveCount, Range, Seed
from sparsity.schedules import SHAPES

STAGES = ("pretrain", "regularize", "prune", "finetune")

Kinds = list[Literal["weight", "bias", "normalization", "scale", "other"]]

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
class Methods:
    """Where the functions and classes that a key may name are defined, and what the pipeline passes to them."""

    module: str
    positional: int = 0  # arguments that are passed by their place
    given: tuple[str, ...] = ()  # arguments that are passed by name


Factory = Annotated[Call, Methods("sparsity.models", given=("input_shape", "num_classes"))]
Loader = Annotated[Call, Methods("sparsity.data")]
Penalty = Annotated[Call, Methods("sparsity.regularizers", positional=1)]
PruningRule = Annotated[Call, Methods("sparsity.pruning", positional=1, given=("sensitivity", "fixed"))]
Optimizer = Annotated[Call, Methods("torch.optim", positional=1, given=("lr", "weight_decay"))]


@dataclass(frozen=True)
class Model:
    """The network, and the weights that it starts from."""

    factory: Factory
    weights: str | None
    head: Literal["new"] | None = None  # new: the last layer is drawn, not read, for another number of classes


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
class Regularizer:
    """The penalty, its coefficient, and the parameters that it is applied to."""

    penalty: Penalty | None
    decay: NonNegative
    apply_to: Kinds
    weight_decay: NonNegative
    search: dict[str, str] = field(default_factory=dict)  # ranges that a search draws from


@dataclass(frozen=True)
class Rule:
    """The pruning rule, and the parameters that it is applied to."""

    rule: PruningRule
    cut: PruningRule | None  # the threshold that the report shows
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
    optimizer: Optimizer
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
