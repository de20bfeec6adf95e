"""Loss functions: the outputs of a network and the labels of a batch to one scalar, their mean over the batch.

outputs: float32 [batch, classes], before any softmax; labels: whole numbers [batch]. None branches on a value, so all
map over members.
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.kinds import Range

Share = Annotated[float, Range(0, 1, below=True)]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(outputs)[label], nats."""
    return F.cross_entropy(outputs, labels)


def label_smoothing(outputs: Tensor, labels: Tensor, *, smoothing: Share) -> Tensor:
    """Cross-entropy with labels whose share `smoothing` lies on all classes alike, nats; Szegedy et al., 2016."""
    logs = torch.log_softmax(outputs, 1)
    return F.nll_loss(logs, labels).lerp(-logs.mean(1).mean(), smoothing)
