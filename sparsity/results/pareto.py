"""The front as a picture for a paper, `pareto.png`: accuracy against size."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsity.files import whole
from sparsity.front import OBJECTIVES, SIZES
from sparsity.results.members import canonical
from sparsity.results.pictures import as_typed, drawing
from sparsity.results.points import DENSE, FEWEST, TEST, Point, size_objective
from sparsity.results.summaries import Summary

PUBLISHED = Path(__file__).with_name("published.csv")
PUBLISHED_KINDS = {"element": "single weights pruned", "structured": "whole units pruned"}
PUBLISHED_MARKERS = {"element": "x", "structured": "s"}

# Tol's bright colours, which the colour-blind tell apart
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
MARKERS = ("o", "s", "D", "^", "P", "v", "X")
PALEST = 0.9  # of viridis: its yellow end is too pale on white
NUM_SHADES = 64
EDGE = 0.025  # share of the axis at which a point below it is drawn
LOG_SPAN = 10  # values that span more are coloured on a log scale
MAX_TICKS = 6  # distinct values that the colour bar names one by one
WORST_SHOWN, LEAST_SHOWN = 4, 0.02  # the axis goes down to this many times the best error, and so much below it
LEAST_FACTOR = 1.5  # between the ends of the size's axis, as far as bars are to be shown
MOST_DENSE, DASHES = 4, ("--", ":", "-.", (0, (8, 3)))  # lines of dense networks
WIDTH, HEIGHT, LEGEND_LINE = 4.8, 3.5, 0.115  # inches
DPI = 240
SMALL, TINY = 7, 5.5  # points of type


class Spot(NamedTuple):
    """Where a point lies in the picture."""

    x: float
    y: float
    x_interval: float
    y_interval: float
    point: Point
    seeds: Sequence[tuple[float, float]] = ()  # where each seed lies, of too few for an interval


class Dense(NamedTuple):
    """A network before anything is pruned."""

    label: str
    y: float


class Published(NamedTuple):
    """A published result of the same network."""

    label: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """What both pictures show."""

    size: str  # the objective on the x-axis
    spots: list[Spot]
    front: list[Spot]
    hidden: int  # points without a size, of which nothing is left
    floor: float  # accuracies below are drawn at the lower edge
    colours: "Colours"
    published: list[Published]
    dense: list[Dense]

    @property
    def heights(self) -> tuple[float, float]:
        """The ends of the y-axis, 100 % at most; bars that are longer than what it has to show reach out of it."""
        seeds = [y for spot in self.spots for _, y in spot.seeds]
        points = [entry.y for entry in (*self.spots, *self.published, *self.dense)]
        shown = [y for y in (*points, *seeds) if y >= self.floor]
        span = max(max(shown, default=1.0) - min(shown, default=0.0), LEAST_SHOWN)
        bars = [spot for spot in self.spots if spot.y >= self.floor and spot.y_interval <= span]
        ends = [max(spot.y + sign * spot.y_interval, self.floor) for spot in bars for sign in (-1, 1)]
        low, high = limits([*shown, *ends])
        return low, min(high, 1.0)

    @property
    def widths(self) -> tuple[float, float]:
        """The ends of the x-axis, which is a log scale; bars longer than what it has to show reach out of it."""
        seeds = [math.log(x) for spot in self.spots for x, _ in spot.seeds]
        shown = [*(math.log(entry.x) for entry in (*self.spots, *self.published)), *seeds]
        span = max(max(shown, default=1.0) - min(shown, default=0.0), math.log(LEAST_FACTOR))
        bars = [(math.log(x - _left(spot)), math.log(x + spot.x_interval)) for spot in self.spots for x in [spot.x]]
        ends = [end for bar in bars if bar[1] - bar[0] <= 2 * span for end in bar]
        return limits([*shown, *ends], math.exp)

    def is_kept(self, spot: Spot) -> bool:
        """Whether a point is on the front."""
        return any(spot is other for other in self.front)


def draw(path: Path, view: View) -> None:
    """The picture as a PNG file."""
    with drawing(), whole(path) as temporary:
        figure_of(view).savefig(temporary, dpi=DPI, format="png")


def view_of(summary: Summary, color_by: str | None, published: bool) -> View:
    """What the pictures of a summary show."""
    size = size_objective(summary.objectives)
    spots = {id(point): spot for point in summary.points if (spot := _spot(point, size)) is not None}
    others = _published(summary.points, size) if published else []
    heights = [spot.y for spot in spots.values()] + [other.y for other in others]
    front = sorted((spots[id(point)] for point in summary.front if id(point) in spots), key=lambda spot: spot.x)
    found = list(spots.values())
    colours = colours_of([spot.point for spot in found], color_by or _first_varied(summary))
    hidden = len(summary.points) - len(found)
    return View(size, found, front, hidden, _floor(heights), colours, others, dense_of(summary.points))


def _spot(point: Point, size: str) -> Spot | None:
    x, y = point.estimate(OBJECTIVES[size].key), point.estimate(TEST)
    if not x.mean or y.mean is None:
        return None
    has_dots = 1 < len(point.members) < FEWEST
    seeds = list(zip(point.numbers(OBJECTIVES[size].key), point.numbers(TEST))) if has_dots else []
    return Spot(x.mean, y.mean, x.interval or 0.0, y.interval or 0.0, point, seeds)


def dense_of(points: Sequence[Point]) -> list[Dense]:
    """The test accuracy of each network before it is pruned, the mean over what differs: seeds, or their training."""
    keys = sorted({key for point in points for key in point.members[0].settings if key.split(".")[0] == "model"})
    found: dict[tuple[str | None, ...], set[tuple[str | None, float]]] = {}
    for point in points:
        network = tuple(point.value(key) for key in keys)
        numbers = zip(point.members, point.numbers(DENSE))
        found.setdefault(network, set()).update((member.seed, each) for member, each in numbers if each is not None)
    means = {network: math.fsum(each for _, each in seeds) / len(seeds) for network, seeds in found.items() if seeds}
    varied = [place for place, values in enumerate(zip(*means)) if len(set(values)) > 1]
    return [
        Dense(", ".join(["dense", *(f"{keys[place]}={network[place]}" for place in varied)]), mean)
        for network, mean in means.items()
    ]


def _floor(accuracies: Sequence[float]) -> float:
    """The accuracy at which the y-axis ends, such that collapsed networks do not squeeze the others together."""
    error = 1 - max(accuracies, default=1.0)
    return 1 - max(WORST_SHOWN * error, error + LEAST_SHOWN)


def _first_varied(summary: Summary) -> str | None:
    """The first swept key, other than the seed, that differs between points."""
    keys = [key for key in summary.swept if key != "seed"]
    return next((key for key in keys if len({canonical(point.value(key)) for point in summary.points}) > 1), None)


def _published(points: Sequence[Point], size: str) -> list[Published]:
    """The published results of the networks of these points that say both an accuracy and the size."""
    networks = {point.value("model") for point in points}
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] in networks]
    column = SIZES[size].published
    known = [row for row in rows if column and row[column] and row["accuracy_pct"]]
    found = [
        Published(f"{row['method']}, {row['year']}", row["kind"], float(row[column]), float(row["accuracy_pct"]) / 100)
        for row in known
    ]
    return sorted(found, key=lambda entry: (entry.kind, entry.x))


# --- colours ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours:
    """The colour of each point by the value of one key."""

    key: str | None
    values: list[Any]  # of each point: numbers, or texts
    numeric: bool

    @property
    def categories(self) -> list[Any]:
        """The distinct values in order."""
        return sorted(set(self.values)) if self.numeric else list(dict.fromkeys(self.values))

    @property
    def is_log(self) -> bool:
        """Whether numbers are coloured on a log scale."""
        return self.numeric and min(self.values) > 0 and max(self.values) > LOG_SPAN * min(self.values)


def colours_of(points: Sequence[Point], key: str | None) -> Colours:
    """The colours of points by a key: a scale for numbers, apart from one another for anything else."""
    texts = [None if key is None else point.value(key) for point in points]
    values = [canonical(text) for text in texts]
    numeric = len(set(values)) > 1 and all(isinstance(value, float) and math.isfinite(value) for value in values)
    return Colours(key, values if numeric else [text or "–" for text in texts], numeric)


def shades() -> Any:
    """Viridis without its pale end."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["viridis"](PALEST * step / (NUM_SHADES - 1)) for step in range(NUM_SHADES)])


# --- pareto.png ------------------------------------------------------------------------------------------------------


def figure_of(view: View) -> Any:
    """The picture for a paper: one column wide."""
    from matplotlib.figure import Figure

    num_lines = math.ceil(len(view.published) / 2)
    figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_LINE * num_lines), layout="constrained")
    axis = figure.subplots()
    _set_axes(axis, view)
    _draw_front(axis, view)
    _draw_dense(axis, view)
    _draw_published(axis, view)
    _draw_points(axis, view)
    _add_legend(figure, axis, view)
    figure.draw_without_rendering()  # only then it is known where on the paper a point lies
    _number_published(axis, view)
    return figure


def _set_axes(axis: Any, view: View) -> None:
    axis.set_xscale("log")
    axis.set_xlim(*view.widths)
    axis.set_ylim(*view.heights)
    axis.set_xlabel(SIZES[view.size].label, fontsize=SMALL + 1)
    axis.set_ylabel("test accuracy", fontsize=SMALL + 1)
    axis.tick_params(labelsize=SMALL)
    axis.grid(color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_formatter(lambda value, position: f"{100 * value:.4g} %")
    _set_ticks(axis)


def limits(values: Sequence[float], back: Any = float) -> tuple[float, float]:
    """The ends of an axis that has room around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.07 * (high - low) or 0.01
    return back(low - room), back(high + room)


def _set_ticks(axis: Any) -> None:
    """Ticks of a log axis that are plain numbers, also where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    few = high < LOG_SPAN / 2 * low
    axis.xaxis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_published(axis: Any, view: View) -> None:
    for kind, marker in PUBLISHED_MARKERS.items():
        found = [(entry.x, entry.y) for entry in view.published if entry.kind == kind]
        if found:
            style = {"facecolors": "none", "edgecolors": "0.5"} if marker == "s" else {"color": "0.5"}
            label = f"published, {PUBLISHED_KINDS[kind]}"
            axis.scatter(*zip(*found), s=14, marker=marker, linewidths=0.8, zorder=1.5, label=label, **style)


def _draw_front(axis: Any, view: View) -> None:
    shown = [(spot.x, spot.y) for spot in view.front if spot.y >= view.floor]
    if view.front:
        look = {"marker": "o", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 0.8}
        line = axis.plot(*zip(*shown or [(math.nan, math.nan)]), color="black", linewidth=0.9, zorder=2, **look)
        line[0].set_label("front, selected on validation")


def _draw_dense(axis: Any, view: View) -> None:
    for place, dense in enumerate(view.dense[:MOST_DENSE]):
        name = as_typed(f"{dense.label}, {100 * dense.y:.2f} %")
        axis.axhline(dense.y, color="0.35", linewidth=0.8, linestyle=DASHES[place], zorder=1.2, label=name)


def _draw_points(axis: Any, view: View) -> None:
    for spot, (colour, marker) in zip(view.spots, _looks(view)):
        kept = view.is_kept(spot)
        look = {"s": 20, "color": colour, "zorder": 4 if kept else 3, "linewidths": 0.8 if kept else 0}
        look |= {"edgecolors": "black"} if kept else {}
        look["clip_on"] = False  # at 100 %, the end of the axis, a point is whole
        if spot.y < view.floor:
            axis.scatter([spot.x], [EDGE], marker="v", transform=axis.get_xaxis_transform(), **look)
            continue
        if spot.y_interval:
            _draw_bars(axis, spot, colour)
        if spot.seeds:
            axis.plot(*zip(*spot.seeds), color=colour, marker=".", markersize=3, linewidth=0.6, alpha=0.6, zorder=2.5)
        axis.scatter([spot.x], [spot.y], marker=marker, **look)


def _draw_bars(axis: Any, spot: Spot, colour: Any) -> None:
    bars = {"xerr": [[_left(spot)], [spot.x_interval]], "yerr": spot.y_interval}
    axis.errorbar([spot.x], [spot.y], fmt="none", ecolor=colour, elinewidth=0.6, alpha=0.5, zorder=2.5, **bars)


def _left(spot: Spot) -> float:
    """The length of the bar to the left: a log axis ends above 0."""
    return min(spot.x_interval, 0.9 * spot.x)


def _looks(view: View) -> list[tuple[Any, str]]:
    """The colour and the marker of each point."""
    colours = view.colours
    if colours.numeric:
        norm, scale = _norm(colours), shades()
        return [(scale(norm(value)), MARKERS[0]) for value in colours.values]
    places = [colours.categories.index(value) for value in colours.values]
    return [category(place) for place in places]


def category(place: int) -> tuple[str, str]:
    """The colour and the marker of a value."""
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _norm(colours: Colours) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if colours.is_log else Normalize)(min(colours.values), max(colours.values))


def _add_legend(figure: Any, axis: Any, view: View) -> None:
    from matplotlib.lines import Line2D

    handles = axis.get_legend_handles_labels()[0]
    if view.colours.numeric:
        _add_colour_bar(figure, axis, view.colours)
    elif view.colours.key is not None:
        for place, value in enumerate(view.colours.categories):
            colour, marker = category(place)
            handles.append(
                Line2D(
                    [], [], linestyle="", color=colour, marker=marker, markersize=4, label=as_typed(label(view, value))
                )
            )
    for number, entry in enumerate(view.published, 1):
        handles.append(Line2D([], [], linestyle="", label=f"{number}  {entry.label}"))
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=_legend_size(view),
        title="\n".join(notes(view)),
        title_fontsize=TINY + 0.5,
        alignment="left",
        labelspacing=0.3,
        handlelength=1.6,
    )
    legend.get_title().set_color("0.3")


def _legend_size(view: View) -> float:
    return TINY if view.published else SMALL - 0.5


def label(view: View, value: str) -> str:
    """A value of the key that colours, in the legend."""
    return f"{view.colours.key}={value}"


def _add_colour_bar(figure: Any, axis: Any, colours: Colours) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(_norm(colours), shades()), ax=axis, pad=0.02, aspect=30)
    bar.set_label(as_typed(colours.key), fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    ticks = bar_ticks(colours)
    bar.set_ticks(ticks, labels=[f"{value:g}" for value in ticks])
    bar.ax.minorticks_off()


def bar_ticks(colours: Colours) -> list[float]:
    """The numbers that the colour bar names: the values where they are few, else round ones."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if len(colours.categories) <= MAX_TICKS:
        return colours.categories
    low, high = min(colours.values), max(colours.values)
    locator = LogLocator(subs=(1, 2, 5), numticks=99) if colours.is_log else MaxNLocator(MAX_TICKS)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def notes(view: View) -> list[str]:
    """What has to be known to read the picture."""
    lines = []
    num_seeds = sorted({len(spot.point.members) for spot in view.spots if spot.y_interval})
    if num_seeds:
        seeds = "–".join(map(str, dict.fromkeys((num_seeds[0], num_seeds[-1]))))
        lines.append(f"means over {seeds} seeds; bars: 95 % intervals of the means")
    if any(spot.seeds for spot in view.spots):
        lines.append("means over 2 seeds; dots: each of them")
    low = [spot.y for spot in view.spots if spot.y < view.floor]
    if low:
        lines.append(f"▼: {len(low)} below the axis, down to {100 * min(low):.1f} %")
    if view.hidden:
        lines.append(f"not drawn: {view.hidden} of which nothing is left")
    return lines


OFFSETS = [
    (5, 0),
    (-5, 0),
    (0, 6),
    (0, -6),
    (4, 5),
    (-4, 5),
    (4, -5),
    (-4, -5),
]  # of a number from its marker, in points
OFFSETS += [(2 * across, 2 * up) for across, up in OFFSETS]


def _number_published(axis: Any, view: View) -> None:
    """Puts the number of each published result beside its marker, where most room is."""
    to_points = axis.transData.transform
    scale = 72 / axis.figure.dpi
    spots = [tuple(scale * to_points((entry.x, entry.y))) for entry in (*view.published, *view.spots)]
    taken = list(spots)
    for number, entry in enumerate(view.published, 1):
        x, y = spots[number - 1]
        offset = min(OFFSETS, key=lambda offset: _crowding((x + offset[0], y + offset[1]), taken, offset))
        taken.append((x + offset[0], y + offset[1]))
        text = axis.annotate(
            str(number),
            (entry.x, entry.y),
            xytext=offset,
            textcoords="offset points",
            fontsize=TINY,
            color="0.35",
            ha="center",
            va="center",
        )
        text.set_in_layout(False)


def _crowding(place: tuple[float, float], taken: Sequence[tuple[float, float]], offset: tuple[int, int]) -> float:
    """How much is near a place, in points: what is there is about six wide; far from the marker costs a little."""
    near = (math.hypot((place[0] - x) / 1.2, place[1] - y) for x, y in taken)
    return sum(max(0.0, 6 - distance) for distance in near) + 0.05 * math.hypot(*offset)
