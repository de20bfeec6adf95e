"""The bytes that a member's compact network takes as a file, known before there is one."""

import copy
from collections.abc import Callable, Sequence

import torch

from sparsity import artifact
from sparsity.accounting import account
from sparsity.limits import Budget
from sparsity.population import Population
from sparsity.stages.context import Context
from sparsity.tensors import Tensors

LONGEST = 1234.5678901234567  # a ratio of as many digits as any has


def size_of(
    population: Population, context: Context, budgets: Sequence[Budget | None] | None
) -> Callable[[Tensors], int] | None:
    """The bytes of a file of one member's parameters and buffers in float32, as a function of these.

    None where no budget limits them. It is the file that a run writes, header included; what the header says of the
    run's figures is taken at its longest, so that the file is at most as large, and smaller by the digits that its
    counts have fewer than the dense network's.
    """
    if not any(budget is not None and budget.limits_bytes for budget in budgets or []):
        return None
    module = copy.deepcopy(population.module).cpu().float().eval()
    image = context.splits.example()[:1].cpu().float()
    about = _about(population, context)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def size(tensors: Tensors) -> int:
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return artifact.size(module, image, about)

    return size


def _about(population: Population, context: Context) -> artifact.About:
    """What the file of a run says beside the network, where all that is counted is as large as it can be."""
    member, splits = population.member(0), context.splits
    parameters, buffers = (
        {name: t[0].detach() for name, t in part.items()} for part in (member.parameters, member.buffers)
    )
    report = account(parameters, member.layouts, context.graph, buffers=buffers, stds=dict.fromkeys(parameters, 0.0))
    figures = {
        "name": dict(context.choices),
        "seed": max(context.seeds),
        "nonzero": report.total,
        "total": report.total,
        "compression": dict.fromkeys(report.total, LONGEST),
        "macs": dict.fromkeys(report.macs, report.macs["dense"]),
        "structure": report.dense_structure,
    }
    return artifact.About(splits.input_shape, splits.classes, splits.mean, splits.std, figures)
