"""The pictures of a run: whatever is to be drawn, they are drawn, without a word of the library's."""

import warnings

import pytest
import torch
from conftest import slow

from sparsity.results import plots
from sparsity.results.pictures import drawing
from sparsity.training import Epoch


def epoch(number, accuracy, loss=0.0, penalty=0.0):
    return Epoch(number, [loss], [penalty], [loss], [accuracy], [accuracy], 0.001, 1.0)


def layer(name, nonzero, threshold=None):
    return {"name": name, "kind": "weight", "nonzero": nonzero, "total": 100, "density": nonzero / 100} | {
        "threshold": threshold
    }


LAYERS = [layer("[/x].weight", 100, 0.1), layer("$a_{.weight", 0), layer("网络.weight", 3, 0.0)]


def states(*numbers):
    return {str(number): {each["name"]: torch.full((4, 4), number) for each in LAYERS} for number in numbers}


HISTORIES = {
    "no error": {"pretrain": [epoch(1, 1.0)], "finetune": [epoch(0, 1.0), epoch(1, 1.0)]},
    "one epoch": {"regularize": [epoch(1, 0.9, 0.1, 1e5)]},
    "diverged": {"pretrain": [epoch(1, 0.1, float("nan"), float("inf"))]},
    "none": {"pretrain": []},
}


def stage(name, number, size, accuracy, *did):
    accuracies, sizes = {"validation": None, "test": accuracy}, {"weights": size}
    return {"name": name, "round": number, "compression": sizes, "accuracy": accuracies, "did": list(did)}


ROUNDS = {
    "no error": [stage("prune", 1, 1.0, 1.0, "masked"), stage("prune-2", 2, 1.0, 1.0, "masked")],
    "one epoch": [stage("prune", None, 7.0, 0.9, "masked")],
    "diverged": [stage("prune", None, 1.5, 0.0, "masked"), stage("cut", None, 3000.0, 0.0, "masked")],
    "none": [stage("prune", 1, None, 0.1, "masked"), stage("prune-2", 2, None, 0.1, "masked")],  # nothing is left
}


@pytest.mark.slow
@pytest.mark.parametrize("history", ["no error", *slow("one epoch", "diverged", "none")])
def test_what_cannot_be_drawn_on_a_log_scale(history, tmp_path, capsys, caplog):
    numbers = (1.0, float("inf")) if history == "diverged" else (0.0, 0.0)
    result = {"layers": LAYERS, "stages_run": ROUNDS[history]}
    paths = plots.draw_all(tmp_path, HISTORIES[history], result, states(*numbers), "网 $x_{ [/b] </i>")
    assert (tmp_path / "rounds.png" in paths) == (history != "one epoch")
    assert paths and all(path.stat().st_size > 5_000 for path in paths)
    assert not caplog.messages and capsys.readouterr() == ("", "")


def axes_of(monkeypatch, draw, *arguments):
    """The axes of a picture."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    with drawing():
        draw(None, *arguments)
    return figures[0].axes


def test_density_ends_at_100_percent(monkeypatch):
    (axis,) = axes_of(monkeypatch, plots.draw_density, LAYERS, "a run")
    assert axis.get_xlim() == (pytest.approx(0.01), 1.0)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["[/x]", r"\$a_{", "网络", "all weights"]
    assert [text.get_text() for text in axis.texts] == ["100.00% (100)", "0.00% (0)", "3.00% (3)", "34.33% (103)"]


@pytest.mark.parametrize(("history", "scales"), [("no error", ["linear"] * 3), ("one epoch", ["log"] * 3)])
def test_the_scale_is_that_of_what_there_is(history, scales, monkeypatch):
    axes = axes_of(monkeypatch, plots.draw_curves, HISTORIES[history], "a run", 0)
    assert [axis.get_yscale() for axis in axes] == scales


def test_rounds_are_points_of_their_kind_and_numbered_at_their_end(monkeypatch):
    stages = [
        stage("pretrain", None, 1.0, 0.9),
        stage("prune", 1, 4.0, 0.5, "masked"),
        stage("finetune", 1, 4.0, 0.8, "selected"),
        stage("prune-2", 2, 16.0, 0.3, "masked"),
        stage("finetune-2", 2, 16.0, 0.7, "selected"),
    ]
    (axis,) = axes_of(monkeypatch, plots.draw_rounds, stages, "a run")
    way, *kinds = axis.get_lines()
    assert list(way.get_xdata()) == [1, 4, 4, 16, 16] and list(way.get_ydata()) == [0.9, 0.5, 0.8, 0.3, 0.7]
    assert {line.get_label(): list(line.get_ydata()) for line in kinds} == {
        "pretrain": [0.9],
        "prune": [0.5, 0.3],
        "finetune": [0.8, 0.7],
    }
    assert {text.get_text(): text.xy for text in axis.texts} == {"1": (4.0, 0.8), "2": (16.0, 0.7)}
    assert axis.get_xscale() == "log"


def test_rounds_of_a_stage_share_a_colour_and_come_one_after_another(monkeypatch):
    names = ("pretrain", "finetune", "finetune-2")
    axes = axes_of(
        monkeypatch, plots.draw_curves, {name: [epoch(1, 0.9, 0.1), epoch(2, 0.9, 0.1)] for name in names}, ""
    )
    lines = [line for line in axes[0].get_lines() if len(set(line.get_xdata())) == 2]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [3, 4], [5, 6]]
    assert lines[0].get_color() != lines[1].get_color() == lines[2].get_color()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["pretrain", "finetune"]


def test_pictures_look_the_same_whatever_a_user_has_set():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9}):
        with drawing():
            assert not matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["lines.linewidth"] == 1.5
            warnings.warn("of a library's", stacklevel=1)
        assert matplotlib.rcParams["text.usetex"]
