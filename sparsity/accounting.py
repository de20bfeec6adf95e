"""What is left of a network: per tensor and whole, non-zeros, live structure and multiply-accumulates (MACs)."""

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.graph import Layer
from sparsity.tensors import Layout, Tensors, nonzero, to_view


@dataclass(frozen=True)
class Row:
    """One parameter tensor."""

    name: str
    kind: str  # weight, bias, normalization, scale or other
    shape: list[int]
    std: float  # population form
    threshold: float | None  # the rule's, where it has one
    nonzero: int
    total: int
    density: float
    live_inputs: int | None  # inputs with a non-zero weight; None where the tensor is no weight
    live_outputs: int | None
    macs: int | None  # None where the tensor is no linear or convolution weight


class Report(NamedTuple):
    """A whole network."""

    rows: list[Row]
    nonzero: dict[str, int]  # weights: without biases and the rest; parameters: everything
    total: dict[str, int]
    compression: dict[str, float | None]  # total / nonzero; None where nothing is left
    macs: dict[str, int]  # dense and pruned
    structure: str  # what is left, as the papers write it
    dense_structure: str


class Live(NamedTuple):
    """How many inputs and outputs of a layer count, in each of its groups."""

    inputs: list[int]
    outputs: list[int]


def account(
    parameters: Tensors,
    layouts: dict[str, Layout],
    graph: dict[str, Layer],
    *,
    stds: dict[str, float] | None = None,
    thresholds: dict[str, float] | None = None,
) -> Report:
    """The report on one member's parameters.

    stds and thresholds: by name, those that the rule saw; without stds, the parameters' own are shown.
    """
    views = {name: to_view(parameter, layouts[name]) for name, parameter in parameters.items()}
    live = _agree(views, graph)
    dense = _agree({name: torch.ones_like(view) for name, view in views.items() if name in graph}, graph)
    macs = {name: _macs(graph[name], views[name], live[name]) for name in graph}
    stds = stds or {name: standard_deviation(parameter) for name, parameter in parameters.items()}
    rows = [
        _row(name, parameter, layouts[name], views[name], stds[name], (thresholds or {}).get(name), macs.get(name))
        for name, parameter in parameters.items()
    ]
    left, total = ({kind: _sum(rows, kind, field) for kind in ("weights", "parameters")} for field in COUNTS)
    return Report(
        rows=rows,
        nonzero=left,
        total=total,
        compression={kind: total[kind] / left[kind] if left[kind] else None for kind in total},
        macs={
            "dense": sum(_macs(graph[name], views[name], dense[name]) for name in graph),
            "pruned": sum(macs.values()),
        },
        structure=_structure(graph, live),
        dense_structure=_structure(graph, dense),
    )


COUNTS = ("nonzero", "total")


def standard_deviation(parameter: Tensor) -> float:
    """The standard deviation of a tensor's entries, population form (ddof 0)."""
    return parameter.double().std(correction=0).item()


def _row(
    name: str,
    parameter: Tensor,
    layout: Layout,
    view: Tensor,
    std: float,
    threshold: float | None,
    macs: int | None,
) -> Row:
    is_weight = layout.kind == "weight"
    count, total = int(nonzero(parameter).sum()), parameter.numel()
    return Row(
        name=name,
        kind=layout.kind,
        shape=list(parameter.shape),
        std=std,
        threshold=threshold,
        nonzero=count,
        total=total,
        density=count / total,
        live_inputs=int(live_inputs(view).sum()) if is_weight else None,
        live_outputs=int(live_outputs(view).sum()) if is_weight else None,
        macs=macs,
    )


def _sum(rows: list[Row], kind: str, field: str) -> int:
    return sum(getattr(row, field) for row in rows if kind == "parameters" or row.kind == "weight")


def live_inputs(view: Tensor) -> Tensor:
    """Which inputs have a non-zero weight: bool [groups · inputs], in the order of the input's channels."""
    return nonzero(view).any(3).any(1).flatten()


def live_outputs(view: Tensor) -> Tensor:
    """Which outputs have a non-zero weight: bool [groups · outputs]."""
    return nonzero(view).any(3).any(2).flatten()


def _agree(views: Tensors, graph: dict[str, Layer]) -> dict[str, Live]:
    """Live inputs and outputs of every layer; where one layer's outputs are another's inputs, the smaller counts.

    A flattened input counts `spread` for each channel of its source, and a channel is read while any of them is.
    """
    own_inputs = {name: live_inputs(views[name]) for name in graph}
    own_outputs = {name: live_outputs(views[name]) for name in graph}

    def smaller(own: Tensor, other: Tensor | None, name: str) -> list[int]:
        groups = len(views[name])
        counts = _count(own, groups)
        return counts if other is None else [min(pair) for pair in zip(counts, _count(other, groups))]

    def inputs(layer: Layer) -> list[int]:
        given = None if layer.source is None else own_outputs[layer.source].repeat_interleave(layer.spread)
        return smaller(own_inputs[layer.name], given, layer.name)

    def outputs(layer: Layer) -> list[int]:
        read = None if layer.target is None else own_inputs[layer.target].view(-1, graph[layer.target].spread).any(1)
        return smaller(own_outputs[layer.name], read, layer.name)

    return {name: Live(inputs(layer), outputs(layer)) for name, layer in graph.items()}


def _count(live: Tensor, groups: int) -> list[int]:
    """How many are live in each of the groups."""
    return live.view(groups, -1).sum(1).tolist()


def _macs(layer: Layer, view: Tensor, live: Live) -> int:
    """Σ over groups of live inputs · live outputs, · kernel size · output positions."""
    return sum(map(operator.mul, live.inputs, live.outputs)) * view.shape[3] * layer.num_positions


def _structure(graph: dict[str, Layer], live: dict[str, Live]) -> str:
    """Live units between layers: the inputs of a first or flattened linear layer, and every output but the last.

    784-300-100 for LeNet-300-100 (inputs-hidden-hidden), 20-50-800-500 for LeNet-5 (filters-filters-inputs-hidden).
    """
    names, parts = list(graph), []
    for position, name in enumerate(names):
        layer = graph[name]
        if layer.spread > 1 or (position == 0 and layer.num_positions == 1):
            parts.append(sum(live[name].inputs))
        if position < len(names) - 1:
            parts.append(sum(live[name].outputs))
    return "-".join(map(str, parts))
