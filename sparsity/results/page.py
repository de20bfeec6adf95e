"""The front as a page, `pareto.html`: pointing at a point shows it, a click its command; it needs no network."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

from sparsity.files import write_text
from sparsity.front import SIZES
from sparsity.results import macs_left
from sparsity.results.pareto import (
    LOG_SPAN,
    MARKERS,
    MOST_DENSE,
    NUM_SHADES,
    PUBLISHED_KINDS,
    Colours,
    Dense,
    View,
    bar_ticks,
    category,
    label,
    notes,
    shades,
)
from sparsity.results.points import describe
from sparsity.results.sealed import finite
from sparsity.results.summaries import Summary

TEMPLATE = Path(__file__).with_name("pareto.html")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x")  # MARKERS, as plotly calls them
PUBLISHED_SYMBOLS = {"element": "x-thin-open", "structured": "square-open"}
DASHES = ("dash", "dot", "dashdot", "longdash")  # as plotly calls those of the picture
DECADES = 12  # of tick marks


def write(path: Path, view: View, summary: Summary) -> None:
    """The page as a file."""
    write_text(path, page_of(view, summary))


def page_of(view: View, summary: Summary) -> str:
    """The picture as a page that needs no network: pointing shows a point, a click its command."""
    from plotly.offline import get_plotlyjs

    details = [describe(spot.point, summary.objectives, summary.out) for spot in view.spots]
    content = {"traces": _traces(view, details), "layout": _layout(view), "points": details, "notes": notes(view)}
    text = json.dumps(finite(content), allow_nan=False)
    parts = {"CONTENT": text.replace("<", r"\u003c"), "PLOTLY": get_plotlyjs()}  # such that no value ends the script
    return re.sub(r"/\*(CONTENT|PLOTLY)\*/", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def _traces(view: View, details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = list(range(len(view.spots)))
    groups = {None: places}
    if view.colours.key is not None and not view.colours.numeric:
        groups = {value: [i for i in places if view.colours.values[i] == value] for value in view.colours.categories}
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "front, selected on validation",
            "hoverinfo": "skip",
            "x": [spot.x for spot in view.front],
            "y": [spot.y for spot in view.front],
            "line": {"color": "#000", "width": 1.5},
            "marker": {"symbol": "circle-open", "size": 13, "color": "#000", "line": {"width": 2}},
        }
    ]
    points = [_trace(view, details, value, members, place) for place, (value, members) in enumerate(groups.items())]
    return [*_published_traces(view), *lines, *_seed_traces(view), *points]


def _seed_traces(view: View) -> list[dict[str, Any]]:
    """Each seed of points that have too few for an interval."""
    seeds = [place for spot in view.spots if spot.y >= view.floor for place in spot.seeds]
    if not seeds:
        return []
    x, y = zip(*seeds)
    look = {"marker": {"size": 5, "color": "#999"}, "hoverinfo": "skip", "name": "each of 2 seeds"}
    return [{"type": "scatter", "mode": "markers", "x": x, "y": y, **look}]


def _published_traces(view: View) -> list[dict[str, Any]]:
    traces = []
    for kind, symbol in PUBLISHED_SYMBOLS.items():
        found = [entry for entry in view.published if entry.kind == kind]
        if found:
            marker = {"symbol": symbol, "color": "#777", "size": 8, "line": {"width": 1.5, "color": "#777"}}
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": f"published, {PUBLISHED_KINDS[kind]}",
                    "marker": marker,
                    "x": [entry.x for entry in found],
                    "y": [entry.y for entry in found],
                    "text": [html.escape(entry.label) for entry in found],
                    "hovertemplate": "%{text}<br>%{y:.2%} at %{x:,}<extra></extra>",
                }
            )
    return traces


def _trace(view: View, details: list[dict[str, Any]], value: Any, places: list[int], place: int) -> dict[str, Any]:
    """The points of one value of the key that colours, or all."""
    spots = [view.spots[index] for index in places]
    bars = [(0.0, 0.0) if spot.y < view.floor else (spot.x_interval, spot.y_interval) for spot in spots]
    marker = {"size": 10, "symbol": SYMBOLS[MARKERS.index(category(place)[1])]}
    marker |= _colour_scale(view.colours) if view.colours.numeric else {"color": category(place)[0]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "points" if value is None else html.escape(label(view, value)),
        "x": [spot.x for spot in spots],
        "y": [spot.y for spot in spots],
        "marker": marker,
        "customdata": places,
        "error_x": _bars([x for x, _ in bars]),
        "error_y": _bars([y for _, y in bars]),
        "text": [_hover(details[index]) for index in places],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _bars(intervals: list[float]) -> dict[str, Any]:
    return {"type": "data", "array": intervals, "thickness": 1, "width": 0, "visible": any(intervals), "color": "#999"}


def _colour_scale(colours: Colours) -> dict[str, Any]:
    from matplotlib.colors import to_hex

    shade = shades()
    scale = [[step / (NUM_SHADES - 1), to_hex(shade(step))] for step in range(NUM_SHADES)]
    place = math.log10 if colours.is_log else float
    ticks = bar_ticks(colours)
    bar = {
        "title": {"text": html.escape(colours.key), "side": "top"},
        "tickvals": [*map(place, ticks)],
        "thickness": 14,
    }
    bar["ticktext"] = [f"{value:g}" for value in ticks]
    return {"color": [*map(place, colours.values)], "colorscale": scale, "colorbar": bar}


def _hover(detail: dict[str, Any]) -> str:
    """A point in a few lines."""
    accuracy, count = detail["accuracy"], len(detail["seeds"])
    figures = [f"test {_percent(accuracy['test'])}", f"validation {_percent(accuracy['validation'])}"]
    macs = {name: round(number) for name, number in detail["macs"].items()}
    size = f"compression {detail['compression']['weights'] or math.inf:.1f}×, {macs_left(macs)}"
    folder = detail["best_folder"] + (f" (best of {count} seeds)" if count > 1 else "")
    lines = [" ".join(detail["overrides"]), ", ".join(figures), size, folder]
    return "<br>".join(html.escape(line) for line in lines)


def _percent(estimate: dict[str, float | None]) -> str:
    if estimate["mean"] is None:
        return "–"
    if estimate["interval"] is None:
        return f"{', '.join(f'{100 * number:.2f}' for number in estimate['seeds'])}%"
    return f"{estimate['mean']:.2%} ± {100 * estimate['interval']:.2f}"


def _layout(view: View) -> dict[str, Any]:
    across = {"type": "log", "title": {"text": SIZES[view.size].label}, "gridcolor": "#eee", **_ticks(view)}
    up = {"title": {"text": "test accuracy"}, "tickformat": ".2~%", "range": view.heights, "gridcolor": "#eee"}
    return {
        "xaxis": across,
        "yaxis": up,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "plot_bgcolor": "#fff",
        "margin": {"t": 60, "r": 20, "l": 80},
        "shapes": [_line(dense, place) for place, dense in enumerate(view.dense[:MOST_DENSE])],
    }


def _line(dense: Dense, place: int) -> dict[str, Any]:
    """The accuracy of a dense network, across the picture."""
    name = {"text": f"{html.escape(dense.label)}, {dense.y:.2%}", "font": {"size": 11, "color": "#555"}}
    ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": dense.y, "y1": dense.y}
    look = {"color": "#555", "width": 1, "dash": DASHES[place]}
    return {"type": "line", **ends, "line": look, "layer": "below", "label": {**name, "textposition": "end"}}


def _ticks(view: View) -> dict[str, Any]:
    """Plain numbers on an axis that spans more than a power of ten; otherwise the library's own."""
    sizes = [entry.x for entry in (*view.spots, *view.published)]
    if not sizes or max(sizes) <= LOG_SPAN * min(sizes):
        return {}
    ticks = [step * 10**power for power in range(DECADES) for step in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}
