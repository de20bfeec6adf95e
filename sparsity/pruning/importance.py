"""Importances: a parameter, as the view [groups, outputs, inputs, positions], to a score of each entry; more stays.

What a function asks for by name beside `weight` is computed over batches of train, and arrives as such a view, or as
one that is broadcast to it. None branches on a value, so all map over members. All are finite on zeros.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm


def magnitude(weight: Tensor) -> Tensor:
    """|w|; Han et al., 2015."""
    return weight.abs()


def taylor(weight: Tensor, *, gradient: Tensor) -> Tensor:
    """|w · ∂L/∂w|, by how much the loss changes without w to the first order; gradient: of the mean loss.

    Before training it is SNIP, |∂L/∂c| of a factor c = 1 on each weight; Lee et al., 2019. Theirs is divided by its sum
    over the network, which changes no order.
    """
    return (weight * gradient).abs().clamp_max(torch.finfo(weight.dtype).max)


def taylor_squared(weight: Tensor, *, squared_gradient: Tensor) -> Tensor:
    """Σ (w · ∂L/∂w)² over batches; Molchanov et al., 2019. squared_gradient: the squares' sum over batches."""
    return _squares(weight, squared_gradient)


def grasp(weight: Tensor, *, curved_gradient: Tensor) -> Tensor:
    """w · (H g), by how much less gradient flows without w; Wang et al., 2020. May be negative: such weights go first.

    curved_gradient: the product of the loss's Hessian with its gradient.
    """
    return weight * curved_gradient


def synflow(weight: Tensor, *, flow: Tensor) -> Tensor:
    """|w · ∂R/∂|w||, where R is the sum of the outputs for ones, through a network of |w|; Tanaka et al., 2020."""
    return (weight * flow).abs()


def brain_damage(weight: Tensor, *, curvature: Tensor) -> Tensor:
    """½ w² ∂²L/∂w², the diagonal second-order score of optimal brain damage; LeCun et al., 1990.

    curvature: the diagonal of the Gauss-Newton matrix, as theirs is.
    """
    return _squares(weight, curvature / 2)


def wanda(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """|w| · ‖x‖₂ of the input that w multiplies; Sun et al., 2024."""
    return (weight.abs() * input_norm).clamp_max(torch.finfo(weight.dtype).max)


def random(weight: Tensor, *, noise: Tensor) -> Tensor:
    """A number drawn evenly from [0, 1): what every other importance has to beat."""
    return noise.expand_as(weight)


def slimming(weight: Tensor, *, scale: Tensor) -> Tensor:
    """|γ| of the normalisation behind each filter; Liu et al., 2017. For filters alone."""
    return scale.abs().expand_as(weight)


def geometric_median(weight: Tensor) -> Tensor:
    """Σ ‖w - w'‖₂ over the filters w' of the layer: the nearest to all others go first; He et al., 2019 (FPGM).

    For filters alone.
    """
    groups, outputs = weight.shape[:2]
    rows = weight.reshape(groups * outputs, -1)
    largest = rows.abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)
    scaled = rows / largest
    apart = vector_norm(scaled.unsqueeze(0) - scaled.unsqueeze(1), dim=2).sum(1)
    return (apart * largest).view(groups, outputs, 1, 1).expand_as(weight)


def _squares(weight: Tensor, factor: Tensor) -> Tensor:
    """w² · factor; what is too large for the weight's kind of numbers is the largest of them."""
    return (weight.double().square() * factor.double()).clamp_max(torch.finfo(weight.dtype).max).to(weight.dtype)
