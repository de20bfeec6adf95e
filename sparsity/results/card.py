"""The proof card: what a run's networks take, dense, masked, compact and quantized side by side, as it was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity.results.pictures import COLOURS, as_typed, drawing, save
from sparsity.tables import Column, show_table

CARD = "card.png"
KINDS = ("dense", "masked", "compact", "quantized")
FIGURES = {  # their names on the card, as they are said, and the rank of a column that may be left out
    "parameters": ("parameters", "{:,}", 0),
    "nonzero": ("non-zeros", "{:,}", 0),
    "bytes": ("bytes", "{:,}", 0),
    "compressed": ("deflated", "{:,}", 4),
    "macs": ("MACs", "{:,}", 0),
    "structure": ("structure", "{}", 5),
    "accuracy": ("test", "{:.2%}", 0),
    "difference": ("differs", "{:.1g}", 3),
}
SIZES = ("parameters", "nonzero", "bytes", "compressed", "macs")  # that are drawn, each as a share of the first's


def show(card: Mapping[str, Any], latency: Mapping[str, Mapping[str, float]]) -> None:
    """The card as a table on stdout: one row a network, or a form of it; what was not measured is empty."""
    exports = card.get("exports") or {}
    rows = {kind: card[kind] for kind in KINDS if kind in card}
    rows |= {name: each | {"bytes": sum(each["files"].values())} for name, each in exports.items()}
    labels = [", ".join(exports[name]["files"]) if name in exports else name for name in rows]
    columns = [Column("network", labels, is_text=True)]
    for key, (name, form, rank) in FIGURES.items():
        cells = ["" if (value := row.get(key)) is None else form.format(value) for row in rows.values()]
        if any(cells):
            columns.append(Column(name, cells, rank=rank, cut="end"))
    for size in _batches(latency):
        found = [latency.get(name, {}).get(size) for name in rows]
        cells = ["" if seconds is None else f"{1e3 * seconds:.3g} ms" for seconds in found]
        columns.append(Column(f"{size} image{'s' * (size != '1')}", cells, rank=2))
    stays = card.get("stays") or {}
    caption = "; ".join(f"{count} dead units stay: {why}" for why, count in stays.items())
    show_table(columns, title="what is left, as a file and as a computation", caption=caption)


def draw(path: Path, card: Mapping[str, Any], latency: Mapping[str, Mapping[str, float]], title: str) -> Path:
    """The card as bars: each figure as a share of the masked network's, with its number."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    kinds = [kind for kind in KINDS if kind in card and kind != "dense"]
    rows = {FIGURES[key][0]: [card[kind].get(key) for kind in kinds] for key in SIZES}
    rows |= {f"ms, batch of {size}": [_ms(latency, kind, size) for kind in kinds] for size in _batches(latency)}
    rows = {name: values for name, values in rows.items() if values[0]}
    wholes = {name: values[0] for name, values in rows.items()} | {"non-zeros": card["masked"]["parameters"]}
    for export in card.get("exports") or {}:  # of the last of the networks, beside the masked one in PyTorch
        for size in latency.get(export, {}):
            rows[f"ms, {size}, {export}"] = [None] * (len(kinds) - 1) + [_ms(latency, export, size)]
            wholes[f"ms, {size}, {export}"] = _ms(latency, "masked", size)
    with drawing():
        figure = Figure(figsize=(8, 1.2 + 0.55 * len(rows)), layout="constrained")
        axis = figure.subplots()
        height = 0.8 / len(kinds)
        for place, kind in enumerate(kinds):
            for row, (name, values) in enumerate(rows.items()):
                if values[place] is None:
                    continue
                share, low = values[place] / wholes[name], row + place * height
                axis.barh(low, share, height, color=COLOURS[place % len(COLOURS)], label=kind if row == 0 else None)
                times = "" if share in (0, 1) else f"  {1 / share:.3g}× less" if share < 1 else f"  {share:.3g}×"
                axis.annotate(f" {_number(values[place])}{times}", (min(share, 1.0), low), va="center", fontsize=8)
        axis.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], list(rows))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.45)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("of the masked network's; non-zeros: of all its parameters")
        axis.legend(loc="lower right")
        axis.set_title(as_typed(title), fontsize=10)
        return save(figure, path)


def _batches(latency: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    return list(dict.fromkeys(size for each in latency.values() for size in each))


def _ms(latency: Mapping[str, Mapping[str, float]], kind: str, size: str) -> float | None:
    seconds = latency.get(kind, {}).get(size)
    return None if seconds is None else 1e3 * seconds


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
