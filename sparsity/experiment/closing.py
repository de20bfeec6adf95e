"""What a run ends with where it came to little: which stage lost the accuracy or pruned nearly nothing, and its key."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from sparsity.config import Run
from sparsity.experiment.plan import Planned
from sparsity.experiment.views import before_masks
from sparsity.stages import MASKED

HARDLY = 1.05  # compression of the weights below which hardly anything was pruned
MOST = 0.5  # of the accuracy above chance: what pruning may cost before it is said

Ended = Sequence[Mapping[str, Any]]  # the stages that were run, with their names, deeds and accuracies


def closing_lines(
    run: Run, given: Mapping[str, float | None] | None, stages: Ended, compression: float | None, labels: Tensor
) -> list[str]:
    """The lines: of a network that is no better than chance, that lost most to pruning, that is hardly compressed.

    given: the accuracy of the weights that the run starts from; compression: of the weights, None where none is left;
    labels: of the test set.
    """
    if not stages:
        return []
    chance = _most_frequent(labels)
    luck = 2 * (chance * (1 - chance) / len(labels)) ** 0.5
    bound = max(chance, min(chance + luck, 1 - 1 / len(labels)))  # of few images too, all right is more than luck
    final = stages[-1]["accuracy"]["test"]
    if final <= bound:
        return [_at_chance(run, given, stages, bound, final, chance)]
    lines = []
    dense = before_masks(stages)
    if len(dense) < len(stages):
        before = dense[-1]["accuracy"]["test"] if dense else given and given["test"]
        if before is not None and before > bound and final - chance < (1 - MOST) * (before - chance):
            lines.append(
                f"pruning cost most of the accuracy, {before:.2%} before and {final:.2%} now: {_turned(run, 'less')}"
            )
        if compression is not None and compression < HARDLY:
            lines.append(f"hardly anything is pruned, {1 - 1 / compression:.1%} of the weights: {_turned(run, 'more')}")
    return lines


def _most_frequent(labels: Tensor) -> float:
    """The share of the most frequent class: the accuracy of always naming it."""
    return labels.bincount().max().item() / len(labels)


def _at_chance(
    run: Run, given: Mapping[str, float | None] | None, stages: Ended, bound: float, final: float, chance: float
) -> str:
    """Which stage is to blame: the first after which the network is no better than chance, as it still is."""
    start = f"the network is no better than chance, {final:.2%} where one class always is {chance:.2%}: "
    recipe = [Planned([stage]) for stage in run.recipe]
    is_trained = any(stage.schedule and not stage.regularizers and not stage.holds_zeros for stage in recipe)
    if given is not None and given["test"] <= bound and not is_trained:
        return (
            f"{start}model.weights={run.model.weights} is so as given: were its images scaled as data.normalize does?"
        )
    accuracy = {stage["name"]: stage["accuracy"]["test"] for stage in stages}
    trained = [stage for stage in recipe if stage.schedule]
    able = recipe[recipe.index(trained[0]) if trained else 0 :]  # what comes before has nothing to lose
    still = list(itertools.takewhile(lambda stage: accuracy[stage.name] <= bound, reversed(able)))[::-1]
    blamed = next((each for each in still if each.schedule or each.rules), able[-1])
    if not blamed.schedule:
        return start + _turned(run, "less")
    keys = causes(blamed)
    more = f", or raise {blamed.key('schedule')}.epochs={blamed.schedule.epochs}" if blamed is trained[0] else ""
    if any(MASKED in stage["did"] for stage in stages[: [stage.name for stage in recipe].index(blamed.name) + 1]):
        more += f", or {_turned(run, 'less')}"
    return f"{start}since {blamed.name}; lower {keys}{more}"


def causes(stage: Planned) -> str:
    """What makes the training of a stage fail if it is too large, with its values."""
    causes = f"{stage.key('schedule')}.lr={stage.schedule.lr:g}"
    regularizer = (stage.regularizers or [None])[0]
    if regularizer is not None and regularizer.method is not None:
        causes = f"{stage.key('penalty')}.decay={regularizer.decay:g} or {causes}"
    return causes


def _turned(run: Run, pruning: Literal["less", "more"]) -> str:
    """How to turn what decides how much is pruned, with its value."""
    if run.budget.given:
        return run.budget.turned(pruning=pruning)
    recipe = [Planned([stage]) for stage in run.recipe]
    decays = {stage.key("penalty"): stage.regularizers[0] for stage in recipe if stage.regularizers}
    decay = "".join(f" or {key}.decay={each.decay:g}" for key, each in decays.items() if each.method is not None)
    return f"{'lower' if pruning == 'less' else 'raise'} sensitivity={run.sensitivity:g}{decay}"
