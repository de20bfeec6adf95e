"""A step that is recorded and replayed is the step itself, bit for bit; a compiled one up to the order of additions."""

import contextlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import sample_networks
import torch
from conftest import choices, slow, some_slow
from test_training import generators, network, splits

from sparsity import capture, config, step
from sparsity.data import cut
from sparsity.graph import trace
from sparsity.models import build
from sparsity.population import stack
from sparsity.schedules import learning_rate
from sparsity.stages.regularizing import penalty_of, shrink_of
from sparsity.step import is_elementwise
from sparsity.training import Loop, train

NETWORKS = {
    "normalised": network,
    "dropout": partial(build, sample_networks.WithDropout, (1, 6, 6), 2),
    "linear": partial(build, lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)), (1, 6, 6), 2),
}


def optimizer(name):
    composed, _ = config.compose([f"optimizer={name}"])
    return partial(config.read(composed).optimizer.partial(), lr=1e-2, weight_decay=1e-3)


def trained(way, members, optimize="adam", masked=False, name="hs", device="cpu", over=None):
    population = stack(members, device)
    if masked:
        generator = torch.Generator().manual_seed(0)
        masks = {key: torch.rand(p.shape, generator=generator) < 0.5 for key, p in population.parameters.items()}
        population = replace(population, masks=masks).to(device)
    composed, _ = config.compose([f"reg={name}", *([f"reg/unit={over}"] if over else [])])
    reg = replace(config.read(composed).reg, apply_to=["weight", "bias"])
    nodes = [replace(reg, decay=decay) for decay in torch.linspace(1e-4, 1e-3, len(members)).tolist()]
    units = trace(members[0], splits().example()).units
    penalty, shrink = (of(nodes, population, units) for of in (penalty_of, shrink_of))
    rate = partial(learning_rate, lr=1e-2, shape="cosine", warmup=0.1)
    loop = Loop(3, 10, rate, optimizer(optimize), way=way)
    added = {"penalty": penalty, "shrink": shrink}
    return train(population, splits().to(device), loop, generators(*range(len(members))), **added, select=True)


def check_same(one, other, close=torch.equal):
    for part in ("parameters", "buffers"):
        for name, tensor in getattr(one.last, part).items():
            assert close(tensor, getattr(other.last, part)[name]), name
    assert [row.validation for row in one.history] == [row.validation for row in other.history]


@pytest.fixture
def replays(monkeypatch):
    """How often something was recorded, and whether compiled."""
    found = []
    recorded, compiled = capture.recorded, capture._compiled
    monkeypatch.setattr(capture, "recorded", lambda *given: found.append("recorded") or recorded(*given))
    monkeypatch.setattr(capture, "_compiled", lambda graph: found.append("compiled") or compiled(graph))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimize", some_slow(choices("optimizer"), "adamw", "sgd"))
@pytest.mark.parametrize(("name", "num_pieces"), [("normalised", 4), *slow(("dropout", 3))])
def test_a_recorded_step_is_the_step(name, num_pieces, optimize, replays):
    members = [NETWORKS[name](seed=0)]
    masked = name == "normalised"
    eager, recorded = (trained(way, members, optimize=optimize, masked=masked) for way in ("eager", "recorded"))
    check_same(eager, recorded)
    # gradients of a whole batch and of the last, smaller one; penalty, apart where there are convolutions; optimizer
    assert replays == ["recorded"] * num_pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "over"),
    [
        *((name, None) for name in choices("reg") if name != "none"),
        *(("hs", name) for name in choices("reg/unit") if name not in ("entry", "head")),
        *((name, "coupled") for name in ("sized_lasso", "proximal_lasso")),
    ],
)
def test_members_together_are_recorded_too(name, over, replays):
    members = [network(seed=0), network(seed=1)]
    eager, recorded = (trained(way, members, name=name, over=over, optimize="sgd") for way in ("eager", "recorded"))
    check_same(eager, recorded)
    assert replays == ["recorded"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize(("name", "num_compiled"), [("linear", 1), ("normalised", 1)])
def test_a_compiled_step_is_the_step(name, num_compiled, num_members, replays):
    members = [NETWORKS[name](seed=seed) for seed in range(num_members)]
    eager, compiled = (trained(way, members, optimize="sgd") for way in ("eager", "compiled"))
    close = partial(torch.allclose, rtol=1e-3, atol=1e-5)
    check_same(eager, compiled, close)
    assert replays.count("compiled") == num_compiled


class Branches(sample_networks.WithDropout):
    """Counts its batches, draws random numbers, and then looks at a value, which no recording can."""

    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += self.training
        hidden = self.drop(self.hidden(images.flatten(1)))
        return self.out(hidden.relu() if hidden.sum() > 0 else hidden)


@pytest.mark.slow
def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    members = [build(Branches, (1, 6, 6), 2, 0)]
    eager, recorded = (trained(way, members) for way in ("eager", "recorded"))
    check_same(eager, recorded)
    assert recorded.last.buffers["calls"].item() == 3 * 7 and caplog.text.count("cannot be recorded") == 1


@pytest.mark.slow
def test_a_machine_without_a_compiler_records(monkeypatch, caplog):
    def refuse(graph, **options):
        def call(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    check_same(*(trained(way, [NETWORKS["linear"](seed=0)]) for way in ("eager", "compiled")))
    assert "the step is not compiled" in caplog.text and "no C++ compiler" in caplog.text


@pytest.mark.slow
def test_a_compiler_killed_while_it_wrote_costs_a_fresh_cache(tmp_path, monkeypatch, caplog):
    """A compiled function whose file is empty is compiled anew, once, and what it changes is changed once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiler, tries = torch.compile, []

    def compile_badly(graph, **options):
        tries.append(graph)
        if len(tries) > 1:
            return compiler(graph, **options)

        def fail(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(print, ImportError("file too short"), None)

        return fail

    monkeypatch.setattr(torch, "compile", compile_badly)
    members = [build(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(36), torch.nn.Linear(36, 2)),
                     (1, 6, 6), 2, 0)]  # fmt: skip
    eager, compiled = (trained(way, members, optimize="sgd") for way in ("eager", "compiled"))
    check_same(eager, compiled, partial(torch.allclose, rtol=1e-3, atol=1e-5))
    assert len(tries) == 2 and f"cache {tmp_path} is damaged" in caplog.text


@pytest.mark.parametrize(("optimizer", "elementwise"), [(torch.optim.Adam, True), (torch.optim.Adafactor, False)])
def test_optimizers_that_mix_entries_are_told_apart(optimizer, elementwise):
    assert is_elementwise(optimizer([torch.nn.Parameter(torch.zeros(2, 2))], lr=1e-3)) == elementwise


class Graph:
    """What a CUDA graph does, on a CPU: a replay computes the captured call anew, into the tensors of the capture."""

    def pool(self):
        return "pool"

    def replay(self):
        function, places, results = self.call
        for result, again in zip(results, function(*places)):
            result.copy_(again)


@pytest.fixture
def captured(monkeypatch):
    """The captures, as (graph, pool), of steps that take the GPU's way on a CPU."""
    found, changes = [], []

    @contextlib.contextmanager
    def capture_without_effect(graph, pool, stream):
        found.append((graph, pool))
        before = [tensor.detach().clone() for tensor in changes[0]()]
        yield
        with torch.no_grad():
            for tensor, value in zip(changes[0](), before):
                tensor.copy_(value)

    def replayed(functions, way, population, optimizer):
        def call(*arguments):
            results = chain(*arguments)
            if found and not hasattr(found[-1][0], "call"):
                found[-1][0].call = (chain, arguments, results)
            return results

        chain = step._chain([step._gathered(splits().train), *functions])
        changes[:] = [partial(step._changing, population, optimizer)]
        return capture.Replayed(call, way, torch.device("cuda"), changes[0])

    fakes = {name: lambda which: contextlib.nullcontext() for name in ("device", "stream")}
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes |= {name: lambda device: stream for name in ("Stream", "current_stream")}
    fakes |= {"graph": capture_without_effect, "CUDAGraph": Graph, "get_rng_state": lambda device: torch.zeros(0)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(step, "_replayed", replayed)
    monkeypatch.setattr(step.Step, "batches", lambda self, order, size, _: ((index,) for index in cut(order, size)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optimize", ["adam", *slow("sgd")])
@pytest.mark.parametrize("num_members", [1, 3])
def test_the_way_of_a_gpu_is_the_step(num_members, optimize, captured, monkeypatch):
    """One graph for whole batches and one for the last, in one pool; the batch is gathered inside."""
    members = [network(seed=seed) for seed in range(num_members)]
    together = trained("recorded", members, optimize=optimize)
    assert [(tuple(graph.call[1][0].shape), pool) for graph, pool in captured] == [
        ((num_members, 10), None),
        ((num_members, 4), "pool"),
    ]
    monkeypatch.undo()
    check_same(trained("eager", members, optimize=optimize), together)


@pytest.mark.slow
def test_an_optimizer_that_is_not_fused_is_not_recorded(replays, monkeypatch):
    monkeypatch.setitem(globals(), "optimizer", lambda name: partial(torch.optim.RMSprop, lr=1e-2))
    check_same(*(trained(way, [network()]) for way in ("eager", "recorded")))
    assert replays == []


def test_modules_of_others_may_branch():
    from torchvision.models import resnet18

    assert capture.is_known(resnet18()) and capture.is_known(build(partial(torch.nn.Linear, 3, 2), (3,), 2, 0))
    assert not capture.is_known(network())
    assert not capture.is_known(resnet18(), "sparsity.models.mlp", "my_methods.annealed")


def test_arguments_in_another_memory_order_are_recorded_anew():
    def doubled(matrix):
        return [matrix.reshape(-1) * 2]

    replayed = capture.Replayed(doubled, "recorded", torch.device("cpu"), list)
    matrix = torch.arange(6.0).reshape(2, 3)
    for argument in [*[matrix] * 4, *[matrix.T.contiguous().T] * 4]:
        assert torch.equal(replayed(argument)[0], doubled(argument)[0])
    assert len(replayed.replays) == 2
