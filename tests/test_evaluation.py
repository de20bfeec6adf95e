"""How many images are evaluated at once, and that it changes no accuracy."""

import pytest
import torch
from torch import nn

from sparsity import evaluation
from sparsity.data import Images, Splits
from sparsity.evaluation import evaluate, image_bytes, images_at_once
from sparsity.population import stack


def splits(shape=(3, 8, 8), num=50):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, *shape), generator=generator, dtype=torch.uint8)
    part = Images(images, torch.arange(num) % 4)
    return Splits(part, part, part, 4)


def network(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 4)
    )


def test_an_image_takes_twice_what_the_largest_operation_reads_and_writes():
    floats = 16 * 8 * 8 * 4
    assert image_bytes(stack([network()]), splits()) == 2 * 2 * floats  # batch normalisation reads and writes as many
    assert image_bytes(stack([network(seed) for seed in range(3)]), splits()) == 4 * floats  # of one member
    wide = image_bytes(stack([network(width=64)]), splits())
    assert wide == 4 * 4 * floats


def test_weights_do_not_count():
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 5000), nn.ReLU(inplace=True), nn.Linear(5000, 4))
    assert image_bytes(stack([module]), splits()) == 2 * 4 * (5000 + 192)


@pytest.mark.parametrize(
    ("free", "members", "batch_size", "expected"),
    [
        (1e12, 1, 100, 500),  # as ever
        (1e12, 1, 1000, 500),
        (1e12, 1, 16, 80),
        (1e12, 1, 1, 5),
        (200_000, 1, 100, 100),
        (200_000, 4, 100, 25),
        (10, 1, 100, 1),
    ],
)
def test_as_many_images_as_half_of_the_memory_takes(monkeypatch, free, members, batch_size, expected):
    monkeypatch.setattr(evaluation, "free_bytes", lambda device: int(free))
    population = stack([nn.Linear(2, 2) for _ in range(members)])
    assert images_at_once(population, batch_size, 1000) == expected


@pytest.mark.parametrize("members", [1, 2])
def test_the_number_at_once_changes_no_accuracy(members):
    population, data = stack([network(seed) for seed in range(members)]), splits()
    whole = evaluate(population, data.test, data)
    for at_once in (1, 7, 49, 50):
        assert evaluate(population, data.test, data, at_once) == whole


def test_a_run_evaluates_within_bounds(run, monkeypatch):
    from sparsity.models import MLP

    seen = {True: [], False: []}
    forward = MLP.forward

    def noting(self, images):
        seen[torch.is_grad_enabled()].append(len(images))
        return forward(self, images)

    monkeypatch.setattr(MLP, "forward", noting)
    run(
        "model=mlp",
        "model.factory.hidden=[8]",
        "schedule.batch_size=16",
        "step=eager",
        "stages=[pretrain]",
        "plots=false",
        "compact=false",
    )
    assert max(seen[True]) <= 16 + 1 and max(seen[False]) == 80
