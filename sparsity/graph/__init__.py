"""A network's graph, read off recorded passes: its layers, which feeds which, and its units."""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsity.errors import reason
from sparsity.graph.layers import FLATTENS, IMAGES, KEEPS_CHANNELS, Layer, trace_layers
from sparsity.graph.recorder import record
from sparsity.graph.units import Facts, LayerUse, Units

__all__ = [
    "FLATTENS",
    "IMAGES",
    "KEEPS_CHANNELS",
    "Facts",
    "Graph",
    "Layer",
    "LayerUse",
    "Units",
    "trace",
    "trace_layers",
]

log = logging.getLogger("sparsity")


class Graph(dict[str, Layer]):
    """The layers of a network by their weight's name, in the order of one pass, and its units where they are known."""

    def __init__(self, layers: dict[str, Layer], units: Units | None = None):
        super().__init__(layers)
        self.units = units


def trace(module: nn.Module, images: Tensor) -> Graph:
    """The graph of a module, from passes over images [batch, *shape].

    A weight that is used twice is listed once, without source and target, and so is one that only part of is used at a
    time, or that is no linear layer's or convolution's, such as the projections of attention.
    """
    layers = trace_layers(module, images)
    try:
        units = record(module, images[:1])
    except Exception as error:  # whatever a module may raise on one image, or torch on functions that it cannot watch
        log.info(f"the units of the network are not known: {reason(error)}")
        return Graph(layers)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    kept = torch.ones_like(units.of, dtype=torch.bool)
    macs: dict[str, int] = {}
    for layer in units.layers:
        if layer.weight not in sizes:  # a buffer, such as a fixed transform
            continue
        macs[layer.weight] = macs.get(layer.weight, 0) + layer.macs(kept)
    found = {}
    for name, count in macs.items():
        num_positions = count // sizes[name]
        known = layers.get(name, Layer(name, num_positions, exclusive=False))
        found[name] = replace(known, num_positions=num_positions)
    return Graph({**found, **{name: layer for name, layer in layers.items() if name not in found}}, units)
