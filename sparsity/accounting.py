"""What is left of a network: per tensor and whole, non-zeros, live structure and multiply-accumulates (MACs)."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.graph import Facts, Layer, LayerUse, Units
from sparsity.tensors import Layout, Tensors, to_view


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
    macs: int | None  # as papers count; None where the tensor multiplies no activations
    macs_removable: int | None = None  # what is left of them once all that can be cut out is


class Report(NamedTuple):
    """A whole network."""

    rows: list[Row]
    nonzero: dict[str, int]  # weights: without biases and the rest; parameters: everything
    total: dict[str, int]
    compression: dict[str, float | None]  # total / nonzero; None where nothing is left
    macs: dict[str, int]  # dense; pruned, as papers count; removable: left once all that can be cut out is
    structure: str  # what is left, as papers write it
    dense_structure: str
    structure_removable: str = ""  # what is left once all that can be cut out is


class Live(NamedTuple):
    """How many inputs and outputs of a layer count, in each of its groups."""

    inputs: list[int]
    outputs: list[int]


def account(
    parameters: Tensors,
    layouts: dict[str, Layout],
    graph: Mapping[str, Layer],
    *,
    buffers: Tensors | None = None,
    stds: dict[str, float] | None = None,
    thresholds: dict[str, float] | None = None,
) -> Report:
    """The report on one member's parameters.

    graph: from `trace`; without units, nothing is known to be removable. buffers: of the member; running statistics
    that are not given count as other than 0. stds and thresholds: by name, those that the rule saw; without stds, the
    parameters' own are shown.
    """
    facts = Facts({**parameters, **(buffers or {})})
    views = {name: to_view(facts.of(name), layouts[name]) for name in parameters}
    live = _agree(views, graph)
    dense = {name: Live([view.shape[2]] * len(view), [view.shape[1]] * len(view)) for name, view in views.items()}
    units: Units = getattr(graph, "units", None) or Units.none()
    uses = _uses(graph, units)
    kept = units.kept(facts)[units.of]  # by slot
    whole = torch.ones_like(kept)
    macs = {name: _macs(layer, views[name], live[name], uses[name], facts) for name, layer in graph.items()}
    removable, total = (
        {name: _cut_macs(layer, views[name], uses[name], slots) for name, layer in graph.items()}
        for slots in (kept, whole)
    )
    others = [*units.matmuls, *(use for use in units.layers if use.weight not in graph)]
    products, all_products = (sum(each.macs(slots) for each in others) for slots in (kept, whole))
    rows = [
        _row(
            name,
            parameter,
            layouts[name],
            views[name],
            std=stds[name] if stds else standard_deviation(parameter),
            threshold=(thresholds or {}).get(name),
            macs=macs.get(name),
            macs_removable=removable.get(name),
        )
        for name, parameter in parameters.items()
    ]
    left, entries = ({kind: _sum(rows, kind, field) for kind in ("weights", "parameters")} for field in COUNTS)
    return Report(
        rows=rows,
        nonzero=left,
        total=entries,
        compression={kind: entries[kind] / left[kind] if left[kind] else None for kind in entries},
        macs={
            "dense": sum(total.values()) + all_products,
            "pruned": sum(macs.values()) + products,
            "removable": sum(removable.values()) + products,
        },
        structure=_structure(graph, live | _tied(graph, uses, units, facts)),
        dense_structure=_structure(graph, dense),
        structure_removable=_structure(graph, dense | _cut(uses, kept)),
    )


COUNTS = ("nonzero", "total")


def standard_deviation(parameter: Tensor) -> float:
    """The standard deviation of a tensor's entries, population form (ddof 0)."""
    return parameter.double().std(correction=0).item()


def _row(name: str, parameter: Tensor, layout: Layout, view: Tensor, **more: Any) -> Row:
    """The row of one tensor; view: which of its entries are not 0."""
    is_weight = layout.kind == "weight"
    count, total = int(view.sum()), parameter.numel()
    return Row(
        name=name,
        kind=layout.kind,
        shape=list(parameter.shape),
        nonzero=count,
        total=total,
        density=count / total,
        live_inputs=int(live_inputs(view).sum()) if is_weight else None,
        live_outputs=int(live_outputs(view).sum()) if is_weight else None,
        **more,
    )


def _sum(rows: list[Row], kind: str, field: str) -> int:
    return sum(getattr(row, field) for row in rows if kind == "parameters" or row.kind == "weight")


def live_inputs(view: Tensor) -> Tensor:
    """Which inputs have a weight that is not 0: bool [groups · inputs], in the order of the input's channels."""
    return view.any(3).any(1).flatten()


def live_outputs(view: Tensor) -> Tensor:
    """Which outputs have a weight that is not 0: bool [groups · outputs]."""
    return view.any(3).any(2).flatten()


def _agree(views: Tensors, graph: Mapping[str, Layer]) -> dict[str, Live]:
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


def _uses(graph: Mapping[str, Layer], units: Units) -> dict[str, list[LayerUse]]:
    """The uses of each layer's weight, of which one may take a part alone, as attention does of its projections."""
    found: dict[str, list[LayerUse]] = {name: [] for name in graph}
    for use in units.layers:
        if use.weight in graph:
            found[use.weight].append(use)
    return found


def _macs(layer: Layer, view: Tensor, live: Live, uses: list[LayerUse], facts: Facts) -> int:
    """Σ over groups of live inputs · live outputs, · kernel size · output positions; parts by their own counts."""
    if all(use.is_whole for use in uses):
        return sum(map(operator.mul, live.inputs, live.outputs)) * view.shape[3] * layer.num_positions
    connected = [(use, use.connections(facts)) for use in uses]
    return sum(
        int((found.any(1).sum(1) * found.any(2).sum(1)).sum()) * use.size * use.num_repeats for use, found in connected
    )


def _cut_macs(layer: Layer, view: Tensor, uses: list[LayerUse], kept: Tensor) -> int:
    """The MACs of a weight between the slots that are kept."""
    if not uses:
        return view.numel() * layer.num_positions
    return sum(use.macs(kept) for use in uses)


def _cut(uses: dict[str, list[LayerUse]], kept: Tensor) -> dict[str, Live]:
    """The inputs and outputs that are kept, as a layer's first use has them."""
    first = {name: each[0] for name, each in uses.items() if each and each[0].is_whole}
    return {name: Live([int(kept[use.ins].sum())], [int(kept[use.outs].sum())]) for name, use in first.items()}


def _tied(graph: Mapping[str, Layer], uses: dict[str, list[LayerUse]], units: Units, facts: Facts) -> dict[str, Live]:
    """The live counts of layers whose channels others write too: those count that any of them writes."""
    names = [name for name in list(graph)[:-1] if graph[name].target is None and len(uses[name]) == 1]
    if not names:
        return {}
    writers = [use for use in units.layers if not use.is_depthwise]
    written = torch.zeros(units.num_units, dtype=torch.bool)
    for use in writers:
        written[units.of[use.outs[use.connections(facts).any(2).flatten()]]] = True
    found = {}
    for name in names:
        (use,) = uses[name]
        own, number = use.connections(facts), units.of[use.outs]
        is_alone = len(number.unique()) == len(number) and not use.is_depthwise and bool((number > 0).all())
        outputs = written[number] if is_alone else own.any(2).flatten()
        found[name] = Live([int(own.any(1).sum())], [int(outputs.sum())])
    return found


def _structure(graph: Mapping[str, Layer], live: dict[str, Live]) -> str:
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
