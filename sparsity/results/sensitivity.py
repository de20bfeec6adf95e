"""How accuracy falls as each layer alone is pruned: the table, the file and the picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.errors import ConfigError
from sparsity.files import write_text
from sparsity.results import csv_text, near
from sparsity.results.lines import legend, styles
from sparsity.results.pictures import as_typed, drawing, percent, save
from sparsity.streams import say
from sparsity.tables import Column, say_parts, show_table, width_of, wrapped

CSV, PICTURE = "sensitivity.csv", "sensitivity.png"
FIELDS = ("layer", "entries", "share", "pruned", "accuracy", "set", "network")
LITTLE = 0.01  # of accuracy, which a share may cost
ROUNDING = 1e-9


@dataclass(frozen=True)
class Curve:
    """What a network comes to with a share of one layer pruned."""

    layer: str  # the name of its weight
    entries: int
    pruned: list[float]  # at each of the shares: what really went, in whole units
    accuracies: list[float]  # in [0, 1]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of all layers of one network."""

    network: str  # whose, in words, such as after pretrain
    part: str  # the set that accuracy is of
    unit: str  # what went as one
    dense: float  # the accuracy of the network with nothing more pruned
    shares: list[float]  # that were asked for, rising
    curves: list[Curve]
    whole: list[str]  # the layers of which no unit may go
    title: str = ""


def safe_share(curve: Curve, found: Sensitivity) -> float | None:
    """The largest share that costs LITTLE of the accuracy or less, as all smaller ones do; None where none does."""
    safe = None
    for share, accuracy in zip(found.shares, curve.accuracies):
        if accuracy < found.dense - LITTLE - ROUNDING:
            break
        safe = share
    return safe


def show(found: Sensitivity) -> None:
    """A row a layer on stdout: the accuracies at the shares that there is room for, and the share that costs little."""
    curves = found.curves
    safe = [safe_share(curve, found) for curve in curves]
    at_shares = [
        Column(_in_table(share), [f"{curve.accuracies[place]:.2%}" for curve in curves], rank=rank)
        for place, (share, rank) in enumerate(zip(found.shares, _ranks(len(found.shares))))
    ]
    columns = [
        Column("layer", [_short(curve.layer) for curve in curves], True, cut="start", least=12),
        Column("entries", [f"{curve.entries:,}" for curve in curves], rank=len(at_shares) + 1),
        Column("harmless", ["–" if share is None else _in_table(share) for share in safe]),
        *at_shares,
    ]
    what = "entries" if found.unit == "entry" else f"units ({found.unit})"
    say(f"{found.network} {found.dense:.2%} on {found.part}")
    say(f"accuracy there with a share of one layer's {what} pruned:")
    show_table(columns)
    say(f"harmless: the share up to which it costs {100 * LITTLE:g} percentage point")
    if found.whole:
        say(wrapped([f"none of them may go: {', '.join(map(_short, found.whole))}"], width_of(sys.stdout)))


def _in_table(share: float) -> str:
    return f"{100 * share:.4g}%"


def _ranks(count: int) -> list[int]:
    """Which of some columns go first where room is short: every other one, then every other one of the rest, …"""
    left, ranks = list(range(count)), [1] * count
    rank = count
    while len(left) > 1:
        for place in left[-2::-2]:  # the last one stays to the end
            ranks[place], rank = rank, rank - 1
        left = left[::-1][::2][::-1]
    return ranks


def _short(name: str) -> str:
    return name.removesuffix(".weight")


# --- files -----------------------------------------------------------------------------------------------------------


def write(found: Sensitivity, folder: Path) -> None:
    """The file and the picture, into a folder that is made where it is missing."""
    rows = [
        {
            **{"layer": curve.layer, "entries": curve.entries, "share": share, "pruned": pruned},
            **{"accuracy": accuracy, "set": found.part, "network": found.network},
        }
        for curve in found.curves
        for share, pruned, accuracy in zip(found.shares, curve.pruned, curve.accuracies)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CSV, csv_text(FIELDS, rows))
        with drawing():
            draw(folder / PICTURE, found)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}: name another by --out") from error
    say_parts([f"{CSV}, {PICTURE} in {near(folder)}"])


def draw(path: Path, found: Sensitivity) -> Path:
    """Accuracy against share, one line a layer in the order of the network, and the accuracy of the whole network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(found.dense, color="0.45", linewidth=1, linestyle=(0, (1, 2)), label=f"{found.network}", zorder=1)
    for curve, style in zip(found.curves, styles(len(found.curves))):
        axis.plot(found.shares, curve.accuracies, label=as_typed(_short(curve.layer)), **style)
    _set_shares(axis, found.shares)
    axis.yaxis.set_major_formatter(percent)
    axis.grid(color="0.92")
    what = "its entries" if found.unit == "entry" else f"its units ({as_typed(found.unit)})"
    axis.set_xlabel(f"share of {what} that is pruned, of one layer alone; without training")
    axis.set_ylabel(f"accuracy on {found.part}")
    axis.set_title(as_typed(f"{found.title}: {found.network}"), fontsize=10)
    legend(figure, axis)
    return save(figure, path)


NEAR_ONE = 0.02  # how far beyond all the scale of shares ends, which spreads those that leave little
LEAST_GAP = 0.05  # of the axis, between two of its labels


def _set_shares(axis: Any, shares: Sequence[float]) -> None:
    """A scale that spreads the shares near 1, as one of what is left would, with labels where there is room."""
    import numpy

    def forward(share: Any) -> Any:
        return -numpy.log10(numpy.maximum(1 + NEAR_ONE - share, NEAR_ONE / 10))

    def inverse(place: Any) -> Any:
        return 1 + NEAR_ONE - 10.0**-place

    axis.set_xscale("function", functions=(forward, inverse))
    low, high = min(shares), max(shares)
    if low == high:
        low, high = max(0.0, low - 0.1), min(1.0, high + 0.1)
    axis.set_xlim(low, high)
    width, labelled = forward(high) - forward(low), []
    for share in sorted(shares, reverse=True):
        if not labelled or forward(labelled[-1]) - forward(share) >= LEAST_GAP * width:
            labelled.append(share)
    axis.set_xticks(labelled, labels=[percent(share) for share in labelled])
    axis.set_xticks(shares, minor=True)
