"""A function of tensors run a few times, then recorded and replayed: op by op, compiled, or as a CUDA graph.

Python, autograd and the search for kernels are paid for once. What is recorded is one call: its shapes, its branches,
and the tensors that it names but is not given; those may be changed in place between calls, and are read anew.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sparsity.errors import reason

log = logging.getLogger("sparsity")

Function = Callable[..., Sequence[Tensor]]  # of tensors
Way = Literal["eager", "recorded", "compiled", "kernels"]  # kernels: without torch

WARM_UP = 2  # calls before the recorded one: optimizers make their state in the first, libraries choose their kernels
KNOWN = ("torch", "torchvision", "sparsity")  # whose modules take the same way through their code at every call


def is_known(module: nn.Module, *targets: str) -> bool:
    """Whether a module's parts, and functions by name, are of packages whose code goes by shapes and mode alone."""
    names = [type(part).__module__ for part in module.modules()]
    return all(name.partition(".")[0] in KNOWN for name in (*names, *targets))


class Replayed:
    """A function that is recorded once for each layout of its arguments; where that fails it runs as it is."""

    def __init__(self, function: Function, way: Way, device: torch.device, changes: Callable[[], Sequence[Tensor]]):
        """changes: the tensors that the function may change in place.

        way: `compiled` compiles the function for the first layout alone, and records it for others.
        """
        self.function, self.way, self.device, self.changes = function, way, device, changes
        self.calls: dict[Any, int] = {}  # by layout: shapes and strides of the arguments
        self.replays: dict[Any, Function] = {}
        self.graphs = CudaGraphs(device) if device.type == "cuda" else None

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """What the function gives; on a GPU in tensors that the next call overwrites."""
        layout = tuple((tensor.shape, tensor.stride()) for tensor in arguments)
        if layout in self.replays:
            return self.replays[layout](*arguments)
        self.calls[layout] = self.calls.get(layout, 0) + 1
        if self.way == "eager" or self.calls[layout] <= WARM_UP:
            return self.graphs.warm_up(self.function, arguments) if self.graphs else self.function(*arguments)
        before, random = [tensor.detach().clone() for tensor in self.changes()], _random_state(self.device)
        try:
            return self._record(layout, arguments)
        except Exception as error:  # whatever cannot be recorded runs as it is
            log.warning(f"warning: a training step cannot be recorded ({reason(error)}): it runs op by op")
        self.way = "eager"
        _restore(self.changes(), before)  # the recorded call may have gone half its way
        _set_random_state(random, self.device)
        return self.function(*arguments)

    def _record(self, layout: Any, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Records the function while it runs, or for a GPU's first replay."""
        if self.graphs:
            self.replays[layout] = self.graphs.capture(self.function, arguments)
            return self.replays[layout](*arguments)
        graph, results = recorded(self.function, arguments)
        is_first = self.way == "compiled" and not self.replays
        self.replays[layout] = torch.no_grad()(_compiled(graph) if is_first else graph)
        return results


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _restore(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Puts back what tensors were."""
    with torch.no_grad():
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)


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
    chosen: Function | None = None

    def call(*arguments: Tensor) -> Sequence[Tensor]:
        nonlocal chosen
        if chosen is not None:
            return chosen(*arguments)
        chosen, results = _working(graph, arguments)
        return results

    return call


def _working(graph: GraphModule, arguments: Sequence[Tensor]) -> tuple[Function, Sequence[Tensor]]:
    """The compiled graph and what its first call gave.

    A file that a killed compiler left half-written is gone around by a fresh cache.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache

    _quieten_compiler()

    trouble = None
    for place in (contextlib.nullcontext, fresh_cache):
        try:
            with place():
                compiled = torch.compile(graph, dynamic=False)
                results = compiled(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            torch._dynamo.reset()
            trouble = reason(error)
            continue
        if trouble is not None:
            log.warning(f"warning: the compiler's cache {cache_dir()} is damaged ({trouble}): remove it")
        return compiled, results
    log.warning(f"warning: the step is not compiled ({trouble}): it is recorded only")
    return graph, graph(*arguments)


def _quieten_compiler() -> None:
    """Leaves out what the compiler says of its own working, unless the user asks for it by TORCH_LOGS."""
    if "TORCH_LOGS" not in os.environ:
        for name in ("torch", "torch._dynamo", "torch._functorch", "torch._inductor"):
            logging.getLogger(name).setLevel(logging.ERROR)


class CudaGraphs:
    """Remembers the stream and the memory that the graphs of one function share; one of them runs at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), None

    def warm_up(self, function: Function, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """The function as it is, on the stream that it will be captured on."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function(*arguments)
        current.wait_stream(self.stream)
        return results

    def capture(self, function: Function, arguments: Sequence[Tensor]) -> Function:
        """The function as one captured graph: its kernels are started together, without Python."""
        places = [tensor.clone() for tensor in arguments]
        graph = torch.cuda.CUDAGraph()
        # the outer contexts bring device and stream back also where a capture fails halfway
        capturing = torch.cuda.graph(graph, pool=self.pool, stream=self.stream)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), capturing:
            results = function(*places)
        self.pool = graph.pool()

        def replay(*given: Tensor) -> Sequence[Tensor]:
            for place, tensor in zip(places, given):
                place.copy_(tensor)
            graph.replay()
            return results

        return replay
