"""Accuracy, measured on as many images at once as memory allows."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsity.data import Files, Images, Splits
from sparsity.memory import free_bytes
from sparsity.population import Population, over_members
from sparsity.step import arrangement, convolves, outputs
from sparsity.tensors import Tensors

MOST = 500  # images: enough to fill the cores, few enough to stay in their caches
TIMES = 5  # as many images as a batch of training, which holds what its backward pass needs as well


def evaluate(population: Population, data: Images | Files, splits: Splits, at_once: int = MOST) -> list[float]:
    """The accuracy of every member on a set, in [0, 1], in the weights' own precision; all see the same images.

    at_once: the number of images in a forward pass.
    """
    module = population.module.eval()

    def correct(parameters: Tensors, buffers: Tensors, images: Tensor, labels: Tensor) -> Tensor:
        return (outputs(module, parameters, buffers, images, torch.float32).argmax(1) == labels).sum()

    members = range(population.num_members)
    if len(members) > 1 and population.device.type == "cpu" and convolves(population):  # slower together
        return [evaluate(population.member(member), data, splits, at_once)[0] for member in members]
    counted = over_members(correct, population.num_members, (0, 0, None, None))
    arrange = arrangement(population)
    total = torch.zeros(population.num_members, dtype=torch.long, device=population.device)
    with torch.no_grad():
        for batch in data.batches(torch.arange(len(data)).unsqueeze(0), at_once):
            images = arrange(splits.scale(batch.images)).squeeze(0)
            total += counted(population.parameters, population.buffers, images, batch.labels.squeeze(0))
    return (total.double() / len(data)).tolist()


def images_at_once(population: Population, batch_size: int, image_bytes: int) -> int:
    """How many images are evaluated at once: as many as half of the free memory takes, within bounds.

    batch_size: of training; image_bytes: what one image of one member takes.
    """
    fitting = free_bytes(population.device) // 2 // max(1, image_bytes * population.num_members)
    return max(1, min(MOST, TIMES * batch_size, fitting))


def image_bytes(population: Population, splits: Splits) -> int:
    """The memory that evaluating one image of one member takes: twice what its largest operation reads and writes."""
    member, images = population.member(0), splits.example().to(population.device)
    own = {name: tensor[0].detach() for name, tensor in member.parameters.items()}
    buffers = {name: tensor[0] for name, tensor in member.buffers.items()}
    traffic = _Traffic([*own.values(), *buffers.values()])
    # what a module cannot do, it is told of where it is trained
    with contextlib.suppress(Exception), torch.no_grad(), traffic:
        outputs(member.module.eval(), own, buffers, images, torch.float32)
    return 2 * max(traffic.most, images.nbytes) // len(images)


class _Traffic(TorchDispatchMode):
    """Remembers the most bytes that an operation read and wrote, the network's own tensors apart."""

    def __init__(self, own: list[Tensor]):
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor)]
        sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        self.most = max(self.most, sum(size for place, size in sizes.items() if place not in self.own))
        return found
