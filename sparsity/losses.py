"""Loss functions: the outputs of a network and the labels of a batch to one scalar, their mean over the batch.

outputs: float32 [batch, classes], before any softmax; labels: whole numbers [batch]. Beside these a function may ask by
name for `teacher`, a trained network's outputs on the same images, float32 [batch, classes]. None branches on a value,
so all map over members.
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.kinds import Range

Share = Annotated[float, Range(0, 1, below=True)]
Temperature = Annotated[float, Range(0.01, 100)]  # what outputs are divided by without leaving float32


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(outputs)[label], nats."""
    return F.cross_entropy(outputs, labels)


def label_smoothing(outputs: Tensor, labels: Tensor, *, smoothing: Share) -> Tensor:
    """Cross-entropy with labels whose share `smoothing` lies on all classes alike, nats; Szegedy et al., 2016."""
    logs = torch.log_softmax(outputs, 1)
    return F.nll_loss(logs, labels).lerp(-logs.mean(1).mean(), smoothing)


def distill(
    outputs: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature,
    share: Annotated[float, Range(0, 1)],
) -> Tensor:
    """(1 − share) · CE + share · T² · KL(softmax(teacher / T) ‖ softmax(outputs / T)), nats; Hinton et al., 2015.

    T: the temperature; T² keeps the gradients of both at one scale whatever it is.
    """
    wanted, found = (torch.log_softmax(each / temperature, 1) for each in (teacher, outputs))
    # factors of the teacher's shares, not of the sum, are none of the gradient's work
    shares = wanted.exp() * (share * temperature**2 / len(outputs))
    return (1 - share) * F.cross_entropy(outputs, labels) + (shares * (wanted - found)).sum()
