"""Steps by kernels are torch's steps: gradients, curves, masks; and what there is no kernel for is told."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, slow
from torch import nn

from sparsity import regularizers
from sparsity.data import Images, Splits
from sparsity.errors import ConfigError
from sparsity.evaluation import evaluate
from sparsity.kernels import UnsupportedError, kernels_of, library
from sparsity.kernels.chain import chain_of
from sparsity.kernels.library import library_of
from sparsity.population import stack
from sparsity.stages.regularizing import total_penalty
from sparsity.step import Form, Penalty
from sparsity.training import Gradual, Loop, train

pytestmark = pytest.mark.skipif(not library._compiler()[0], reason="needs a C++ compiler")

ADAM = partial(torch.optim.Adam, lr=3e-3)
OPTIMIZERS = {
    "adam": ADAM,
    "adam with decay": partial(ADAM, weight_decay=0.1, betas=(0.8, 0.95)),
    "adamw": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.3),
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
}
PENALTIES = ("l1", "hoyer", "hs", "group_lasso", "group_hs")


def layers(*parts, outputs=3):
    return nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(outputs))


# shapes from 1 up, odd ones, and what vectors do not divide
NETWORKS = {
    "one unit": ((1,), lambda: nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))),
    "linear": ((7, 3), lambda: nn.Sequential(nn.Flatten(), nn.Linear(21, 33), nn.ReLU(), nn.Linear(33, 5))),
    "without bias": ((17,), lambda: nn.Sequential(nn.Linear(17, 65, bias=False), nn.LeakyReLU(0.2), nn.Linear(65, 4))),
    "one convolution": ((1, 1, 1), lambda: layers(nn.Conv2d(1, 1, 1))),
    "padded": ((2, 5, 7), lambda: layers(nn.Conv2d(2, 5, 3, padding=(1, 2)), nn.ReLU(), nn.MaxPool2d(2))),
    "strided": ((3, 9, 11), lambda: layers(nn.Conv2d(3, 4, (2, 3), stride=(2, 1), bias=False), nn.ReLU())),
    "dilated": ((1, 9, 9), lambda: layers(nn.Conv2d(1, 17, 3, dilation=2), nn.AvgPool2d(2, 1))),
    "deep": (
        (1, 12, 12),
        lambda: layers(
            nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(3, 2), nn.ReLU()
        ),
    ),
    # rows of the kernel long enough for gradients that are not 0 to be gathered
    "gathered": (
        (2, 9, 8),
        lambda: layers(
            nn.Conv2d(2, 13, 3), nn.MaxPool2d(2, 1), nn.ReLU(), nn.Conv2d(13, 5, (2, 3), stride=(2, 1)), nn.ReLU()
        ),
    ),
    "gathered, dilated": (
        (1, 9, 8),
        lambda: layers(nn.Conv2d(1, 21, 2), nn.Conv2d(21, 3, (3, 2), dilation=(2, 1), padding=1, bias=False)),
    ),
    "long rows": ((1, 8, 8), lambda: layers(nn.Conv2d(1, 66, 1), nn.ReLU(), nn.Conv2d(66, 2, (2, 7)), nn.ReLU())),
}


def network(name, seed=0):
    shape, make = NETWORKS[name]
    torch.manual_seed(seed)
    module = make()
    module(torch.zeros(2, *shape))
    return module


def data(shape, outputs, num=83, kind=torch.uint8, **more):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=generator)
    images = images if kind is torch.uint8 else images.to(kind) / 255
    held = Images(images, torch.randint(0, outputs, (num,), generator=generator))
    return Splits(held, held, held, outputs, **more)


def splits_of(module, name, **more):
    outputs = [each for each in module.modules() if isinstance(each, nn.Linear)][-1].out_features
    return data(NETWORKS[name][0], outputs, **more)


def penalty_of(reg, population, decay=1e-3):
    names = [name for name, layout in population.layouts.items() if layout.kind in ("weight", "bias")]
    function = getattr(regularizers, reg)
    decays = torch.full((population.num_members,), decay)
    return Penalty(total_penalty(function, population.layouts, names), decays, {}, form=Form(function, names))


def trained(population, splits, way, optimize="adam", *, epochs=2, batch_size=9, penalty=None, **more):
    """Trained by torch, or by kernels."""
    optimizer = OPTIMIZERS[optimize]
    plan = Loop(epochs, batch_size, lambda progress: 3e-3 * (1 - progress / 2), optimizer)
    if way == "kernels":
        probe = optimizer([torch.zeros(1, requires_grad=True)])
        plan = replace(plan, way=way, kernels=kernels_of(population, splits, probe))
        assert plan.kernels is not None
    seeds = range(population.num_members)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return train(population, splits, plan, generators, penalty=penalty, **more)


def check_close(one, other, rtol=2e-3, atol=2e-5):
    for name, tensor in one.last.parameters.items():
        torch.testing.assert_close(
            tensor, other.last.parameters[name], rtol=rtol, atol=atol, msg=lambda m, n=name: n + m
        )
    for row, twin in zip(one.history, other.history, strict=True):
        for kind in ("loss", "penalty", "objective"):
            if getattr(row, kind) is not None:
                assert getattr(row, kind) == pytest.approx(getattr(twin, kind), rel=1e-4), kind


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_torchs(name, density):
    """One step of plain descent is the gradient."""
    module = network(name)
    population, splits = stack([module]), splits_of(module, name, num=37)
    generator = torch.Generator().manual_seed(2)
    masks = {
        key: torch.rand(p.shape, generator=generator) < density
        for key, p in population.parameters.items()
        if population.layouts[key].kind == "weight" and density < 1
    }
    held = {key: p * masks[key] if key in masks else p for key, p in population.parameters.items()}
    population = replace(population, parameters=held, masks=masks)
    moved = {
        way: trained(population, splits, way, "sgd", epochs=1, batch_size=37).last.parameters
        for way in ("eager", "kernels")
    }
    for key, before in population.parameters.items():
        slopes = [(each[key] - before) / 3e-3 for each in moved.values()]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("optimize", OPTIMIZERS)
@pytest.mark.parametrize("name", ["linear", "deep"])
def test_every_optimizer(name, optimize):
    module = network(name)
    population, splits = stack([module]), splits_of(module, name)
    check_close(*(trained(population, splits, way, optimize) for way in ("eager", "kernels")))


@pytest.mark.parametrize("density", [1.0, 0.15])
@pytest.mark.parametrize("reg", PENALTIES)
@pytest.mark.parametrize("name", ["linear", "padded"])
def test_every_penalty(name, reg, density):
    module = network(name)
    population, splits = stack([module]), splits_of(module, name)
    generator = torch.Generator().manual_seed(2)
    masks = {
        key: torch.rand(p.shape, generator=generator) < density
        for key, p in population.parameters.items()
        if population.layouts[key].kind == "weight" and density < 1
    }
    held = {key: p * masks[key] if key in masks else p for key, p in population.parameters.items()}
    population = replace(population, parameters=held, masks=masks)
    penalty = penalty_of(reg, population)
    found = [trained(population, splits, way, "sgd", penalty=penalty) for way in ("eager", "kernels")]
    check_close(*found)
    assert found[1].history[1].penalty[0] > 0


@pytest.mark.parametrize("reg", ["hs", "group_hs"])
def test_a_penalty_without_a_kernel_is_torchs(reg):
    module = network("linear")
    population, splits = stack([module]), splits_of(module, "linear")
    penalty = penalty_of(reg, population)
    plain, given = (
        trained(population, splits, "kernels", penalty=each) for each in (penalty, replace(penalty, form=None))
    )
    check_close(plain, given)


def test_the_penalty_of_zeros():
    module = network("linear")
    population, splits = stack([module]), splits_of(module, "linear")
    zeros = {name: torch.zeros_like(p) for name, p in population.parameters.items()}
    found = trained(
        replace(population, parameters=zeros), splits, "kernels", penalty=penalty_of("group_hs", population)
    )
    assert all(p.isfinite().all() for p in found.last.parameters.values()) and found.diverged == [None]


@pytest.mark.parametrize(("kind", "mean", "std"), [
    (torch.uint8, None, None), (torch.uint8, [0.3], [0.4]), (torch.uint8, [0.3, 0.1], [0.4, 2.0]),
    (torch.float32, None, None), (torch.float32, [0.3, 0.1], [0.4, 2.0]),
])  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 16, 32, 83])
def test_images_are_scaled(kind, mean, std, batch_size):
    module = network("padded")
    splits = splits_of(module, "padded", kind=kind, mean=mean, std=std)
    population = stack([module])
    found = [trained(population, splits, way, "sgd", epochs=1, batch_size=batch_size) for way in ("eager", "kernels")]
    check_close(*found)


def test_masks_that_change_on_the_way():
    module = network("deep")
    population, splits = stack([module]), splits_of(module, "deep")
    weights = [name for name, layout in population.layouts.items() if layout.kind == "weight"]

    def masks(now, share):
        found = {}
        for name in weights:
            sizes = now.parameters[name].abs().flatten(1)
            place = max(1, int(share * 0.9 * sizes.shape[1]))
            found[name] = now.parameters[name].abs() > sizes.kthvalue(place, dim=1).values[0]
        return found

    gradual = Gradual(masks, weights, lambda progress: progress, until=0.7, every=4)
    found = [trained(population, splits, way, gradual=gradual, select=True) for way in ("eager", "kernels")]
    check_close(*found, rtol=1e-2, atol=1e-3)
    for name in weights:
        assert torch.equal(found[0].last.masks[name], found[1].last.masks[name])
        assert (found[1].last.parameters[name][~found[1].last.masks[name]] == 0).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_and_company_change_no_bit(num_threads):
    modules = [network("deep", seed) for seed in range(3)]
    splits = splits_of(modules[0], "deep")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        together = trained(stack(modules), splits, "kernels", penalty=penalty_of("group_hs", stack(modules)))
        torch.set_num_threads(1)
        for member in range(3):
            alone = trained(
                stack(modules).take([member]), splits, "kernels", penalty=penalty_of("group_hs", stack(modules[:1]))
            )
            if member == 0:  # whose generator is the same
                for name, tensor in alone.last.parameters.items():
                    assert torch.equal(tensor[0], together.last.parameters[name][0])
    finally:
        torch.set_num_threads(before)


def test_the_threads_of_one_member_change_no_bit(monkeypatch):
    module = nn.Sequential(nn.Flatten(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 10))  # worth some threads
    splits, population = data((20, 20), 10, num=200), stack([module])
    found = []
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        found.append(
            trained(population, splits, "kernels", epochs=1, batch_size=70, penalty=penalty_of("hs", population))
        )
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, tensor in found[0].last.parameters.items():
            assert torch.equal(tensor, other.last.parameters[name]), name


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("density", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_accuracies_are_torchs(name, density, kind):
    """Of several members, whose masks differ, on sets that threads and pieces of images do not divide."""
    population, splits = stack([network(name, seed) for seed in range(3)]), splits_of(network(name), name, num=143)
    generator = torch.Generator().manual_seed(3)
    masks = {
        key: torch.rand(p.shape, generator=generator) < density
        for key, p in population.parameters.items()
        if population.layouts[key].kind == "weight" and density < 1
    }
    held = {key: p * masks[key] if key in masks else p for key, p in population.parameters.items()}
    population = replace(population, parameters=held, masks=masks)
    splits = splits_of(network(name), name, num=143, kind=kind, mean=[0.3], std=[0.2])
    kernels = kernels_of(population, splits, ADAM([torch.zeros(1, requires_grad=True)]))
    assert kernels.accuracies(population, splits.test, splits) == evaluate(population, splits.test, splits)


def test_the_largest_output_is_torchs():
    """The first of equals, and NaN before all."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False))
    population = stack([module])
    population.parameters["0.weight"] = torch.eye(3).unsqueeze(0)
    rows = [
        [1, 1, 0],
        [0, 1, 1],
        [torch.nan, 2, 1],
        [1, torch.nan, 3],
        [2, torch.nan, torch.nan],
        [-1, -2, -1],
        [0, 0, 0],
    ]
    images = torch.tensor(rows, dtype=torch.float32)
    for label in range(3):
        held = Images(images.nan_to_num(torch.inf), torch.full((len(rows),), label))
        splits = Splits(held, held, held, 3)
        kernels = kernels_of(population, splits, ADAM([torch.zeros(1, requires_grad=True)]))
        assert kernels.accuracies(population, held, splits) == evaluate(population, held, splits), label


def test_what_differs_where_it_is_measured_is_measured_by_torch():
    class Moody(nn.Sequential):
        def forward(self, images):
            return super().forward(images) if self.training else super().forward(images).relu()

    population, splits = stack([Moody(nn.Linear(5, 3))]), data((5,), 3)
    kernels = kernels_of(population, splits, ADAM([torch.zeros(1, requires_grad=True)]))
    assert kernels is not None
    assert kernels.accuracies(population, splits.test, splits) is None


def test_divergence_is_seen():
    module = network("linear")
    population, splits = stack([module, module]), splits_of(module, "linear")
    huge = {name: p.clone() for name, p in population.parameters.items()}
    next(iter(huge.values()))[1] = 1e30
    found = trained(replace(population, parameters=huge), splits, "kernels", "sgd")
    assert found.diverged == [None, 1]


def test_a_curve_of_a_hundred_steps():
    module = network("deep")
    population, splits = stack([module]), splits_of(module, "deep", num=50)
    one, other = (trained(population, splits, way, epochs=10, batch_size=5) for way in ("eager", "kernels"))
    for row, twin in zip(one.history[1:], other.history[1:]):
        assert row.loss == pytest.approx(twin.loss, rel=1e-3)


# --- what there is no kernel for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "batch_norm"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)), "draws random numbers"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)), "tanh"),
    (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, groups=1), nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(8, 3)),
     "grouped convolution"),
    (lambda: nn.Sequential(nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.LazyLinear(3)), "beyond the maps"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1)), "softmax|no chain"),
])  # fmt: skip
def test_networks_without_kernels_are_told(make, words):
    module = make()
    module(torch.zeros(2, 1, 4, 4))
    with pytest.raises(UnsupportedError, match=words):
        chain_of(module, torch.zeros(1, 1, 4, 4))


def test_a_sum_is_no_chain():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(x + self.first(x))

    with pytest.raises(UnsupportedError, match="nothing else"):
        chain_of(Residual(), torch.zeros(1, 4))


def test_how_it_is_trained_may_be_none_of_ours():
    module = network("linear")
    population, splits = stack([module]), splits_of(module, "linear")

    def refused(words, optimizer=ADAM, splits=splits, **how):
        with pytest.raises(UnsupportedError, match=words):
            kernels_of(population, splits, optimizer([torch.zeros(1, requires_grad=True)]), **how)

    refused("the loss is not cross-entropy", loss=lambda outputs, labels: outputs.sum())
    refused("images are augmented", augments=True)
    refused("shrunk", shrinks=True)
    refused("straight through", straight_through=True)
    refused("the optimizer is RMSprop", torch.optim.RMSprop)
    refused("the optimizer is Adam, with", partial(ADAM, amsgrad=True))


def test_without_a_compiler_it_is_told_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("SPARSITY_KERNELS", str(tmp_path))
    library._warn.cache_clear()
    for _ in range(2):
        monkeypatch.setenv("CXX", "/no/such/compiler")
        assert library_of(chain_of(network("linear"), torch.zeros(1, 7, 3))) is None
    assert caplog.text.count("no C++ compiler is found (set CXX)") == 1


def test_a_failed_build_is_told_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("SPARSITY_KERNELS", str(tmp_path))
    monkeypatch.setenv("SPARSITY_KERNELS_FLAGS", "-fno-such-thing")
    library._warn.cache_clear(), library._loaded.cache_clear()
    for _ in range(2):
        assert library_of(chain_of(network("linear"), torch.zeros(1, 7, 3))) is None
    assert caplog.text.count("kernels cannot be compiled") == 1 and not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_two_may_build_at_once_and_what_is_damaged_is_built_again(monkeypatch, tmp_path):
    code = (
        "import torch; from test_kernels import chain_of, library_of, network\n"
        "assert library_of(chain_of(network('one unit'), torch.zeros(1, 1))) is not None"
    )
    environment = {**os.environ, "SPARSITY_KERNELS": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(subprocess.run, [sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [each.result().returncode for each in runs] == [0, 0]
    built, *_ = tmp_path.iterdir()
    content = built.read_bytes()
    built.write_bytes(content[: len(content) // 2])
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    assert content in [path.read_bytes() for path in tmp_path.iterdir()]


# --- as typed --------------------------------------------------------------------------------------------------------


def test_a_run_by_kernels_is_the_run(run, tmp_path):
    small = ("model=mlp", "model.factory.hidden=[30]", "plots=false", "reg=group_hs", "precision=float32")
    eager, kernels = (run(*small, f"step={way}") for way in ("eager", "kernels"))
    assert {each["step"] for each in kernels["computed_with"].values()} == {"kernels", None}
    final = next(each["accuracy"] for each in kernels["stages_run"][::-1] if each["name"] == "finetune")
    assert final["test"] == kernels["accuracy"]["selected"]["test"]  # of the stage's end, and of its epoch
    for one, other in zip(eager["stages_run"], kernels["stages_run"]):
        assert one["accuracy"]["validation"] == pytest.approx(other["accuracy"]["validation"], abs=0.01)
        assert one["nonzero"]["weights"] == pytest.approx(other["nonzero"]["weights"], rel=0.01)


@pytest.mark.parametrize(("typed", "words"), [
    (["model=resnet20"], "step=kernels: there are none, as it computes"),
    (["optimizer=adam", "optimizer.amsgrad=true"], "step=kernels: there are none, as the optimizer is Adam"),
    (["reg=proximal_l1"], "step=kernels: there are none, as weights are shrunk"),
])  # fmt: skip
def test_what_is_typed_in_vain_is_refused(run, typed, words):
    with pytest.raises(ConfigError, match=words):
        run("step=kernels", "model=mlp", "plots=false", *typed)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gradual", "rigl", "quantized", *slow("iterative")])
def test_recipes_by_kernels(run, recipe):
    small = ("model=mlp", "model.factory.hidden=[30]", "plots=false", "budget.compression=5")
    if recipe == "quantized":  # whose last stage sees other weights
        result = run(f"recipe={recipe}", *small, "step=auto")
    else:
        result = run(f"recipe={recipe}", *small, "step=kernels")
    assert result["accuracy"]["final"]["test"] > 0.4
    json.dumps(result)
