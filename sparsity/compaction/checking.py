"""Whether a smaller population computes what the whole one does, seen on a few images."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from sparsity.compaction.slices import Compacted
from sparsity.data import Splits
from sparsity.graph.recorder import attention_in_parts
from sparsity.population import Population, over_members
from sparsity.tensors import Tensors

NUM_CHECKED = 8  # images that both networks are compared on


class Response(NamedTuple):
    """What a population gives on a few images."""

    outputs: Tensor  # [members, images, classes]
    gradients: Tensors  # where masks let them through
    alone: Tensor  # the outputs once more, where nothing asks for gradients: torch then computes some otherwise


def responses(population: Population, splits: Splits) -> list[Response]:
    """What a population gives in evaluation and in training."""
    return [_response(population, splits, training) for training in (False, True)]


def trouble(compacted: Compacted, expected: Sequence[Response]) -> str | None:
    """What keeps the networks from giving the same outputs and gradients, in evaluation and in training; or None."""
    found = responses(compacted.population, compacted.splits)
    agree = all(_agree(compacted, *pair) for pair in zip(expected, found))
    return None if agree else "the smaller network computes something else"


def _agree(compacted: Compacted, whole: Response, small: Response) -> bool:
    """Whether outputs and gradients are the same, and 0 where entries were removed."""
    gradients = whole.gradients
    zeros = replace(compacted.full, parameters={name: torch.zeros_like(g) for name, g in gradients.items()}, buffers={})
    filled = compacted.fill(zeros, replace(compacted.population, parameters=small.gradients)).parameters
    outputs = _are_close([whole.outputs, whole.alone], [small.outputs, small.alone])
    return outputs and _are_close(gradients.values(), filled.values())


def _response(population: Population, splits: Splits, training: bool) -> Response:
    """What a population gives in evaluation, or in training."""
    count = min(len(splits.train), NUM_CHECKED)
    batch = next(splits.train.take(torch.arange(count)).batches(torch.arange(count).unsqueeze(0), count))
    images, population = splits.scale(batch.images).squeeze(0), population.clone()
    trained = {name: parameter.requires_grad_() for name, parameter in population.trainable.items()}
    module = population.module.train(training)

    def of_member(parameters: Tensors, buffers: Tensors) -> Tensor:
        return functional_call(module, (parameters, buffers), (images,))

    def outputs_of(population: Population) -> Tensor:
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            torch.manual_seed(0)
            return over_members(of_member, population.num_members, (0, 0))(population.parameters, population.buffers)

    with torch.no_grad():
        alone = outputs_of(population.clone())
    with attention_in_parts():
        outputs = outputs_of(population)
    # a mixture of all outputs, as a loss is near 0 where the network is good, and its gradients are mostly rounding
    mixture = outputs * torch.linspace(-1, 1, outputs[0].numel(), device=images.device).view_as(outputs[0])
    found = torch.autograd.grad(mixture.sum(), list(trained.values()), materialize_grads=True)
    return Response(
        outputs.detach(), {name: g * population.masks.get(name, 1) for name, g in zip(trained, found)}, alone
    )


def _are_close(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether tensors are the same up to rounding, beside the largest of them."""
    pairs = list(zip(ones, others))
    largest = torch.stack([one.abs().max() for one, _ in pairs]).max()
    distance = torch.stack([(one - other).abs().max() for one, other in pairs]).max()
    return bool(distance <= largest * torch.finfo(largest.dtype).eps ** 0.5)
