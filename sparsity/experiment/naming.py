"""How a run trains otherwise than a plain reproduction, as its result and the columns of summaries name it."""

from collections.abc import Callable
from typing import Any

from sparsity.config import Run
from sparsity.experiment.teachers import describe_teacher, losses_with_teachers
from sparsity.nodes import Augment, Average, Loss

PLAIN = "sparsity.losses.cross_entropy"


def beyond_plain(run: Run) -> dict[str, Any]:
    """The loss, augmentation and average of weights that some stage has, and the teacher; {} of a plain run."""
    values = [value for stage in run.recipe for value in stage.call.numbers.values()]
    found: dict[str, Any] = {}
    for part, (kind, name) in PARTS.items():
        names = [name(value) for value in values if isinstance(value, kind)]
        if others := [each for each in dict.fromkeys(names) if each is not None]:
            found[part] = ",".join(others)
    taught = {loss.teacher: loss for _, loss in losses_with_teachers(run)}
    for number, loss in enumerate(taught.values(), 1):
        found["teacher" if number == 1 else f"teacher-{number}"] = describe_teacher(loss)
    return found


def _loss(loss: Loss) -> str | None:
    return None if loss.function.target == PLAIN else loss.function.target.rpartition(".")[2]


def _augment(augment: Augment) -> str | None:
    return None if augment.function is None else augment.function.target.rpartition(".")[2]


def _average(average: Average) -> str | None:
    return None if average.kind == "none" else average.kind


# what a plain run has not: the record that a stage is given, and the name of one that counts
PARTS: dict[str, tuple[type, Callable[[Any], str | None]]] = {
    "loss": (Loss, _loss),
    "augment": (Augment, _augment),
    "average": (Average, _average),
}
