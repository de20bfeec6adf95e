"""The densities of layers from stage to stage, and while a stage prunes: noted, and drawn one line a layer."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import context_of, rule_node
from torch import nn

from sparsity.experiment.record import _course
from sparsity.population import stack
from sparsity.results import lines
from sparsity.results.lines import Course
from sparsity.stages import pruning


@pytest.mark.parametrize("count", [3, 60])
def test_lines_are_told_apart_without_colour_too(count):
    styles = lines.styles(count)
    assert len({(str(style["color"]), style.get("marker"), style.get("linestyle")) for style in styles}) == count
    for one, other in pairwise(styles):
        assert (one.get("marker"), one.get("linestyle")) != (other.get("marker"), other.get("linestyle"))


LAYERS = [{"name": name, "kind": kind, "total": size} for name, kind, size in
          (("a.weight", "weight", 300), ("a.bias", "bias", 3), ("b.weight", "weight", 100))]  # fmt: skip


def test_densities_are_drawn_of_every_weight_and_of_all(monkeypatch):
    figures = []
    monkeypatch.setattr(lines, "save", lambda figure, path: figures.append(figure))
    course = Course([0, 10], {"a.weight": [1.0, 0.0], "a.bias": [1.0, 0.5]})
    lines.draw_densities(Path(), course, LAYERS, "a run")
    lines.draw_densities(Path(), Course([0, 1], {"b.weight": [1.0, 0.1]}, ["prune", "prune-2"]), LAYERS, "a run")
    by_step, by_stage = (figure.axes[0] for figure in figures)
    assert [list(line.get_ydata()) for line in by_step.get_lines()] == [[1, 0], [1, 1], [1, 0.25]]
    assert [line.get_label() for line in by_step.get_lines()] == ["a", "b", "all weights"]
    assert list(by_stage.get_lines()[1].get_ydata()) == [1, 0.1]
    assert [text.get_text() for text in by_stage.get_xticklabels()] == ["prune", "prune-2"]


def member(*did, course=None):
    stages = [{"name": f"stage-{index}", "did": [each]} for index, each in enumerate(did)]
    densities = [{"a": 1 / (index + 1)} for index in range(len(did))]
    return SimpleNamespace(stages=stages, densities=densities, course=course)


def test_the_course_is_that_of_rounds_or_of_the_steps_of_one_stage():
    on_the_way = {"steps": [0, 5], "densities": {"a": [1.0, 0.5]}}
    assert _course(member("masked", "selected")) is None
    assert _course(member("masked", course=on_the_way)) == Course([0, 5], {"a": [1.0, 0.5]})
    rounds = _course(member("masked", "masked", course=on_the_way))
    assert rounds == Course(range(2), {"a": [1.0, 0.5]}, ["stage-0", "stage-1"])


@pytest.mark.parametrize("most", [200, 2])
def test_a_pruner_notes_the_densities_of_each_change(most, monkeypatch):
    monkeypatch.setattr(pruning, "MOST_CHANGES", most)
    torch.manual_seed(0)
    population = stack([nn.Linear(10, 10), nn.Linear(10, 10)])
    rules = [rule_node("percentile")] * 2
    pruner = pruning.Pruner(rules, [0.5, 0.8], None, population, context_of(seeds=(0, 1)))
    for share in (0.0, 0.5, 1.0):
        pruner.masks(population, share)
    first, second = pruner.courses([0, 4, 7])
    assert first["steps"] == ([0, 4, 7] if most == 200 else [0, 7])
    kept = {200: ([1, 0.75, 0.5], [1, 0.6, 0.2]), 2: ([1, 0.5], [1, 0.2])}[most]
    assert first["densities"]["weight"] == pytest.approx(kept[0]) and second["densities"]["weight"] == pytest.approx(
        kept[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("recipe=iterative", "rounds=2"), ("recipe=gradual",)])
def test_a_run_that_prunes_on_the_way_draws_it(overrides, run):
    small = ("model=mlp", "model.factory.hidden=[8]", "plots=true")
    assert (Path(run(*small, *overrides)["folder"]) / "densities.png").stat().st_size > 5_000
