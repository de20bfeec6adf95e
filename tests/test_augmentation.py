"""Augmentations: what they do to images, and that members together see what members alone do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, choices
from omegaconf import OmegaConf
from test_training import generators, loop, network, splits

from sparsity import augmentation, config, nodes
from sparsity.errors import ConfigError
from sparsity.population import stack
from sparsity.step import augmented
from sparsity.training import train

NAMES = [name for name in choices("augment") if name != "none"]


def shipped(name):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "augment" / f"{name}.yaml"))
    return config.check("augment", node, nodes.Augment)


def images(count=4, size=8, channels=1):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def digits(given, draws, **more):
    still = {"shift": 0.0, "rotation": 0.0, "scale": 0.0, "elastic": 0.0}
    return augmentation.digits(given, draws, **{**still, **more})


def test_nothing_is_changed_by_nothing():
    given = images()
    torch.testing.assert_close(digits(given, torch.rand(4, 36)), given)
    middle = torch.full((4, 36), 0.5)
    torch.testing.assert_close(digits(given, middle, shift=2.0, rotation=9.0, scale=0.1, elastic=1.0), given)


def test_a_shift_is_in_pixels():
    draws = torch.full((4, 36), 0.5)
    draws[:, 2], draws[:, 3] = 1.0, 0.0  # right by 2, up by 2, of what is read
    found = digits(images(), draws, shift=2.0)
    torch.testing.assert_close(found[:, :, 2:, :-2], images()[:, :, :-2, 2:])
    assert not found[:, :, :2].any() and not found[:, :, :, -2:].any()  # black from outside


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_a_turn_is_in_degrees_and_keeps_shapes(shape):
    draws = torch.full((1, 36), 0.5)
    draws[:, 0] = 1.0
    given = torch.rand(1, 2, *shape)
    found = digits(given, draws, rotation=90.0)
    if shape[0] == shape[1]:
        torch.testing.assert_close(found, given.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)
    half = digits(given, draws, rotation=180.0)
    torch.testing.assert_close(half, given.flip(2, 3), rtol=1e-4, atol=1e-4)


def test_a_smaller_scale_reads_from_further_out():
    draws = torch.full((1, 36), 0.5)
    draws[:, 1] = 1.0
    point = torch.zeros(1, 1, 9, 9)
    point[..., 2:7, 2:7] = 1
    assert digits(point, draws, scale=0.5).sum() > 1.5 * point.sum()


def test_flip_and_crop_are_parts_of_the_image():
    given, seen = images(1), set()
    padded = torch.nn.functional.pad(given, (2,) * 4)
    parts = {(mirrored, down, right): (part.flip(3) if mirrored else part)
             for mirrored in (False, True) for down in range(5) for right in range(5)
             for part in [padded[:, :, down : down + 8, right : right + 8]]}  # fmt: skip
    draws = torch.rand(600, 3, generator=torch.Generator().manual_seed(1))
    for found in augmentation.flip_crop(given.expand(600, -1, -1, -1), draws, padding=2):
        (key,) = (key for key, part in parts.items() if torch.equal(part[0], found))
        seen.add(key)
    assert len(seen) == 50


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_shape_stay(name, channels):
    node = shipped(name)
    given = torch.full((3, 5, channels, 32, 32), 200, dtype=torch.uint8)
    found = augmented(node.function.partial(), given, torch.rand(3, 5, node.draws))
    assert found.shape == given.shape and found.dtype is torch.float32
    assert found.amax() == pytest.approx(200 / 255, abs=1e-5) and found.amin() >= 0
    assert float((found - 200 / 255).abs().flatten(2).median(2).values.amax()) < 1e-5


def run(name, members, seeds, way="eager", epochs=2, device="cpu"):
    node = shipped(name)
    plan = replace(loop(epochs, optimizer=torch.optim.SGD, fused=True), way=way)
    plan = replace(plan, augment=node.function.partial(), draws=node.draws)
    return train(stack(members, device), splits().to(device), plan, generators(*seeds))


@pytest.mark.parametrize("name", NAMES)
def test_members_together_see_what_they_see_alone(name):
    members = [network(seed=seed) for seed in range(3)]
    together = run(name, members, range(3)).last
    for seed, module in enumerate(members):
        for key, value in run(name, [module], [seed]).last.parameters.items():
            torch.testing.assert_close(together.parameters[key][seed], value[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_augments_anew(name):
    one, other = (run(name, [network()], [0], way, epochs=4).last for way in ("eager", "recorded"))
    for key, value in one.parameters.items():
        torch.testing.assert_close(other.parameters[key], value, rtol=1e-4, atol=1e-6)


def test_same_seed_same_bits_and_every_epoch_others(run=run):
    one, other = (run("digits", [network()], [5]).last for _ in range(2))
    assert all(torch.equal(value, other.parameters[key]) for key, value in one.parameters.items())
    plan = loop(2, optimizer=torch.optim.SGD)
    seen = []
    function = lambda images, draws: seen.append(draws) or images  # noqa: E731
    train(stack([network()]), splits(), replace(plan, augment=function, draws=2), generators(0))
    assert len({float(each[0, 0]) for each in seen}) == len(seen) == 2 * 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["augment=digits", "augment.draws=5"], r"augment=digits fails on images .* with augment\.draws=5"),
        (["augment=flip_crop", "augment.function.padding=-1"], "padding"),
    ],
)
def test_what_cannot_be_is_refused_before_training(overrides, words, request):
    with pytest.raises(ConfigError, match=words):
        request.getfixturevalue("run")(*overrides)


def test_vectors_cannot_be_augmented():
    with pytest.raises(ConfigError, match=r"augment=digits needs images .* shape is \[7\]"):
        augmentation.check_augmentation(partial(digits), 36, (7,), "digits")


@pytest.mark.slow
def test_a_run_names_its_augmentation(request):
    result = request.getfixturevalue("run")("augment=digits", "model=lenet5")
    assert result["name"]["augment"] == "digits" and result["accuracy"]["final"]["test"] > 0.5
