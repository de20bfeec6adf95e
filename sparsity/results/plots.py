"""Pictures of a run: training curves, density per layer, the weights before and after regularizing."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsity.results.lines import Course, draw_densities
from sparsity.results.pictures import COLOURS, as_typed, drawing
from sparsity.results.pictures import percent as _percent
from sparsity.results.pictures import save as _save
from sparsity.tensors import Tensors
from sparsity.training import Epoch

Histories = dict[str, list[Epoch]]  # by stage

ROUND = re.compile(r"-\d+$")  # of a repeated stage's name
ACCURACIES = {"validation": "-", "test": ":"}
NUM_BINS = 80
SMALLEST = 1e-8  # magnitudes below are drawn at the left edge


def draw_all(
    folder: Path,
    histories: Histories,
    result: Mapping[str, Any],
    states: dict[str, Tensors],
    title: str,
    course: Course | None = None,
) -> list[Path]:
    """The pictures that the run has something for; states: the weights before and after regularizing.

    course: of the densities, where there is one to show.
    """
    layers = result["layers"]
    with drawing():
        paths = [draw_density(folder / "density.png", layers, as_typed(title))]
        if any(histories.values()):
            paths.append(draw_curves(folder / "curves.png", histories, as_typed(title)))
        if sum("masked" in stage["did"] for stage in result["stages_run"]) > 1:
            paths.append(draw_rounds(folder / "rounds.png", result["stages_run"], as_typed(title)))
        if course is not None:
            paths.append(draw_densities(folder / "densities.png", course, layers, as_typed(title)))
        if any(tensor.ndim > 1 for state in states.values() for tensor in state.values()):
            paths.append(draw_weights(folder / "weights.png", states, layers, as_typed(title)))
        return paths


def draw_curves(path: Path, histories: Histories, title: str, member: int = 0) -> Path:
    """Loss, penalty and accuracy over the epochs of all stages in one plot; the rounds of a stage share a colour."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    kinds_of = list(dict.fromkeys(ROUND.sub("", stage) for stage in histories))
    offset, named = 0, set()
    for stage, history in histories.items():
        kind = ROUND.sub("", stage)
        colour, label = COLOURS[kinds_of.index(kind) % len(COLOURS)], None if kind in named else kind
        named.add(kind)
        rows = [row for row in history if row.epoch > 0]
        epochs = [offset + row.epoch for row in rows]
        marker = "." if len(rows) < 60 else None
        for axis, name in zip(axes, ("loss", "penalty")):
            axis.plot(epochs, [getattr(row, name)[member] for row in rows], color=colour, marker=marker, label=label)
        _draw_accuracy(axes[2], [row for row in history if row.validation or row.test], offset, colour, marker, member)
        offset += len(rows)
        for axis in axes:
            axis.axvline(offset + 0.5, color="0.85", linewidth=0.8)
    for axis, name in zip(axes, ("loss", "penalty", "error")):
        axis.set_ylabel(name)
        axis.grid(axis="y", color="0.92")
        _set_scale(axis)
    axes[2].yaxis.set_major_formatter(_percent)
    if axes[2].get_yscale() == "log":
        axes[2].yaxis.set_minor_formatter(_few_percents)
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].set_xlabel("epoch, over all stages")
    axes[0].legend(frameon=False, ncols=min(4, len(kinds_of)))
    kinds = [Line2D([], [], color="0.4", linestyle=style, label=name) for name, style in ACCURACIES.items()]
    axes[2].legend(handles=kinds, frameon=False, ncols=2)
    figure.suptitle(title)
    return _save(figure, path)


def _set_scale(axis: Any) -> None:
    """A log scale where there is anything to show on one: no error is left at 100 % accuracy, and no loss may be."""
    heights = [
        float(y) for line in axis.get_lines() if line.get_transform() is axis.transData for y in line.get_ydata()
    ]
    positive = [height for height in heights if 0 < height < math.inf]
    if positive:
        axis.set_yscale("log")
        axis.set_ylim(min(positive) / 1.3, max(positive) * 1.3)  # a zero among them runs out at the bottom
    else:
        axis.set_ylim(-0.002, 0.05)


def _draw_accuracy(axis: Any, rows: list[Any], offset: int, colour: str, marker: str | None, member: int) -> None:
    for name, style in ACCURACIES.items():
        found = [(offset + row.epoch, 1 - getattr(row, name)[member]) for row in rows if getattr(row, name)]
        if found:
            axis.plot(*zip(*found), style, color=colour, marker=marker)


def _few_percents(value: float, position: int | None = None) -> str:
    """A label for some of the ticks between powers of ten, as not all have room."""
    return _percent(value) if f"{value:e}"[0] in "235" else ""


def draw_rounds(path: Path, stages: Sequence[Mapping[str, Any]], title: str) -> Path:
    """Test accuracy against compression after every stage of a run that prunes more than once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    points = [(stage["compression"]["weights"], stage["accuracy"]["test"], stage) for stage in stages]
    points = [(size, accuracy, stage) for size, accuracy, stage in points if size is not None]
    axis.plot([size for size, _, _ in points], [accuracy for _, accuracy, _ in points], color="0.8", linewidth=1)
    kinds = list(dict.fromkeys(ROUND.sub("", stage["name"]) for _, _, stage in points))
    for place, kind in enumerate(kinds):
        own = [(size, accuracy) for size, accuracy, stage in points if ROUND.sub("", stage["name"]) == kind]
        axis.plot(*zip(*own), "o", color=COLOURS[place % len(COLOURS)], label=as_typed(kind), markersize=5)
    last = {stage["round"]: (size, accuracy) for size, accuracy, stage in points if stage["round"] is not None}
    for number, place in last.items():
        axis.annotate(str(number), place, textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_times)
    axis.xaxis.set_minor_formatter(lambda value, position=None: _times(value) if f"{value:e}"[0] in "25" else "")
    axis.yaxis.set_major_formatter(_percent)
    axis.grid(color="0.92")
    axis.set_xlabel("compression of the weights; numbers: the end of a round")
    axis.set_ylabel("test accuracy")
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False)
    return _save(figure, path)


def _times(value: float, position: int | None = None) -> str:
    return f"{value:.3g}×"


def draw_density(path: Path, layers: list[dict[str, Any]], title: str) -> Path:
    """The share of non-zeros of every weight, and of all weights together."""
    from matplotlib.figure import Figure

    weights = [layer for layer in layers if layer["kind"] == "weight"]
    nonzero, total = (sum(layer[key] for layer in weights) for key in ("nonzero", "total"))
    names = [layer["name"].removesuffix(".weight") for layer in weights] + ["all weights"]
    shares = [layer["density"] for layer in weights] + [nonzero / total if total else 0.0]
    counts = [layer["nonzero"] for layer in weights] + [nonzero]
    figure = Figure(figsize=(8, max(2.5, 0.6 + 0.32 * len(names))), layout="constrained")
    axis = figure.subplots()
    colours = ["#4477aa"] * len(weights) + ["#bbbbbb"]
    places = range(len(names))
    axis.barh(places, shares, color=colours)
    axis.set_yticks(places, labels=[as_typed(name) for name in names])
    axis.set_xscale("log")
    axis.set_xlim(min((share for share in shares if share > 0), default=0.1) / 3, 1)
    axis.xaxis.set_major_formatter(_percent)
    for row, (share, count) in enumerate(zip(shares, counts)):
        text = f"{share:.2%} ({count:,})"
        axis.text(1.01, row, text, va="center", fontsize=8, transform=axis.get_yaxis_transform())
    axis.invert_yaxis()
    axis.set_xlabel("non-zero share of the weights (log scale)")
    axis.set_title(title, fontsize=10)
    return _save(figure, path)


def draw_weights(path: Path, states: dict[str, Tensors], layers: list[dict[str, Any]], title: str) -> Path:
    """The distribution of weight magnitudes, each layer's before and after regularizing, and its threshold."""
    from matplotlib.figure import Figure

    names = [name for name, tensor in next(iter(states.values())).items() if tensor.ndim > 1][:12]
    thresholds = {layer["name"]: layer["threshold"] for layer in layers}
    columns = min(2, len(names))
    num_rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 0.6 + 2.4 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axis, name in zip(grid, names):
        for (label, state), colour in zip(states.items(), ("#4477aa", "#ee6677")):
            exponents = state[name].abs().float().clamp_min(SMALLEST).log10().flatten()
            counts = torch.histc(exponents, NUM_BINS, min=-8, max=2)
            edges = torch.logspace(-8, 2, NUM_BINS + 1)
            axis.stairs(counts.tolist(), edges.tolist(), color=colour, fill=True, alpha=0.55, label=label)
        if thresholds.get(name):
            axis.axvline(thresholds[name], color="0.2", linestyle="--", linewidth=1, label="threshold")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(as_typed(name.removesuffix(".weight")), fontsize=9)
        axis.minorticks_off()
    for axis in grid[len(names) :]:
        axis.set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    figure.supxlabel(f"|weight|; those below {SMALLEST:g} are drawn at the left edge", fontsize=9)
    figure.supylabel("number of weights", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)
