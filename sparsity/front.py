"""Objectives of a search, and which way each is better; what no other dominates, and how much a front dominates."""

from collections.abc import Sequence
from typing import Any

OBJECTIVES = {"accuracy": "maximize", "compression": "maximize", "macs": "minimize", "nonzero": "minimize"}


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
