"""The loop that everything is compared with: float32, a DataLoader, and the networks, as they are commonly written."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from benchmarks.subjects import BATCH_SIZE, DECAY, Setting, bytes_taken
from benchmarks.turns import Tell


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
    total = torch.zeros((), device=next(module.parameters()).device)
    for parameter in module.parameters():
        if reg == "hs":
            total = total + parameter.abs().sum() ** 2 / (parameter**2).sum()
        elif parameter.dim() > 1:
            filters = (parameter**2).flatten(1).sum(1).sqrt().sum()
            channels = (parameter**2).transpose(0, 1).flatten(1).sum(1).sqrt().sum()
            total = total + (filters**2 + channels**2) / (parameter**2).sum()
    return total


def plain_epochs(tell: Tell, setting: Setting, network: str, reg: str, device: str = "cpu") -> None:
    """Tells the seconds of epoch after epoch of the plain loop."""
    loader = DataLoader(Subset(_images(setting), range(setting.images)), batch_size=BATCH_SIZE, shuffle=True)
    module = (PlainLeNet300() if network == "lenet300" else PlainLeNet5()).to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    while True:
        start = time.perf_counter()
        loss = _epoch(loader, module, optimizer, reg, device)
        float(loss)  # waits for a GPU
        tell(seconds=time.perf_counter() - start, bytes=bytes_taken(device))


def _epoch(loader: DataLoader, module: nn.Module, optimizer: torch.optim.Optimizer, reg: str, device: str) -> Tensor:
    """One pass over the images; the last batch's loss."""
    module.train()
    for batch, labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(module(batch.to(device)), labels.to(device))
        if reg != "none":
            loss = loss + DECAY * plain_penalty(reg, module)
        loss.backward()
        optimizer.step()
    return loss.detach()


def _images(setting: Setting) -> Dataset:
    if setting.random:
        return datasets.FakeData(setting.images, (1, 28, 28), transform=transforms.ToTensor())
    return datasets.MNIST(setting.data_root, train=True, transform=transforms.ToTensor())
