"""Dominance and hypervolume against brute force."""

import math

import numpy as np
import pytest

from sparsity.front import OBJECTIVES, hypervolume, non_dominated
from sparsity.results.pareto import PUBLISHED

UP, DOWN = "maximize", "minimize"


def dominates(a, b, directions):
    """The definition, objective by objective."""
    better = [(x > y) if way == UP else (x < y) for x, y, way in zip(a, b, directions)]
    worse = [(x < y) if way == UP else (x > y) for x, y, way in zip(a, b, directions)]
    return any(better) and not any(worse)


@pytest.mark.parametrize("directions", [[UP], [UP, DOWN], [DOWN, UP, UP], [UP, DOWN, DOWN, UP]])
def test_front_is_what_no_other_dominates(directions):
    points = np.random.default_rng(0).integers(0, 5, (60, len(directions))).astype(float).tolist()  # with ties
    expected = [not any(dominates(other, point, directions) for other in points) for point in points]
    assert non_dominated(points, directions) == expected
    assert 0 < sum(expected) < len(points)


def test_equal_points_all_stay():
    assert non_dominated([(1, 1), (1, 1), (0, 1)], [UP, UP]) == [True, True, False]


def test_what_is_not_a_number_is_not_on_the_front_and_dominates_nothing():
    points = [(math.nan, 9), (None, 9), (0.5, 2), (0.4, math.nan)]
    assert non_dominated(points, [UP, UP]) == [False, False, True, False]


def test_nothing_has_no_front():
    assert non_dominated([], [UP, DOWN]) == []
    assert hypervolume([], [0, 0], [UP, DOWN]) == 0


@pytest.mark.parametrize("directions", [[UP, UP], [DOWN, UP], [UP, DOWN, UP]])
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(directions):
    random = np.random.default_rng(1)
    points = random.random((8, len(directions)))
    reference = [0.0 if way == UP else 1.0 for way in directions]
    signs = np.array([1 if way == UP else -1 for way in directions])
    samples = random.random((100_000, 1, len(directions)))
    share = (points * signs >= samples * signs).all(2).any(1).mean()
    assert hypervolume(points.tolist(), reference, directions) == pytest.approx(share, abs=0.006)


def test_hypervolume_by_hand_and_points_beyond_the_reference():
    assert hypervolume([(0.95, 2), (0.99, 1)], [0.9, 0], [UP, UP]) == pytest.approx(0.05 * 2 + 0.04 * 1)
    assert hypervolume([(0.95, 2), (0.2, 100), (math.nan, 3)], [0.9, 0], [UP, UP]) == pytest.approx(0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_row(name):
    from sparsity.results import number, objectives

    key, direction, size = OBJECTIVES[name]
    result = {"accuracy": {"final": {"validation": 0.5}}, "compression": {"weights": 2.0}, "nonzero": {"weights": 3}}
    result |= {"macs": {"dense": 9, "removable": 4}, "total": {"weights": 6}}
    result |= {"card": {"masked": {"bytes": 90}, "compact": {"bytes": 30}}}
    assert direction in (UP, DOWN) and objectives(result, [name]) == (number(result, key),)
    if size is not None:
        assert number(result, size.left) < number(result, size.dense) and size.label and size.unit
        columns = PUBLISHED.read_text(encoding="utf-8").splitlines()[0].split(",")
        assert size.published in columns or (name, size.published) == ("bytes", None)
