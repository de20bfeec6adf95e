"""Weights in few bits: against the formulas written plainly, alone and together, and as a stage."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, choices, context_of
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_training import generators, linear, loop, splits

from sparsity import config, nodes
from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.quantizing import clusters, shared, symmetric
from sparsity.stages import quantize
from sparsity.stages.quantizing import quantized_by
from sparsity.tensors import nonzero
from sparsity.training import train

NAMES = choices("quantize")
WEIGHTS = {"drawn": 1.0, "tiny": 1e-38, "huge": 1e30, "zeros": 0.0}


def node_of(name, **more):
    found = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "quantize" / f"{name}.yaml"))
    return config.check("quantize", {**found, **more}, nodes.Quantizer)


def weight_of(scale=1.0, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 4, 5, 3, generator=generator)
    return drawn * (torch.rand(drawn.shape, generator=generator) < density) * scale


def seen_of(name, weight, **more):
    """What the forward pass sees of one view."""
    node = node_of(name, **more)
    codes = {} if node.codes is None else {"codes": node.codes.partial(bits=node.bits)(weight)}
    return node.function.partial(bits=node.bits, **codes)(weight)


def test_whole_numbers_times_a_scale_of_each_output():
    weight = weight_of()
    found = symmetric(weight, bits=4)
    for group in range(2):
        for output in range(4):
            row = weight[group, output]
            scale = row.abs().max() / 7
            assert torch.equal(found[group, output], (row / scale).round() * scale)


def test_codes_are_those_of_k_means():
    weight = weight_of(density=0.7)
    codes, values = clusters(weight, bits=3, rounds=40), weight[weight != 0].double()
    assert torch.equal(codes == 0, weight == 0) and codes.max() <= 7
    centers = torch.stack([weight[codes == code].double().mean() for code in codes[codes > 0].unique()])
    nearest = (values[:, None] - centers).abs().argmin(1)
    assert torch.equal(centers[nearest].float(), shared(weight, codes, bits=3)[weight != 0])  # a fixed point
    even = torch.linspace(values.min(), values.max(), 7, dtype=values.dtype)
    from_even = ((values[:, None] - even).abs().min(1).values ** 2).sum()
    assert ((values - centers[nearest]) ** 2).sum() < from_even


def test_few_large_entries_leave_the_others_most_codes():
    weight = torch.cat([torch.linspace(0.1, 1, 200), torch.tensor([50.0, 60.0])]).view(1, 1, 1, -1)
    found = shared(weight, clusters(weight, bits=3, rounds=30), bits=3)
    assert (found - weight).abs()[..., :200].max() < 0.25 and torch.equal(found[..., 200:], weight[..., 200:])


def test_a_shared_value_moves_by_the_sum_of_the_gradients_of_its_entries():
    weight = weight_of().requires_grad_()
    codes, slopes = clusters(weight.detach(), bits=2, rounds=9), weight_of(seed=3, density=1.0)
    (found,) = torch.autograd.grad((shared(weight, codes, bits=2) * slopes).sum(), weight)
    for code in (1, 2, 3):
        there = codes == code
        assert torch.allclose(found[there], slopes[there].sum() / there.sum(), atol=1e-6)
    assert (found[codes == 0] == 0).all()


def test_a_gradient_passes_the_rounding():
    weight = weight_of().requires_grad_()
    slopes = weight_of(seed=3)
    (found,) = torch.autograd.grad((symmetric(weight, bits=2) * slopes).sum(), weight)
    assert torch.equal(found, slopes)


@pytest.mark.parametrize("scale", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_and_all_is_finite(name, scale):
    weight = weight_of(WEIGHTS[scale]).requires_grad_()
    found = seen_of(name, weight)
    (slope,) = torch.autograd.grad(found.sum(), weight)
    assert found.isfinite().all() and slope.isfinite().all() and (found[weight == 0] == 0).all()
    if scale in ("drawn", "huge"):
        assert (found - weight).abs().max() < 0.1 * weight.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_there_are_as_few_values_as_bits_say(name, bits):
    found = seen_of(name, weight_of(density=1.0), bits=bits)
    rows = found.flatten(0, 1) if name == "int8" else [found]
    assert max(len(row.unique()) for row in rows) <= 2**bits
    if name == "int8":
        assert torch.allclose(seen_of(name, found, bits=bits), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", ["eager", "recorded"])
@pytest.mark.parametrize("name", NAMES)
def test_members_together_are_as_alone(name, way):
    def trained(members):
        population = linear(2).take(members)
        context = context_of(trace(population.module, splits().example()), splits(), tuple(members))
        seen = quantized_by([node_of(name, bits=3)] * len(members), population, context)
        plan = replace(loop(3, optimizer=partial(torch.optim.SGD, fused=True)), way=way)
        return train(population, splits(), plan, generators(*members), seen=seen, select=True)

    together = trained([0, 1])
    for member in (0, 1):
        alone = trained([member])
        for which in ("last", "selected"):
            one, other = getattr(together, which).take([member]), getattr(alone, which)
            for key, tensor in one.parameters.items():
                assert torch.allclose(tensor, other.parameters[key], atol=1e-5)
    weight = next(iter(together.last.parameters.values()))[0]
    assert max(len(row.unique()) for row in (weight if name == "int8" else [weight])) <= 8


@pytest.mark.parametrize("epochs", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_stage_holds_zeros_and_selects(name, epochs):
    population = linear(2)
    (key,) = (name for name, layout in population.layouts.items() if layout.kind == "weight")
    pruned = population.parameters[key] * (population.parameters[key].abs() > 0.08)
    population = replace(population, parameters=population.parameters | {key: pruned})
    context = context_of(trace(population.module, splits().example()), splits(), (0, 1))
    numbers = {"schedule": nodes.StageSchedule(epochs, 1e-2, "constant", 0.0, 0.0), "batch_size": 16}
    adam = nodes.Call("optimizer", "torch.optim.Adam", torch.optim.Adam, {})
    outcome = quantize(population, context, method=[node_of(name)] * 2, optimizer=adam, **numbers)
    after = outcome.population.parameters[key]
    assert not nonzero(after)[~nonzero(pruned)].any() and nonzero(after).sum() > 0.8 * nonzero(pruned).sum()
    assert len(outcome.history) == epochs + 1 and outcome.selected_epoch[0] in range(epochs + 1)
    assert (
        outcome.notes
        == [{"quantized": {"method": node_of(name).function.function.__name__, "bits": node_of(name).bits}}] * 2
    )
    if not epochs:
        seen = quantized_by([node_of(name)] * 2, population, context)(population.parameters)
        assert torch.equal(after, seen[key])


def test_what_cannot_be():
    population = linear()
    context = context_of(trace(population.module, splits().example()), splits())
    with pytest.raises(ConfigError, match="the model has no such parameters"):
        quantized_by([node_of("int8", apply_to=["scale"])], population, context)
    with pytest.raises(ConfigError, match=r"codes=null: .* needs what gives them"):
        quantized_by([replace(node_of("shared"), codes=None)], population, context)


@pytest.mark.parametrize("name", NAMES)
def test_as_typed(run, name, tmp_path):
    small = ("model=mlp", "model.factory.hidden=[30]", "plots=false", "quantize.bits=4", f"quantize={name}")
    result = run("recipe=quantized", *small)
    last = result["stages_run"][-1]
    assert last["name"] == "quantize" and last["quantized"] == {"method": name, "bits": 4}
    assert all(each["quantized"] is None for each in result["stages_run"][:-1])
    before = load_file(tmp_path / "run0" / "stages" / "finetune.safetensors")
    after = load_file(tmp_path / "run0" / "model.safetensors")
    weights = {key: tensor for key, tensor in after.items() if tensor.ndim > 1}
    for key, tensor in weights.items():
        assert (tensor[before[key] == 0] == 0).all() and not torch.equal(tensor, before[key])
        assert max(len(row.unique()) for row in (tensor if name == "int8" else [tensor])) <= 16
    assert result["accuracy"]["final"]["test"] > result["stages_run"][-2]["accuracy"]["test"] - 0.05
