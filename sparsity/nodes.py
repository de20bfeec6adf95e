"""What a config's nodes are, once read: functions with their numbers, and the records that stages take."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

from sparsity.errors import ConfigError
from sparsity.kinds import Count, NonNegative, Positive, PositiveCount, Range
from sparsity.schedules import CURVES, SHAPES

Kinds = list[Literal["weight", "bias", "normalization", "scale", "other"]]


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


def sensitivity_range(rule: "Rule") -> Range:
    """The interval of a rule's sensitivity, as its cut's signature annotates it; finite and ≥ 0 where it does not."""
    cut = rule.cut.function
    parameter = inspect.signature(cut.function).parameters.get("sensitivity")
    if parameter is None:
        raise ConfigError(f"{cut.key}._target_={cut.target} is no cut: it takes no sensitivity")
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Range)), Range(0))


Factory = Annotated[Call, Methods("sparsity.models", given=("input_shape", "num_classes"))]
Loader = Annotated[Call, Methods("sparsity.data")]
Penalty = Annotated[Call, Methods("sparsity.regularizers", positional=1, given=("sizes",))]
Shrink = Annotated[Call, Methods("sparsity.shrinking", positional=1, given=("strength",))]
# what an importance may ask for beside the weight: what is computed for it over batches of train, or read off the graph
COMPUTED = ("gradient", "squared_gradient", "curved_gradient", "curvature", "flow", "input_norm", "noise", "scale")
ImportanceFunction = Annotated[Call, Methods("sparsity.pruning.importance", positional=1, given=COMPUTED)]
COUPLING = ("unit_of_rows", "num_units", "unit_of_columns", "is_head")  # what a unit across layers asks for
UnitFunction = Annotated[Call, Methods("sparsity.pruning.unit", positional=1, given=("fixed", *COUPLING))]
CUT_READS = ("sensitivity", "signed", "mask", "ordered", "ordered_each")
CutFunction = Annotated[Call, Methods("sparsity.pruning.cut", positional=1, given=CUT_READS)]
QuantizerFunction = Annotated[Call, Methods("sparsity.quantizing", positional=1, given=("codes", "bits"))]
CodesFunction = Annotated[Call, Methods("sparsity.quantizing", positional=1, given=("bits",))]
TEACHER = "teacher"  # what a loss asks for to get a trained network's outputs on the same images
LossFunction = Annotated[Call, Methods("sparsity.losses", given=("outputs", "labels", TEACHER))]
AugmentFunction = Annotated[Call, Methods("sparsity.augmentation", positional=2)]
Optimizer = Annotated[Call, Methods("torch.optim", positional=1, given=("lr", "weight_decay"))]
TrackerFunction = Annotated[Call, Methods("sparsity.tracking", positional=1)]
ExportFunction = Annotated[Call, Methods("sparsity.exports", positional=3)]
StageFunction = Annotated[Call, Methods("sparsity.stages", positional=2)]


class Marker:
    """Says of an argument of a stage what its type does not."""

    def __init__(self, meaning: str):
        self.meaning = meaning


EACH = Marker("a list with one entry a member; their floats may differ, all else is the same")
STATE = Marker("the name of a state: `start`, a stage, or one of its epochs, such as pretrain@2")

T = TypeVar("T")
Each = Annotated[list[T], EACH]
State = Annotated[str, STATE]


@dataclass(frozen=True)
class Unit:
    """What is kept or removed as one."""

    function: UnitFunction
    structural: bool  # takes whole groups: a filter that goes takes its bias


@dataclass(frozen=True)
class Regularizer:
    """What is added to the loss or applied after every step, its coefficient, and the parameters that it is for."""

    penalty: Penalty | None
    decay: NonNegative
    apply_to: Kinds
    weight_decay: NonNegative
    search: dict[str, str] = field(default_factory=dict)  # ranges that a search draws from
    rise: Annotated[float, Range(0, 1)] = 0.0  # share of the stage's steps over which the decay rises from 0, evenly
    shrink: Shrink | None = None
    unit: Unit | None = None  # whose norms it is of; None: of the entries

    @property
    def method(self) -> Call | None:
        """What it does; None: nothing."""
        return self.penalty or self.shrink


@dataclass(frozen=True)
class Reading:
    """What is read of train for scores."""

    batches: Count  # of train; 0: none
    batch_size: PositiveCount
    mode: Literal["eval", "train"]  # of dropout and normalisation meanwhile


@dataclass(frozen=True)
class Importance(Reading):
    """What an entry scores, and what is read of train for it."""

    function: ImportanceFunction
    of: Literal["any", "entries", "filters"]  # the units that it is meant for
    rounds: Annotated[int, Range(1, 10_000)]  # of scoring and pruning in turns, with ever less left
    penalty: Regularizer | None = None  # whose penalty is in the loss that gradients are of


@dataclass(frozen=True)
class Cut:
    """The threshold, which the report shows; its one number is the run's sensitivity."""

    function: CutFunction
    scope: Literal["tensor", "network"]  # of each tensor by itself, or of all together
    default: float  # sensitivity
    search: str  # the range that a search draws it from


@dataclass(frozen=True)
class Rule:
    """The pruning rule, importance → unit → cut, and the parameters that it is applied to."""

    importance: Importance
    unit: Unit
    cut: Cut
    apply_to: Kinds
    scope: Literal["tensor", "network"]  # of the cut
    structural: bool  # takes whole groups: a filter that goes takes its bias
    layers: dict[str, float]
    exclude: list[str]
    keep_at_least: Annotated[float, Range(0, 1)]  # the share of a parameter that stays, whatever the cut
    round_to: PositiveCount  # of structural rules: filters stay in multiples of it
    search: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Regrow:
    """How masked entries come back in the place of others while training."""

    by: Literal["gradient", "random"]  # what comes back: those with the largest gradients, or any
    share: Annotated[float, Range(0, 1, above=True)]  # of what is kept that goes at first; it falls to 0 along a cosine
    until: Annotated[float, Range(0, 1, above=True)]  # share of the stage's steps after which masks stay
    every: PositiveCount  # steps from one exchange to the next


@dataclass(frozen=True)
class Adapt:
    """By what a decay is found while it acts: what the rule would leave, as often as is looked."""

    rule: Rule
    sensitivity: float
    every: PositiveCount  # steps from one look to the next


@dataclass(frozen=True)
class Calibration:
    """What is read of train for the ranges of layers' inputs."""

    batches: PositiveCount
    batch_size: PositiveCount


@dataclass(frozen=True)
class Quantizer:
    """How weights are put in few bits, and whether the inputs of layers are."""

    function: QuantizerFunction | None  # None: nothing is
    bits: Annotated[int, Range(2, 8)]  # of an entry
    apply_to: Kinds
    codes: CodesFunction | None = None  # by which entries share a value, if the function asks for them
    activations: Calibration | None = None  # of inputs in uint8; None: they stay as they are


@dataclass(frozen=True)
class Model:
    """The network, and the weights that it starts from."""

    factory: Factory
    weights: str | None
    head: Literal["new"] | None = None  # new: the last layer is drawn, not read, for another number of classes


@dataclass(frozen=True)
class Loss:
    """What training minimises, beside the penalty."""

    function: LossFunction
    teacher: str | None = None  # a weights file, or the folder of a run, of the network that the function asks for
    teacher_model: Model | None = None  # whose it is

    @property
    def asks_for_teacher(self) -> bool:
        """Whether the function takes a teacher's outputs."""
        try:
            return TEACHER in inspect.signature(self.function.function).parameters
        except (TypeError, ValueError):  # of a function that does not say what it takes
            return False


@dataclass(frozen=True)
class Augment:
    """How images are changed while training."""

    function: AugmentFunction | None  # of images and of numbers drawn for each
    draws: Count  # how many


@dataclass(frozen=True)
class Track:
    """Another program that follows runs."""

    function: TrackerFunction
    package: str  # that it needs


@dataclass(frozen=True)
class Export:
    """A form in which the network is handed to other programs."""

    function: ExportFunction
    packages: list[str]  # that it needs, beside those that every run needs


@dataclass(frozen=True)
class Average:
    """The average of weights that a training stage hands back in place of the last ones."""

    kind: Literal["none", "mean", "ema"]
    start: Annotated[float, Range(0, 1, below=True)]  # share of the stage's epochs after which it begins
    decay: Annotated[float, Range(0, 1, below=True)]  # of ema, a step


@dataclass(frozen=True)
class StageSchedule:
    """The numbers of one training stage."""

    epochs: Count
    lr: Positive
    shape: Literal[tuple(SHAPES)]
    warmup: Annotated[float, Range(0, 1, below=True)]
    weight_decay: NonNegative


@dataclass(frozen=True)
class Curve:
    """How the share of what a rule prunes rises within a training stage."""

    shape: Literal[tuple(CURVES)]
    until: Annotated[float, Range(0, 1, above=True)]  # share of the stage's steps after which nothing more is pruned
