"""One line a layer, however many there are: how lines are told apart, and the densities of layers on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.results.pictures import COLOURS, as_typed, percent, save

DASHES = ("-", (0, (4, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (1, 1.2)))
MARKERS = "osD^vPX"
MOST_ROWS = 30  # of a legend's column
MOST_NAMES = 24  # under an axis


@dataclass(frozen=True)
class Course:
    """The densities of parameters at places on the way: after stages, which have names, or after so many steps."""

    places: Sequence[int]
    shares: Mapping[str, Sequence[float]]  # by parameter, in [0, 1]
    names: Sequence[str] = ()  # of the places


def draw_densities(path: Path, course: Course, layers: Sequence[Mapping[str, Any]], title: str) -> Path:
    """The density of every weight after each stage or step, one line a layer, and of all weights together."""
    from matplotlib.figure import Figure

    sizes = {layer["name"]: layer["total"] for layer in layers if layer["kind"] == "weight"}
    whole = [1.0] * len(course.places)
    shares = {name: course.shares.get(name, whole) for name in sizes}  # what has no mask stays whole
    total = [sum(sizes[name] * shares[name][at] for name in sizes) / sum(sizes.values()) for at in range(len(whole))]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    how = {} if course.names else {"drawstyle": "steps-post"}  # masks stay until they change
    for (name, each), style in zip(shares.items(), styles(len(shares))):
        marker = {} if course.names or "marker" not in style else {"markevery": max(1, len(each) // 20)}
        axis.plot(course.places, each, label=as_typed(name.removesuffix(".weight")), **how, **style, **marker)
    axis.plot(course.places, total, color="0.1", linewidth=2.2, linestyle="--", label="all weights", **how)
    axis.set_yscale("log", nonpositive="clip")
    positive = [share for each in (*shares.values(), total) for share in each if share > 0]
    axis.set_ylim(min(positive, default=0.1) / 1.5, 1.15)  # a zero among them runs out at the bottom
    axis.yaxis.set_major_formatter(percent)
    axis.yaxis.set_minor_formatter(lambda value, position=None: percent(value) if f"{value:e}"[0] in "25" else "")
    if course.names:
        every = -(-len(course.names) // MOST_NAMES)
        places, names = course.places[::every], [as_typed(name) for name in course.names[::every]]
        axis.set_xticks(places, labels=names, rotation=0 if len(course.names) < 6 else 40, fontsize=8)
        axis.set_xticks(course.places, minor=True)
        for label in axis.get_xticklabels() if len(course.names) > 5 else ():
            label.set_horizontalalignment("right"), label.set_rotation_mode("anchor")
    axis.set_xlabel("after the stage" if course.names else "step of the stage that prunes while it trains")
    axis.set_ylabel("density (log scale)")
    axis.grid(color="0.92")
    axis.set_title(title, fontsize=10)
    legend(figure, axis)
    return save(figure, path)


def styles(count: int) -> list[dict[str, Any]]:
    """How so many lines are told apart by eyes of any kind: few by colours and markers; many by dashes, and a colour
    that goes from dark to light in their order.
    """
    import matplotlib

    if count <= len(COLOURS):
        pairs = zip(COLOURS[:count], MARKERS)
        return [{"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4} for colour, marker in pairs]
    colours = matplotlib.colormaps["viridis"]
    return [
        {"color": colours(0.92 * place / (count - 1)), "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.2}
        for place in range(count)
    ]


def legend(figure: Any, axis: Any) -> None:
    """The names of an axis's lines beside it, in as many columns as they need."""
    columns = -(-len(axis.get_lines()) // MOST_ROWS)
    figure.set_figwidth(figure.get_figwidth() + 1.4 * (columns - 1))
    size = 8 if columns == 1 else 6.5
    figure.legend(loc="outside right upper", frameon=False, ncols=columns, fontsize=size, handlelength=2.8)
