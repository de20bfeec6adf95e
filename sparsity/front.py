"""Objectives of a search, and which way each is better; what no other dominates, and how much a front dominates."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Size(NamedTuple):
    """What more there is to say of an objective that tells how small a network is."""

    left: str  # the keys in a result of what is left, and of what the dense network has
    dense: str
    unit: str  # what these count
    label: str  # of the axis in pictures
    published: str | None  # the column of published results; None: none say it


class Objective(NamedTuple):
    """A number that a search makes large or small."""

    key: str  # in a result
    direction: Literal["maximize", "minimize"]
    size: Size | None = None


OBJECTIVES = {
    "accuracy": Objective("accuracy.final.validation", "maximize"),
    "compression": Objective(
        "compression.weights",
        "maximize",
        Size(
            "nonzero.weights",
            "total.weights",
            "weights",
            "compression of the weights (×), more is better →",
            "compression",
        ),
    ),
    "macs": Objective(
        "macs.removable",
        "minimize",
        Size(
            "macs.removable",
            "macs.dense",
            "MACs",
            "MACs of one image once dead units are removed, ← fewer is better",
            "macs",
        ),
    ),
    "nonzero": Objective(
        "nonzero.weights",
        "minimize",
        Size("nonzero.weights", "total.weights", "weights", "non-zero weights, ← fewer is better", "nonzero_weights"),
    ),
    "bytes": Objective(
        "card.compact.bytes",
        "minimize",
        Size("card.compact.bytes", "card.masked.bytes", "bytes", "bytes of the compact file, ← fewer is better", None),
    ),
}
OF_COMPACT = {name for name, objective in OBJECTIVES.items() if objective.key.startswith("card.compact.")}
SIZES = {name: objective.size for name, objective in OBJECTIVES.items() if objective.size is not None}


def non_dominated(points: Sequence[Sequence[float | None]], directions: Sequence[str]) -> list[bool]:
    """Whether each point is on the front: no other is as good in every objective and better in one.

    Equal points all stay; a point with a NaN or None is never on the front and dominates nothing.
    """
    costs = _costs(points, directions)
    known = ~_is_nan(costs)
    rivals = costs[known]
    return [
        bool(is_known and not ((rivals <= row).all(1) & (rivals < row).any(1)).any())
        for row, is_known in zip(costs, known)
    ]


def hypervolume(
    points: Sequence[Sequence[float | None]], reference: Sequence[float], directions: Sequence[str]
) -> float:
    """The exact volume that the points dominate as far as the reference; points beyond it add nothing."""
    import moocore

    costs = _costs(points, directions)
    costs = costs[~_is_nan(costs)]
    if not len(costs):
        return 0.0
    return float(moocore.hypervolume(costs, ref=_costs([reference], directions)[0]))


def _costs(points: Sequence[Sequence[float | None]], directions: Sequence[str]) -> Any:
    """The points as an array in which less is better."""
    import numpy as np  # not at the top: `--help` reads OBJECTIVES and needs none of it

    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    return np.array(points, dtype=float).reshape(-1, len(signs)) * signs


def _is_nan(costs: Any) -> Any:
    return (costs != costs).any(1)
