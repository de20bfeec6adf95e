"""A network as a list of functions of tensors, read off recorded passes: what runs it again without its source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsity.graph.functions import CREATIONS, SILENT, is_known
from sparsity.graph.recorder import Recorder, Watch, op_by_op
from sparsity.graph.slots import Value
from sparsity.graph.units import Units, one_thread

BATCH, OTHER_BATCH = 2, 3  # images of the two passes; of a single one torch computes some views otherwise


MADE = CREATIONS | SILENT  # which read sizes of what they are given at most


class UnrecordableError(Exception):
    """A network that its recorded functions do not say everything of; why, in words for users."""


@dataclass(frozen=True)
class Ref:
    """A tensor that an earlier call gave, by its number; 0 is the images."""

    number: int


@dataclass(frozen=True)
class Named:
    """A constant tensor: a parameter, a buffer, or what is computed of them alone."""

    name: str


@dataclass(frozen=True)
class Batch:
    """A size that is so many times the number of images."""

    factor: int


@dataclass(frozen=True)
class Call:
    """One function: its name in torch's library, what it is given, and the numbers of what it gives."""

    function: str  # such as relu.default
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """The function without its overload."""
        return self.function.partition(".")[0]


@dataclass(frozen=True)
class Tape:
    """The functions of one pass, in order, and what is known of their tensors."""

    calls: list[Call]
    constants: dict[str, Tensor]
    shapes: dict[int, tuple[int | Batch, ...]]
    values: dict[int | str, Value]  # the slots of each tensor, by its number or name
    output: int
    units: Units


@dataclass(frozen=True)
class _Seen:
    """One function as it was seen: with its own tensors."""

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    versions: list[int]  # of the tensors that it was given
    values: list[Value]  # of these, and of the results


class _Watch(Watch):
    """Keeps the functions of a pass, taken apart as the recorder of units takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Seen] = []

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives, which is kept."""
        result = super().compute(function, args, kwargs)
        self.seen.append(_seen(function, args, kwargs, result, lambda _: None))
        return result


class _WatchUnits(Recorder):
    """The recorder of units, which keeps the functions too."""

    def __init__(self, module: nn.Module, images: Tensor):
        super().__init__(module, images)
        self.seen: list[_Seen] = []

    def saw(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keeps a function."""
        self.seen.append(_seen(function, args, kwargs, result, self.slots.value_of))


def _seen(function: Any, args: Any, kwargs: Any, result: Any, value_of: Callable[[Tensor], Value]) -> _Seen:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return _Seen(
        function, args, kwargs, results, [t._version for t in given], [value_of(t) for t in (*given, *results)]
    )


def tape(module: nn.Module, image: Tensor, *, training: bool = False) -> Tape:
    """The functions that a module in evaluation, or in training, computes of images like one, [1, *shape].

    Two passes, over two images and over three, tell which sizes go with the batch. Raises UnrecordableError where what
    is computed depends on the batch otherwise, draws random numbers, or changes a tensor that is read under another
    view.
    """
    images, others = (image.expand(count, *image.shape[1:]).clone() for count in (BATCH, OTHER_BATCH))
    with torch.no_grad(), one_thread(), op_by_op():
        first = _WatchUnits(module.train(training), images)
        with first:
            output = module(images)
        second = _Watch()
        with second:
            module(others)
    if not isinstance(output, Tensor):
        raise UnrecordableError(f"its output is a {type(output).__name__}, not one tensor")
    if len(first.seen) != len(second.seen):
        raise UnrecordableError("what it computes depends on the number of images")
    reader = _Reader(module, images)
    for one, other in zip(first.seen, second.seen):
        reader.read(one, other)
    return reader.close(output, first.slots.units(output))


class _Reader:
    """Turns the functions of two passes into calls."""

    def __init__(self, module: nn.Module, images: Tensor):
        self.names = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}
        self.numbers: dict[int, int] = {id(images): 0}  # of tensors that depend on the images or on how many there are
        self.by_storage: dict[int, set[int]] = {}
        self.stale: set[int] = set()
        self.calls: list[Call] = []
        self.constants: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.shapes: dict[int, tuple[int | Batch, ...]] = {0: (Batch(1), *images.shape[1:])}
        self.values: dict[int | str, Value] = {}
        self.constant_names: dict[int, str] = {}
        self._own(images)

    def _own(self, tensor: Tensor) -> None:
        self.by_storage.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def read(self, one: _Seen, other: _Seen) -> None:
        """Adds the call of a function, unless it is the same whatever the images are."""
        if one.function is not other.function:
            raise UnrecordableError("what it computes depends on the number of images")
        name = one.function._schema.name.rpartition("::")[2]
        given = [leaf for leaf in tree_leaves((one.args, one.kwargs)) if isinstance(leaf, Tensor)]
        sizes = list(zip(tree_leaves((one.args, one.kwargs)), tree_leaves((other.args, other.kwargs))))
        is_sized = any(type(a) is int and a != b for a, b in sizes)
        is_sized |= any(a.shape != b.shape for a, b in zip(one.results, other.results))
        depends = is_sized or (name not in MADE and any(id(tensor) in self.numbers for tensor in given))
        if not depends or not one.results:
            return
        changed = name.endswith("_") and not name.endswith("__")
        plain = name.removesuffix("_") if changed else name
        if plain == "as_strided" and changed:  # by convolutions with channels last: the same entries
            return
        if not is_known(plain):
            raise UnrecordableError(f"it computes {name}, which is not a function that is known")
        values = dict(zip(map(id, given), one.values))
        for tensor, version in zip(given, one.versions):
            if id(tensor) in self.stale:
                raise UnrecordableError(f"{name} reads a tensor that was changed under another view")
            if id(tensor) not in self.numbers:
                self._constant(tensor, version, values[id(tensor)])
        pairs = iter(sizes)
        args, kwargs = tree_map(lambda leaf: self._argument(*next(pairs)), (one.args, one.kwargs))
        overload = one.function._overloadname
        if changed:
            args, overload = args, _functional(plain, one.function)
            for sibling in self.by_storage.get(one.results[0].untyped_storage()._cdata, set()) - {id(one.results[0])}:
                self.stale.add(sibling)
        outs = []
        for result, twin, value in zip(one.results, other.results, one.values[len(given) :]):
            number = len(self.shapes)
            self.numbers[id(result)] = number
            self._own(result)
            self.shapes[number] = tuple(_size(a, b) for a, b in zip(result.shape, twin.shape, strict=True))
            self.values[number] = value
            outs.append(number)
        self.calls.append(Call(f"{plain}.{overload}", tuple(args), kwargs, tuple(outs)))

    def _argument(self, one: Any, other: Any) -> Any:
        if isinstance(one, Tensor):
            return Ref(self.numbers[id(one)]) if id(one) in self.numbers else Named(self.constant_names[id(one)])
        if type(one) is int and one != other:
            return _size(one, other)
        if one != other and not (one != one and other != other):
            raise UnrecordableError("what it computes depends on the number of images")
        return one

    def _constant(self, tensor: Tensor, version: int, value: Value) -> None:
        name = self.constant_names.get(id(tensor)) or self.names.get(id(tensor))
        if name is None:
            name = f"constant{len(self.constants)}"
        elif self.versions.get(name, version) != version:
            raise UnrecordableError(f"{name} is changed while it is read")
        self.constant_names[id(tensor)], self.constants[name], self.versions[name] = name, tensor, version
        self.values[name] = value

    def close(self, output: Tensor, units: Units) -> Tape:
        """The tape, once everything is read."""
        if id(output) not in self.numbers:
            raise UnrecordableError("its output does not depend on the images")
        for name, tensor in self.constants.items():
            if tensor._version != self.versions[name]:
                raise UnrecordableError(f"{name} is changed after it is read")
        return Tape(self.calls, self.constants, self.shapes, self.values, self.numbers[id(output)], units)


def _size(one: int, other: int) -> int | Batch:
    """A size, or what it is for each image."""
    if one == other:
        return one
    if one % BATCH == 0 and other * BATCH == OTHER_BATCH * one:
        return Batch(one // BATCH)
    raise UnrecordableError("a size depends on the number of images otherwise than in proportion")


def _functional(name: str, function: Any) -> str:
    """The overload of a function that gives what another one of its name changes in place."""
    packet = getattr(torch.ops.aten, name)
    overload = function._overloadname
    return overload if overload in packet.overloads() else packet.overloads()[0]
