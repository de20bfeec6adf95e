"""Weights in few bits: against the formulas written plainly, alone and together, and as a stage."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, choices, context_of, slow
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_training import generators, linear, loop, splits
from torch import nn

import sparsity
from sparsity import artifact, config, models, nodes
from sparsity.artifact import About
from sparsity.errors import ConfigError
from sparsity.graph import trace
from sparsity.population import stack
from sparsity.quantizing import activations, clusters, shared, symmetric
from sparsity.stages import quantize
from sparsity.stages.quantizing import between, input_ranges, quantized_by
from sparsity.tensors import nonzero
from sparsity.training import train

NAMES = [name for name in choices("quantize") if name != "none"]
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


RANGES = {"both": (-1.3, 2.1), "above": (0.4, 3.0), "below": (-2.0, -1.0), "zeros": (0.0, 0.0), "tiny": (0.0, 1e-40)}
RANGES["huge"] = (-3e38, 3e38)


@pytest.mark.parametrize("name", RANGES)
def test_inputs_in_uint8(name):
    low, high = (torch.tensor(end) for end in RANGES[name])
    inputs = torch.cat([torch.linspace(-3, 4, 500), torch.zeros(1), low[None], high[None]]).requires_grad_()
    found = activations(inputs, low, high)
    (slope,) = torch.autograd.grad(found.sum(), inputs)
    assert found.isfinite().all() and (found[500] == 0) and slope.isfinite().all()
    if name in ("both", "above", "below"):
        step = (max(high, 0.0) - min(low, 0.0)) / 255
        zero = round(-min(low.item(), 0.0) / step.item())
        plain = torch.stack(
            [step * (min(max(round((x / step).item()) + zero, 0), 255) - zero) for x in inputs.detach()]
        )
        torch.testing.assert_close(found, plain)
        ends = torch.stack([-zero * step, (255 - zero) * step])
        clear = (inputs[:, None] - ends).abs().amin(1) > 1e-5
        assert torch.equal((slope == 1)[clear], ((inputs > ends[0]) & (inputs < ends[1]))[clear]), "outside it is 0"
        assert (found - inputs)[(inputs > min(low, 0.0)) & (inputs < max(high, 0.0))].abs().max() <= 0.501 * step


def two_layers(members=2):
    """A population of convolutions and a linear layer, whose weights are half zero."""
    modules = []
    for seed in range(members):
        torch.manual_seed(seed)
        convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU()
        modules.append(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(36, 2)))
        with torch.no_grad():
            for parameter in modules[-1].parameters():
                parameter[parameter.abs() < 0.1] = 0
    return stack(modules)


def stage_of(name, population, seeds, *, epochs=2, step="eager", **more):
    context = replace(context_of(trace(population.module, splits().example()), splits(), seeds), step=step)
    numbers = {"schedule": nodes.StageSchedule(epochs, 1e-2, "constant", 0.0, 0.0), "batch_size": 16}
    adam = nodes.Call("optimizer", "torch.optim.Adam", torch.optim.Adam, {"fused": True})
    methods = [node_of(name, **more)] * population.num_members
    return quantize(population, context, method=methods, optimizer=adam, **numbers)


@pytest.mark.parametrize("step", ["eager", "recorded", *slow("compiled")])
@pytest.mark.parametrize("name", NAMES)
def test_members_of_a_stage_are_as_alone(name, step):
    population = two_layers()
    together = stage_of(name, population, (0, 1), step=step)
    for member in (0, 1):
        alone, again = (stage_of(name, population.take([member]), (member,), step=step) for _ in range(2))
        for key, tensor in alone.population.parameters.items():
            assert torch.allclose(tensor[0], together.population.parameters[key][member], atol=1e-5), key
            assert torch.equal(tensor, again.population.parameters[key]), "same seed, same numbers"
        one, other = alone.notes[0]["quantized"], together.notes[member]["quantized"]
        assert one["inputs"].keys() == other["inputs"].keys() == ({*one["layers"]} if name == "int8" else set())
        for layer, ends in one["inputs"].items():
            assert ends == pytest.approx(other["inputs"][layer], rel=1e-5)
        assert one["accuracy"] == other["accuracy"] and not alone.notes[0]["said"]
        chosen = alone.history[alone.selected_epoch[0]]
        assert one["accuracy"]["after"] == {"validation": chosen.validation[0], "test": chosen.test[0]}


def test_a_network_between_ranges_is_what_is_computed_plainly():
    population = two_layers(1)
    module, images = population.module.eval(), splits().example()
    context = context_of(trace(module, images), splits())
    node = node_of("int8", activations={"batches": 1, "batch_size": 7})
    generator = torch.Generator().manual_seed(3)
    found = input_ranges(population, node, context, [generator])
    order = torch.randperm(len(splits().train), generator=torch.Generator().manual_seed(3))[:7]
    whole = splits().scale(splits().train.images[order])
    within, plain, seen = between(population, found), images, {}
    for name, layer in module.named_children():
        if hasattr(layer, "weight"):
            seen[f"{name}.weight"] = torch.stack([whole.min(), whole.max()])
            plain = activations(plain, *seen[f"{name}.weight"])
        plain, whole = layer(plain), layer(whole)
    for name, ends in seen.items():
        torch.testing.assert_close(found[name][0], ends)
    tensors = {name: t[0] for part in (within.parameters, within.buffers) for name, t in part.items()}
    outputs = torch.func.functional_call(within.module, tensors, (images,))
    torch.testing.assert_close(outputs, plain)
    assert not torch.allclose(outputs, module(images), atol=1e-5)


def test_nothing_is_quantized_by_none():
    population = two_layers(1)
    outcome = stage_of("none", population, (0,))
    assert outcome.population is population and not outcome.history
    assert "quantizes nothing: weights stay as they are" in outcome.notes[0]["said"][0]


class Product(nn.Module):
    """Multiplies by its second weight in a way of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(36, 4), nn.Linear(4, 2)

    def forward(self, images):
        return torch.einsum("bi,oi->bo", self.one(images.flatten(1)).relu(), self.two.weight) + self.two.bias


def test_inputs_that_no_layer_takes_stay_and_are_told():
    note = stage_of("int8", stack([Product()]), (0,)).notes[0]
    assert [*note["quantized"]["inputs"]] == ["one.weight"] and len(note["quantized"]["layers"]) == 2
    assert note["said"] == ["inputs of two.weight stay float32: no linear layer or convolution uses it directly"]


@pytest.mark.parametrize("name", NAMES)
def test_a_member_that_diverges_is_told_and_keeps_its_last_good_state(name):
    population = two_layers()
    with torch.no_grad():
        population.parameters["2.weight"][1] *= 1e10
        population.parameters["5.weight"][1] *= 1e30  # too large for the sums of the outputs
    outcome = stage_of(name, population, (0, 1))
    assert outcome.diverged[0] is None and outcome.diverged[1] is not None
    assert all(t.isfinite().all() for t in outcome.population.parameters.values())
    alone = stage_of(name, population.take([0]), (0,))
    for key, tensor in alone.population.parameters.items():
        assert torch.allclose(tensor[0], outcome.population.parameters[key][0], atol=1e-5)


def test_a_layer_that_is_all_zero_is_finite():
    population = two_layers()
    population.parameters["2.weight"].zero_()
    for name in NAMES:
        outcome = stage_of(name, population, (0, 1))
        assert not outcome.population.parameters["2.weight"].any() and outcome.diverged == [None, None]
        assert all(t.isfinite().all() for t in outcome.population.parameters.values())


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
    for note in outcome.notes:
        about, own = note["quantized"], node_of(name)
        assert (about["method"], about["bits"]) == (own.function.function.__name__, own.bits)
        assert about["layers"] == [key] and [*about["inputs"]] == ([key] if own.activations else [])
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
    assert last["name"] == "quantize" and (last["quantized"]["method"], last["quantized"]["bits"]) == (name, 4)
    before, after = (last["quantized"]["accuracy"][when]["test"] for when in ("before", "after"))
    assert before == result["stages_run"][-2]["accuracy"]["test"] and after > before - 0.05
    assert (after == last["accuracy"]["test"]) or name == "int8"  # whose inputs are rounded too
    assert all(each["quantized"] is None for each in result["stages_run"][:-1])
    before = load_file(tmp_path / "run0" / "stages" / "finetune.safetensors")
    after = load_file(tmp_path / "run0" / "model.safetensors")
    weights = {key: tensor for key, tensor in after.items() if tensor.ndim > 1}
    for key, tensor in weights.items():
        assert (tensor[before[key] == 0] == 0).all() and not torch.equal(tensor, before[key])
        assert max(len(row.unique()) for row in (tensor if name == "int8" else [tensor])) <= 16
    assert result["accuracy"]["final"]["test"] > result["stages_run"][-2]["accuracy"]["test"] - 0.05


def test_a_stage_from_the_store_says_the_same(run):
    given = ("recipe=quantized", "model=mlp", "model.factory.hidden=[10]", "plots=false", "store=kept")
    first, second = run(*given), run(*given)
    assert first["computed"][-1] == "quantize" and not second["computed"]
    assert first["stages_run"][-1]["quantized"] == second["stages_run"][-1]["quantized"]
    assert first["card"]["quantized"]["accuracy"] == second["card"]["quantized"]["accuracy"]
    other = run(*given, "quantize.activations.batches=3")
    assert other["computed"] == ["quantize"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["recipe=quantized", "quantize=none"], "quantize=none quantizes nothing: weights stay as they are"),
        (["quantize=shared"], "quantize does nothing: no stage of recipe=standard reads it"),
        (["quantize.bits=3"], "quantize.bits does nothing: no stage of recipe=standard reads it"),
    ],
)
def test_settings_that_do_nothing_are_told(run, overrides, line):
    result = run(*overrides, "model=mlp", "model.factory.hidden=[10]", "plots=false")
    assert any(line in each for each in result["warnings"])


@pytest.mark.parametrize("setting", ["bits=1", "bits=9", "bits=2.5", "activations.batches=0", "apply_to=[weights]"])
def test_settings_out_of_range_are_refused(run, setting):
    with pytest.raises(ConfigError, match=f"quantize.{setting.partition('=')[0].partition('[')[0]}") as caught:
        run("recipe=quantized", f"quantize.{setting}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["iterative", "gradual", "magnitude"])
def test_recipes_take_the_stage_at_their_end(run, recipe):
    stages = {"iterative": "[pretrain,{repeat:2,stages:[regularize,prune,finetune]},quantize]"}
    stages |= {"gradual": "[pretrain,train,quantize]", "magnitude": "[pretrain,prune,finetune,quantize]"}
    small = ("model=mlp", "model.factory.hidden=[10]", "plots=false", "budget.compression=5")
    config = ROOT / "conf" / "recipe" / "quantized.yaml"
    node = OmegaConf.to_container(OmegaConf.load(config))["recipe"]["quantize"]
    added = [f"+recipe.quantize.{key}={value}" for key, value in node.items()]
    result = run(f"recipe={recipe}", *small, f"stages={stages[recipe]}", *added)
    assert result["stages_run"][-1]["quantized"]["method"] == "int8"
    assert result["compression"]["weights"] >= 5 and "quantized" in result["card"]


@pytest.mark.parametrize(("model", "share", "bits", "smaller"), [("lenet300", 0.02, 5, 60), ("lenet5", 0.01, 4, 150)])
def test_files_are_as_small_as_they_should_be(model, share, bits, smaller, tmp_path):
    torch.manual_seed(0)
    module = getattr(models, model)(input_shape=(1, 28, 28), num_classes=10).eval()
    population = stack([module])
    with torch.no_grad():
        for parameter in population.parameters.values():
            parameter *= torch.rand(parameter.shape) < share  # anywhere, which takes the most bytes to say
    context = context_of(trace(module, torch.rand(1, 1, 28, 28)), splits())
    seen = quantized_by([node_of("shared", bits=bits)], population, context)(population.parameters)
    module.load_state_dict({name: parameter[0] for name, parameter in seen.items()})
    written = artifact.write(tmp_path / "file", artifact.cut(module, torch.rand(1, 1, 28, 28)), About((1, 28, 28)))
    dense = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert dense > smaller * written["bytes"]
    with torch.no_grad():
        images = torch.rand(9, 1, 28, 28)
        torch.testing.assert_close(sparsity.load(tmp_path / "file")(images), module(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "smaller"), [("shared", 60), ("int8", 50)])
def test_files_of_trained_networks_are_too(run, mnist_root, quantizer, smaller):
    given = ["data=mnist", f"data.root={mnist_root}", "schedule=fast", "reg=hs", "budget.compression=50", "threads=1"]
    given += [f"schedule.{stage}.epochs=2" for stage in ("pretrain", "finetune", "quantize")]
    given += ["schedule.regularize.epochs=6", "plots=false", "store=kept"]
    result = run("recipe=quantized", f"quantize={quantizer}", *given)
    card = result["card"]
    assert card["masked"]["bytes"] > smaller * card["compact"]["bytes"]
    assert card["compact"]["accuracy"] == result["accuracy"]["final"]["test"] > 0.96
    if quantizer == "int8":
        after = result["stages_run"][-1]["quantized"]["accuracy"]["after"]["test"]
        assert card["quantized"]["accuracy"] == pytest.approx(after, abs=0.002) and after > 0.96
