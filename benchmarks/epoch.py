"""Seconds per epoch beside a plain PyTorch loop, measured in turns in one run: `make bench`, or by hand

    python benchmarks/epoch.py --data-root data --rounds 5 --images 10000

Both train on the same images with the same batch size and Adam; the plain loop is as users write it: float32, a
DataLoader with ToTensor, the module's own forward pass, the penalty by a Python loop over its parameters. Ours is
measured in float32 and in bfloat16, which `precision=auto` takes where the processor has units for it.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from sparsity import data, models, regularizers
from sparsity.population import stack
from sparsity.schedules import learning_rate
from sparsity.stages import total_penalty
from sparsity.step import Penalty
from sparsity.training import Loop, train

BATCH_SIZE = 100
DECAY = 1e-4
FULL_EPOCH = 60_000  # images; seconds are given for so many
CASES = [(network, reg) for network in ("lenet300", "lenet5") for reg in ("none", "hs", "group_hs")]


class PlainLeNet300(nn.Module):
    """LeNet-300-100 as it is commonly written."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities of a batch."""
        units = F.relu(self.fc2(F.relu(self.fc1(images.view(-1, 784)))))
        return F.log_softmax(self.fc3(units), dim=1)


class PlainLeNet5(nn.Module):
    """LeNet-5 as it is commonly written: ReLU before each pool."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities of a batch."""
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(maps.view(-1, 800)))), dim=1)


def plain_penalty(reg: str, module: nn.Module) -> Tensor:
    """The penalty by a Python loop over parameters."""
    total = torch.zeros(())
    for parameter in module.parameters():
        if reg == "hs":
            total = total + parameter.abs().sum() ** 2 / (parameter**2).sum()
        elif parameter.dim() > 1:
            filters = (parameter**2).flatten(1).sum(1).sqrt().sum()
            channels = (parameter**2).transpose(0, 1).flatten(1).sum(1).sqrt().sum()
            total = total + (filters**2 + channels**2) / (parameter**2).sum()
    return total


def plain_epoch(network: str, reg: str, root: str, num_images: int) -> Callable[[], None]:
    """One epoch of the plain loop."""
    images = datasets.MNIST(root, train=True, transform=transforms.ToTensor())
    loader = DataLoader(Subset(images, range(num_images)), batch_size=BATCH_SIZE, shuffle=True)
    module = PlainLeNet300() if network == "lenet300" else PlainLeNet5()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def epoch() -> None:
        torch.set_flush_denormal(False)
        module.train()
        for batch, labels in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(module(batch), labels)
            if reg != "none":
                loss = loss + DECAY * plain_penalty(reg, module)
            loss.backward()
            optimizer.step()

    return epoch


def our_epoch(
    network: str, reg: str, root: str, num_images: int, precision: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One epoch of the project's loop; each call goes on from the last."""
    whole = data.split(data.mnist(root=root), validation=0, seed=0, normalize=None)
    splits = data.replace(whole, train=whole.train.take(torch.arange(num_images)))
    population = stack([models.build(getattr(models, network), (1, 28, 28), 10, seed=0)])
    kinds = ("weight", "bias") if reg == "hs" else ("weight",)
    names = [name for name, layout in population.layouts.items() if layout.kind in kinds]
    penalty = None
    if reg != "none":
        function = total_penalty(getattr(regularizers, reg), population.layouts, names)
        penalty = Penalty(function, torch.tensor([DECAY]), {})
    rate = partial(learning_rate, lr=1e-3, shape="constant", warmup=0.0)
    loop = Loop(1, BATCH_SIZE, rate, partial(torch.optim.Adam, fused=True), precision)
    generator = torch.Generator().manual_seed(0)
    state = {"population": population}

    def epoch() -> None:
        torch.set_flush_denormal(True)
        state["population"] = train(state["population"], splits, loop, [generator], penalty=penalty).last

    return epoch


def seconds(function: Callable[[], None]) -> float:
    """The wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(network: str, reg: str, root: str, num_images: int, rounds: int) -> dict[str, object]:
    """The loops in turns; the first turn of each warms up and is not counted."""
    makers = {"plain": plain_epoch, "float32": our_epoch, "bfloat16": partial(our_epoch, precision=torch.bfloat16)}
    loops = {name: make(network, reg, root, num_images) for name, make in makers.items()}
    for epoch in loops.values():
        epoch()
    turns = [{name: seconds(epoch) * FULL_EPOCH / num_images for name, epoch in loops.items()} for _ in range(rounds)]
    ratios = {name: [turn["plain"] / turn[name] for turn in turns] for name in loops if name != "plain"}
    return {
        "network": network,
        "reg": reg,
        "seconds": {name: statistics.median(turn[name] for turn in turns) for name in loops},
        "ratio": {name: statistics.median(each) for name, each in ratios.items()},
        "ratios": ratios,
    }


def main() -> None:
    """Measures, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=os.environ.get("SPARSITY_DATA", "data"), help="folder that holds MNIST")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000, help="of each measured epoch; seconds are for 60,000")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/epoch.json"))
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}; seconds per epoch of 60,000, medians of {options.rounds} rounds")
    names = ("plain", "float32", "bfloat16")
    print(f"{'network':<10}{'reg':<10}" + "".join(f"{name:>10}" for name in names) + f"{'ratios':>16}")
    rows = []
    for network, reg in CASES:
        row = measure(network, reg, options.data_root, options.images, options.rounds)
        rows.append(row)
        shown = "".join(f"{row['seconds'][name]:>10.2f}" for name in names)
        ratios = "".join(f"{row['ratio'][name]:>7.1f}×" for name in names[1:])
        print(f"{network:<10}{reg:<10}{shown}{ratios}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
