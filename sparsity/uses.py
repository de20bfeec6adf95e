"""How a forward pass uses parameters: read off one recorded pass."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Use(NamedTuple):
    """What a pass does with a parameter, or with what it makes of the parameter alone."""

    # products: a linear layer, a convolution or a matrix product; factor: element by element; the rest is "other"
    kind: Literal["product", "normalization", "factor", "summand", "other"]
    direct: bool = False  # in a product: the parameter itself or a view of it, not what was computed from several
    groups: int = 1  # of a convolution
    transposed: bool = False  # inputs before outputs: of transposed convolutions, and W in x @ W


RANK = ("other", "summand", "factor", "normalization", "product")  # of two uses the later one counts


def uses(module: nn.Module, images: Tensor) -> dict[str, Use]:
    """How a module in evaluation uses its parameters in a pass over images [batch, *shape]; unused ones are not named.

    A tensor that is computed of parameters and constants alone stands for these parameters: g · v / ‖v‖ for g and v.
    """
    recorder = _Recorder(module)
    with torch.no_grad(), recorder:
        module.eval()(images)
    return recorder.found


class _Made(NamedTuple):
    """The parameters that a tensor is made of, and how."""

    names: frozenset[str]
    direct: bool = True
    swapped: bool = False  # its last two axes, against the parameter's


# Where functions take the weights that they multiply, and the vectors that they add: (position, keyword).
WEIGHTS = {
    "linear": [(1, "weight")],
    "bilinear": [(2, "weight")],
    "multi_head_attention_forward": [
        (5, "in_proj_weight"),
        (11, "out_proj_weight"),
        *((None, f"{name}_proj_weight") for name in "qkv"),
    ],
    **{f"conv{transposed}{axes}d": [(1, "weight")] for transposed in ("", "_transpose") for axes in (1, 2, 3)},
}
SUMMANDS = {
    "linear": [(2, "bias")],
    "bilinear": [(3, "bias")],
    "multi_head_attention_forward": [(6, "in_proj_bias"), (12, "out_proj_bias")],
    **{name: [(2, "bias")] for name in WEIGHTS if name.startswith("conv")},
    "addmm": [(0, "input")],
    "addmv": [(0, "input")],
    "baddbmm": [(0, "input")],
}
# fmt: off
PRODUCTS = frozenset((
    "matmul", "rmatmul", "mm", "bmm", "mv", "dot", "inner", "einsum", "tensordot", "addmm", "addmv", "baddbmm",
))
FACTORS = frozenset((
    "mul", "rmul", "imul", "multiply", "div", "rdiv", "idiv", "divide", "truediv", "rtruediv", "itruediv", "prelu",
))
SUMS = frozenset(("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"))
NORMALIZATIONS = frozenset(("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"))
VIEWS = frozenset((
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "contiguous", "clone",
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach", "getitem", "select", "narrow", "alias",
    "permute", "transpose", "swapaxes", "data", "broadcast_to", "chunk", "split", "unbind", "view_as", "cpu", "cuda",
    "t", "T", "mT", "H", "mH", "adjoint",
))
# fmt: on


class _Recorder(TorchFunctionMode):
    """Watches the torch functions of one pass and keeps which tensors are made of parameters and constants alone."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.made = {id(tensor): _Made(frozenset([name])) for name, tensor in module.named_parameters()}
        self.made |= {id(buffer): _Made(frozenset()) for buffer in module.buffers()}  # constants
        self.axes = {name: tensor.ndim for name, tensor in module.named_parameters()}
        self.found: dict[str, Use] = {}
        self.alive: list[Any] = []  # ids are only good while their tensors live

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        results, tensors = _tensors(result), _tensors((arguments, keywords))
        self.alive += [result, arguments, keywords]
        name = _name(function)
        if name in WEIGHTS:
            self._note_layer(name, arguments, keywords, tensors)
        elif all(id(tensor) in self.made for tensor in tensors):
            self.made |= {id(each): self._combined(name, tensors, each) for each in results}
            return result
        else:
            self._note(name, arguments, tensors)
        for each in results:
            self.made.pop(id(each), None)
        return result

    def _note_layer(self, name: str, arguments: Any, keywords: Mapping[str, Any], tensors: list[Tensor]) -> None:
        """Takes note of a layer's weights and biases; what else it takes is its input, be it parameters."""
        left = list(tensors)

        def take(where: Iterable[tuple[int | None, str]], kind: Any, **more: Any) -> None:
            for tensor in _at(where, arguments, keywords):
                self._use(tensor, kind, **more)
                left[:] = [each for each in left if each is not tensor]

        groups = keywords.get("groups", arguments[6] if name.startswith("conv") and len(arguments) > 6 else 1)
        take(WEIGHTS[name], "product", groups=groups, transposed="transpose" in name)
        take(SUMMANDS[name], "summand")
        for tensor in left:
            self._use(tensor, "other")

    def _note(self, name: str, arguments: Any, tensors: list[Tensor]) -> None:
        """Takes note of a function in which parameters meet what depends on the images."""
        added = _at(SUMMANDS.get(name, ()), arguments, {})
        operands = [tensor for tensor in tensors if not any(tensor is each for each in added)]
        kinds = (("product", PRODUCTS), ("factor", FACTORS), ("summand", SUMS), ("normalization", NORMALIZATIONS))
        kind = next((kind for kind, names in kinds if name in names), "other")
        if name == "rmatmul":
            operands.reverse()
        for position, tensor in enumerate(operands):
            is_right = position > 0 and tensor.ndim == 2 and name not in ("einsum", "tensordot")
            self._use(tensor, kind, transposed=kind == "product" and is_right)
        for tensor in added:
            self._use(tensor, "summand")

    def _use(self, tensor: Tensor, kind: Any, *, groups: int = 1, transposed: bool = False) -> None:
        made = self.made.get(id(tensor), _Made(frozenset()))
        for name in made.names:
            before = self.found.get(name)
            if before is None or RANK.index(before.kind) < RANK.index(kind):
                swapped = tensor.ndim == self.axes[name] and transposed != made.swapped
                self.found[name] = Use(kind, kind == "product" and made.direct, groups, swapped)

    def _combined(self, name: str, tensors: list[Tensor], result: Tensor) -> _Made:
        """What a function of parameters and constants alone gives."""
        parts = [self.made[id(tensor)] for tensor in tensors]
        named = [part for part in parts if part.names]
        if len(tensors) == 1 and name in VIEWS:
            return parts[0]._replace(swapped=parts[0].swapped != _is_transposed(tensors[0], result))
        swapped = bool(named) and all(part.swapped for part in named)
        return _Made(frozenset().union(*(part.names for part in parts)), False, swapped)


def _is_transposed(tensor: Tensor, result: Tensor) -> bool:
    """Whether a view of a matrix has its axes swapped."""
    strides = tensor.stride()
    return tensor.ndim == result.ndim == 2 and result.stride() == strides[::-1] != strides


def _name(function: Callable[..., Any]) -> str:
    """A function's name without underscores; of a property, such as `T`, the property's."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name.strip("_")


def _at(where: Iterable[tuple[int | None, str]], arguments: Any, keywords: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments at these positions, or under these keywords."""
    found = [
        arguments[position] if position is not None and position < len(arguments) else keywords.get(keyword)
        for position, keyword in where
    ]
    return [each for each in found if isinstance(each, Tensor)]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
