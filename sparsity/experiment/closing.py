"""What a run ends with where it came to little: which stage lost the accuracy or pruned nearly nothing, and its key."""

from collections.abc import Mapping

from torch import Tensor

from sparsity.config import Run

HARDLY = 1.05  # compression of the weights below which hardly anything was pruned
MOST = 0.5  # of the accuracy above chance: what pruning may cost before it is said

Measured = Mapping[str, Mapping[str, float | None]]  # accuracies by where they were measured: "dense", "pruned", …
AFTER = {"pretrain": "dense", "regularize": "regularized", "prune": "pruned", "finetune": "finetune"}


def closing_lines(run: Run, measured: Measured, compression: float | None, labels: Tensor) -> list[str]:
    """The lines: of a network that is no better than chance, that lost most to pruning, that is hardly compressed.

    compression: of the weights, None where none is left; labels: of the test set.
    """
    if not run.stages or "final" not in measured:
        return []
    chance = _most_frequent(labels)
    bound = chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5  # a little luck
    final = measured["final"]["test"]
    if final <= bound:
        return [_at_chance(run, measured, bound, final, chance)]
    lines = []
    if "prune" in run.stages:
        before = next((measured[name]["test"] for name in ("regularized", "dense") if name in measured), None)
        if before is not None and before > bound and final - chance < (1 - MOST) * (before - chance):
            lines.append(f"pruning cost most of the accuracy, {before:.2%} before and {final:.2%} now: {_lower(run)}")
        if compression is not None and compression < HARDLY:
            lines.append(f"hardly anything is pruned, {1 - 1 / compression:.1%} of the weights: raise {_named(run)}")
    return lines


def _most_frequent(labels: Tensor) -> float:
    """The share of the most frequent class: the accuracy of always naming it."""
    return labels.bincount().max().item() / len(labels)


def _at_chance(run: Run, measured: Measured, bound: float, final: float, chance: float) -> str:
    """Which stage is to blame: the first after which the network is no better than chance, as it still is."""
    start = f"the network is no better than chance, {final:.2%} where one class always is {chance:.2%}: "
    trains = [stage for stage in run.stages if stage != "prune"]
    if run.model.weights is not None and measured["dense"]["test"] <= bound and "pretrain" not in run.stages:
        return (
            f"{start}model.weights={run.model.weights} is so as given: were its images scaled as data.normalize does?"
        )
    stage = next(stage for stage in run.stages if measured[AFTER[stage]]["test"] <= bound)
    if stage == "prune":
        return start + _lower(run)
    numbers = getattr(run.schedule, stage)
    keys = f"schedule.{stage}.lr={numbers.lr:g}"
    if stage == "regularize" and run.reg.penalty is not None:
        keys = f"reg.decay={run.reg.decay:g} or {keys}"
    longer = f", or raise schedule.{stage}.epochs={numbers.epochs}" if stage == trains[0] else ""
    return f"{start}since {stage}; lower {keys}{longer}"


def _named(run: Run) -> str:
    """What decides how much is pruned, with its value."""
    decay = f" or reg.decay={run.reg.decay:g}" if "regularize" in run.stages and run.reg.penalty is not None else ""
    return f"sensitivity={run.sensitivity:g}{decay}"


def _lower(run: Run) -> str:
    """The remedy for too much pruning."""
    return f"lower {_named(run)}"
