"""The functions that torch computes, by what they do to channels."""

import math
from typing import Any

from torch import Tensor

# fmt: off
# Functions of each entry that make 0 of 0.
KEEP_ZERO = frozenset((
    "relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "tanh", "abs", "neg", "sqrt", "square", "sign",
    "sin", "tan", "asin", "atan", "sinh", "asinh", "atanh", "erf", "expm1", "log1p", "floor", "ceil", "round", "trunc",
    "clone", "contiguous", "detach", "alias", "_to_copy", "softshrink", "hardshrink", "nan_to_num", "lift_fresh",
    "positive", "_prelu_kernel", "rrelu_with_noise", "lift", "copy", "frac", "sgn", "celu",
))
# Functions of each entry that make something else of 0.
FORGET_ZERO = frozenset((
    "sigmoid", "hardsigmoid", "exp", "exp2", "softplus", "log_sigmoid_forward", "cos", "cosh", "log", "log2", "log10",
    "reciprocal", "rsqrt", "erfc", "logit", "rsub", "acos", "isnan", "bernoulli",
))
# Functions of each entry of one tensor, and of numbers or of another.
OF_ENTRIES = frozenset(("pow", "clamp", "clamp_min", "clamp_max", "hardtanh"))
COMPARISONS = frozenset((
    "gt", "lt", "ge", "le", "eq", "ne", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_not",
))
SUMS = frozenset(("add", "sub", "maximum", "minimum", "fmax", "fmin"))
FACTORS = frozenset(("mul", "div"))
# Functions that move entries.
MOVES = frozenset((
    "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes",
    "unbind", "flip", "roll", "repeat", "index", "_unsafe_index", "index_select", "unfold", "diagonal", "unsafe_split",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "movedim", "narrow", "chunk",
))
VIEWS = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"))
REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod",
    "var_mean", "std_mean", "nansum",
))
NORMS = frozenset((
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm",
))
MATRIX_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm"))
CONVOLUTIONS = frozenset(("convolution", "_convolution"))
ATTENTIONS = frozenset((
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
))
ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
# Functions that tell sizes or make new tensors: they read no channels.
SILENT = frozenset((
    "empty", "empty_like", "new_empty", "ones_like", "new_ones", "full_like", "new_full", "rand_like", "randn_like",
    "_fused_sdp_choice", "is_same_size", "new_empty_strided", "empty_strided",
))
SPATIAL = ("max_pool", "avg_pool", "upsample", "reflection_pad", "replication_pad", "_adaptive", "adaptive", "mkldnn")
# Functions that make tensors of sizes and numbers alone.
CREATIONS = frozenset((
    "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange",
))
_RANDOM = frozenset(("bernoulli", "rrelu_with_noise"))
# fmt: on
_KNOWN = (
    frozenset().union(
        KEEP_ZERO,
        FORGET_ZERO,
        OF_ENTRIES,
        COMPARISONS,
        SUMS,
        FACTORS,
        MOVES,
        VIEWS,
        REDUCTIONS,
        NORMS,
        MATRIX_PRODUCTS,
        CONVOLUTIONS,
        ATTENTIONS,
        CREATIONS,
        (
            "cat",
            "stack",
            "fill",
            "constant_pad_nd",
            "embedding",
            "where",
            "masked_fill",
            "_softmax",
            "_log_softmax",
            "softmax",
            "log_softmax",
            "cumsum",
            "native_layer_norm",
            "_fused_rms_norm",
            "rms_norm",
            "native_group_norm",
            "argmax",
            "argmin",
            "sort",
            "topk",
        ),
    )
    - _RANDOM
)  # fmt: skip


def is_known(name: str) -> bool:
    """Whether a function gives the same for the same, and does nothing else."""
    return name in _KNOWN or name.startswith(SPATIAL)


def keeps_zero(name: str, first: bool, args: Any, kwargs: Any, numbers: list[float]) -> bool:
    """Whether a function of slots and numbers, or constants, makes 0 of 0."""
    has_constant = any(isinstance(arg, Tensor) for arg in args[1:]) or (not first and isinstance(args[0], Tensor))
    if name == "mul" or (name == "div" and first):
        return True
    if name in ("add", "sub"):
        return not has_constant and all(number == 0 for number in numbers[:1])
    if name == "pow":
        return first and bool(numbers) and numbers[0] > 0
    if name in ("clamp", "hardtanh", "clamp_min", "clamp_max"):
        low, high = _bounds(name, args, kwargs)
        return low <= 0 <= high
    if name == "masked_fill":
        return bool(numbers) and numbers[-1] == 0
    return False


def _bounds(name: str, args: Any, kwargs: Any) -> tuple[float, float]:
    """Where clamp and its like cut off."""
    given = {"clamp": ("min", "max"), "hardtanh": ("min_val", "max_val"), "clamp_min": ("min",), "clamp_max": ("max",)}
    found = {"min": -math.inf, "max": math.inf}
    for position, key in enumerate(given[name], 1):
        value = args[position] if len(args) > position else kwargs.get(key)
        if name == "hardtanh" and value is None:
            value = -1.0 if key == "min_val" else 1.0
        if isinstance(value, (int, float)):
            found[key[:3]] = value
        elif isinstance(value, Tensor):
            return 1, 0
    return found["min"], found["max"]
