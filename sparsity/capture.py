"""A function of tensors run a few times, then recorded and replayed: op by op, compiled, or as a CUDA graph.

Python, autograd and the search for kernels are paid for once. What is recorded is one call: its shapes, its branches,
and the tensors that it names but is not given; those may be changed in place between calls, and are read anew.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sparsity.errors import reason

log = logging.getLogger("sparsity")

Function = Callable[..., Sequence[Tensor]]  # of tensors
Way = Literal["eager", "recorded", "compiled"]

WARM_UP = 2  # calls before the recorded one: optimizers make their state in the first, libraries choose their kernels
KNOWN = ("torch", "torchvision", "sparsity")  # whose modules take the same way through their code at every call


def is_known(module: nn.Module) -> bool:
    """Whether all parts of a module are of packages whose code depends on shapes and mode alone, not on values."""
    return all(type(part).__module__.partition(".")[0] in KNOWN for part in module.modules())


class Replayed:
    """A function that is recorded once for each layout of its arguments; where that fails it stays as it is."""

    def __init__(self, function: Function, way: Way, device: torch.device):
        """way: `compiled` compiles the function for the first layout alone, and records it for others."""
        self.function, self.way, self.device = function, way, device
        self.calls: dict[Any, int] = {}  # by layout: shapes and strides of the arguments
        self.replays: dict[Any, Function] = {}

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """What the function gives; on a GPU in tensors that the next call overwrites."""
        layout = tuple((tensor.shape, tensor.stride()) for tensor in arguments)
        if layout in self.replays:
            return self.replays[layout](*arguments)
        self.calls[layout] = self.calls.get(layout, 0) + 1
        if self.way == "eager" or self.calls[layout] <= WARM_UP:
            return self.function(*arguments)
        return self._record(layout, arguments)

    def _record(self, layout: Any, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Records the function while it runs, or for a GPU's first replay."""
        try:
            if self.device.type == "cuda":
                self.replays[layout] = cuda_graph(self.function, arguments)
                return self.replays[layout](*arguments)
            graph, results = recorded(self.function, arguments)
        except Exception as error:  # whatever cannot be recorded runs as it is
            log.debug(f"a step is not recorded: {reason(error)}")
            self.replays[layout] = self.function
            return self.function(*arguments)
        is_first = self.way == "compiled" and not self.replays
        self.replays[layout] = _without_gradients(_compiled(graph) if is_first else graph)
        return results


def recorded(function: Function, arguments: Sequence[Tensor]) -> tuple[GraphModule, Sequence[Tensor]]:
    """The flat list of operations of one call, autograd's among them, and what the call gave."""
    given = []

    def call(*arguments: Tensor) -> Sequence[Tensor]:
        given.append(function(*arguments))
        return given[0]

    graph = make_fx(call)(*arguments)
    for node in graph.graph.nodes:
        if node.target in NO_OPERATIONS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, given[0]


NO_OPERATIONS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _compiled(graph: GraphModule) -> Function:
    """The graph by torch's compiler; as it is where there is no compiler to be had."""
    compiled = torch.compile(graph, dynamic=False)

    def call(*arguments: Tensor) -> Sequence[Tensor]:
        nonlocal compiled
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            log.warning(f"warning: the step is not compiled ({reason(error)}): it is recorded only")
            compiled = graph
            return graph(*arguments)

    return call


def _without_gradients(function: Function) -> Function:
    """The function outside autograd, which the graph holds already."""
    return torch.no_grad()(function)


def cuda_graph(function: Function, arguments: Sequence[Tensor]) -> Function:
    """The function as one captured CUDA graph: its kernels are started together, without Python."""
    places = [tensor.clone() for tensor in arguments]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*places)

    def replay(*given: Tensor) -> Sequence[Tensor]:
        for place, tensor in zip(places, given):
            place.copy_(tensor)
        graph.replay()
        return results

    return replay
