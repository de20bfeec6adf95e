"""Compact networks of random networks: exact for any images, as small as reported, and as trainable.

One seed again: `python tests/test_compact_networks.py SEED` tells what is wrong and the smallest part that shows it.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from random_networks import network, recipe, shrunk
from test_units import counted
from torch import Tensor, nn

import sparsity
from sparsity import artifact
from sparsity.accounting import account
from sparsity.artifact import About, Cut, Network, UnrecordableError, cut
from sparsity.graph import trace
from sparsity.population import stack

QUICK, LONG = 40, 500


class Wrong(AssertionError):
    """What is wrong with a compact network, and the numbers of it."""

    def __init__(self, kind: str, more: object = ""):
        super().__init__(f"{kind}: {more}")
        self.kind = kind


def distance(one: Tensor, other: Tensor) -> float:
    """How far apart tensors are, beside the larger of them."""
    if one.shape != other.shape:
        return float("inf")
    scale = max(one.abs().max().item(), 1e-6)
    return ((one - other).abs().max() / scale).item()


def assert_close(kind: str, found: Tensor, expected: Tensor, most: float = 1e-8) -> None:
    if not torch.equal(found.isfinite(), expected.isfinite()):
        raise Wrong(kind, "not finite")
    far = distance(expected.nan_to_num(0, 0, 0), found.nan_to_num(0, 0, 0))
    if not far < most:
        raise Wrong(kind, f"{tuple(found.shape)} instead of {tuple(expected.shape)}, apart by {far:.2g}")


def assert_outputs(module: nn.Module, found: Cut, shape: torch.Size) -> None:
    """The compact network and the dense one give what the module gives, whatever the images and however many."""
    small, whole = Network(found.program).eval(), Network(found.dense()).eval()
    with torch.no_grad():
        for count, size in ((1, 1.0), (2, 0.3), (5, 1.5)):
            images = torch.randn(count, *shape, dtype=torch.double) * size
            expected = module(images)
            assert_close("outputs", small(images), expected)
            assert_close("dense outputs", whole(images), expected)


def assert_counts(module: nn.Module, found: Cut, image: Tensor) -> None:
    """What a report calls removable is gone; more may be, where whole parts of a network are dead."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    graph = trace(module, image)
    report = account(parameters, stack([module]).layouts, graph, buffers=buffers)
    dense, left = counted(module, image)[0], counted(Network(found.program).requires_grad_(False), image)[0]
    if report.macs["dense"] != dense:
        raise Wrong("dense MACs", f"{report.macs['dense']} reported, {dense} counted")
    if left > report.macs["removable"] and not found.stays:
        raise Wrong("MACs", f"{report.macs['removable']} reported, {left} counted, {dense} dense")


def assert_gradients(module: nn.Module, found: Cut, image: Tensor) -> None:
    """Live entries have the gradients that they have in the masked network, unless what they make is folded."""
    tensors = dict(module.named_parameters())
    for name, tensor in found.whole.tensors.items():
        if name.startswith("constant") or name.endswith(".folded"):
            return  # made of parameters: the gradient of these has other ways
        if name in tensors and not torch.equal(tensor, tensors[name]):
            return
    images = torch.cat([image, torch.randn(3, *image.shape[1:], dtype=torch.double)])
    small = Network(found.program).eval()
    ones, others = module(images), small(images)
    mixture = torch.linspace(-1, 1, ones[0].numel(), dtype=torch.double).view_as(ones[0])
    names = [name for name in small.places if name in found.places and found.places[name].name in tensors]
    own = {name: getattr(small, small.places[name]) for name in names}
    trained = {name: tensor for name, tensor in own.items() if tensor.requires_grad}
    if not trained or not ones.requires_grad or not others.requires_grad:
        return
    expected = torch.autograd.grad((ones * mixture).sum(), list(tensors.values()), materialize_grads=True)
    expected = dict(zip(tensors, expected))
    given = torch.autograd.grad((others * mixture).sum(), list(trained.values()), materialize_grads=True)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    sums: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, gradient in zip(trained, given):  # one that is read in several ways stands in several places
        place = found.places[name]
        every = [place.kept.get(axis, torch.arange(size)) for axis, size in enumerate(tensors[place.name].shape)]
        where = torch.meshgrid(*every, indexing="ij") if every else ()
        whole = sums.setdefault(place.name, torch.zeros_like(tensors[place.name]))
        whole[where] += gradient
        kept.setdefault(place.name, torch.zeros(whole.shape, dtype=torch.bool))[where] = True
    for name, whole in sums.items():
        live = kept[name] & (tensors[name] != 0)
        if live.any() and scale > 0 and (whole - expected[name])[live].abs().max() > 1e-7 * scale:
            raise Wrong("gradients", name)


def assert_file(found: Cut, image: Tensor) -> None:
    """The file gives the same network, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compact.safetensors"
        artifact.write(path, found, About(tuple(image.shape[1:])))
        with torch.no_grad():
            for dense in (False, True):
                own = found.dense() if dense else found.program.fused()
                read = sparsity.load(path, dense=dense)
                if not all(torch.equal(read.program.tensors[name], tensor) for name, tensor in own.tensors.items()):
                    raise Wrong("file", "other tensors")
                assert_close("file", read(image), Network(own).eval()(image))


def check(module: nn.Module, image: Tensor) -> Cut:
    """Everything that is to hold of a network's compact one."""
    torch.manual_seed(1)
    found = cut(module, image)
    assert_outputs(module, found, image.shape[1:])
    assert_counts(module, found, image)
    assert_gradients(module, found, image)
    assert_file(found, image)
    return found


def wrong(module: nn.Module, image: Tensor) -> str | None:
    """What is wrong with the compact network of a module; None: nothing is."""
    try:
        check(module, image)
    except UnrecordableError as error:
        return f"unrecordable: {error}"
    except Wrong as error:
        return error.kind
    except Exception as error:
        return type(error).__name__
    return None


def assert_all(seeds: range) -> Counter:
    """Checks networks, and says which of them fail; how many could not be recorded is counted, and why."""
    failed, unrecorded = [], Counter()
    for seed in seeds:
        module, image = network(seed)
        if not len(module.steps):
            continue
        try:
            check(module, image)
        except UnrecordableError as error:
            unrecorded[str(error)] += 1
        except Exception as error:
            failed.append(f"seed {seed}: {type(error).__name__} {error}")
    assert not failed, "\n".join(failed)
    assert unrecorded.total() <= len(seeds) // 5, unrecorded
    return unrecorded


@pytest.mark.parametrize("first", range(0, QUICK, 10))
def test_compact_networks_of_random_networks(first):
    assert_all(range(first, first + 10))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, QUICK + LONG, 50))
def test_many_more_random_networks(first):
    assert_all(range(first, first + 50))


class Tokens(nn.Module):
    """Channels normalised each by itself with running statistics, as tokens."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.out = nn.Linear(6, 3)

    def forward(self, images):
        return self.out(self.norm(self.one(images)).relu().flatten(2).transpose(1, 2)).mean(1)


class Turned(nn.Module):
    """A matrix of its own behind channels that are turned to the end."""

    def __init__(self):
        super().__init__()
        self.one, self.matrix, self.out = nn.Conv1d(3, 6, 1), nn.Parameter(torch.rand(6, 5)), nn.Linear(5, 3)

    def forward(self, images):
        return self.out((self.one(images.flatten(2)).relu().transpose(1, 2) @ self.matrix).relu()).mean(1)


def around():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=(2, 1), padding_mode="circular"), nn.ReLU(), nn.Conv2d(6, 4, 3),
    )  # fmt: skip


def chosen(function):
    class Chosen(nn.Module):
        def forward(self, units):
            return function(units)

    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 5), Chosen(), nn.Linear(2, 3))


BY_HAND = {  # and how many of the six units of the first layer are left of three that live
    "circular padding": (around, 3),
    "sorted": (lambda: chosen(lambda units: units.sort(1).values[:, :2]), 3),
    "the largest": (lambda: chosen(lambda units: units.topk(2, 1).values), 3),
    "a matrix behind turned channels": (Turned, 3),
    "running statistics of instances": (Tokens, 6),  # which are laid out for each image
}


@pytest.mark.parametrize("name", BY_HAND)
def test_networks_that_say_little_of_their_channels(name):
    torch.manual_seed(0)
    make, left = BY_HAND[name]
    module = make().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if len(parameter) == 6 and parameter.shape != (6, 5):
                parameter[::2] = 0
    found = check(module, torch.rand(1, 3, 8, 8, dtype=torch.double))
    first = next(iter(found.program.tensors.values()))
    assert len(first) == left and bool(found.stays) == (left == 6)


if __name__ == "__main__":
    for text in sys.argv[1:]:
        number = int(text)
        shape, steps = shrunk(number, wrong)
        smallest, image = network(number, (shape, steps))
        print(f"seed {number}: {recipe(number)}\nsmallest: {shape}, {steps}\n{smallest}\n{wrong(smallest, image)}")
        check(smallest, image)
