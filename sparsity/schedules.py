"""How numbers move: the learning rate over a stage, and what rises, such as the share of pruned weights.

Shapes of the learning rate take progress in [0, 1] to a factor in [0, 1], curves take it to the share of the way.
"""

from math import cos, pi


def constant(progress: float) -> float:
    """1, all the way."""
    return 1.0


def linear(progress: float) -> float:
    """1 − progress."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """(1 + cos(π · progress)) / 2; Loshchilov, Hutter, 2017."""
    return (1.0 + cos(pi * progress)) / 2.0


SHAPES = {"constant": constant, "linear": linear, "cosine": cosine}


def learning_rate(progress: float, *, lr: float, shape: str, warmup: float) -> float:
    """The learning rate at a point of a stage: risen linearly over the share `warmup` of it, then lr · shape."""
    if progress < warmup:
        return lr * progress / warmup
    return lr * SHAPES[shape]((progress - warmup) / (1.0 - warmup))


def proportional(progress: float) -> float:
    """The progress itself."""
    return progress


def cubic(progress: float) -> float:
    """1 − (1 − progress)³: steep where there is much to prune, flat at the end; Zhu, Gupta, 2017."""
    return 1.0 - (1.0 - progress) ** 3


CURVES = {"constant": constant, "linear": proportional, "cubic": cubic}
