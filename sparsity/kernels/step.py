"""Steps of a population by its network's library: many at a call, the members side by side on the cores."""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparsity import regularizers
from sparsity.data import Splits, cut
from sparsity.kernels.chain import Chain
from sparsity.kernels.library import Library
from sparsity.population import Population
from sparsity.step import Moment, Penalty, penalties
from sparsity.tensors import Tensors

PENALTIES = {  # that there is a kernel for, by its number there
    regularizers.l1: 1,
    regularizers.hoyer: 2,
    regularizers.hs: 3,
    regularizers.group_lasso: 4,
    regularizers.group_hs: 5,
}
KINDS = {"Adam": 0, "AdamW": 1, "SGD": 2}
MOST_STEPS = 200  # of a call: where training is watched, it is seen to go on
MOST_THREADS = 16  # of a member: the library's PARTS


class _Tensor(ctypes.Structure):
    """A parameter of one member, as the library takes it."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("value", "first", "second", "mask", "added")]
    _fields_ += [("is_penalised", ctypes.c_int64)]


NUMBERS = ("beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")


class _Rule(ctypes.Structure):
    """The numbers of the penalty and the optimizer."""

    _fields_ = [("penalty", ctypes.c_int64), ("kind", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_double) for name in NUMBERS]
    _fields_ += [("nesterov", ctypes.c_int64), ("rate", ctypes.c_double), ("decay", ctypes.c_double)]
    _fields_ += [("number", ctypes.c_int64)]


class _Arguments(ctypes.Structure):
    """What a call is given."""

    _fields_ = [("images", ctypes.c_void_p), ("is_float", ctypes.c_int64), ("mean", ctypes.c_void_p)]
    _fields_ += [("deviation", ctypes.c_void_p), ("channels", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("labels", "order", "sizes", "rates", "decays")]
    _fields_ += [("steps", ctypes.c_int64), ("threads", ctypes.c_int64), ("tensors", ctypes.c_void_p)]
    _fields_ += [("rule", _Rule), ("sums", ctypes.c_void_p)]


class KernelStep:
    """Remembers the optimizer's state and where the epoch is: `sparsity.step.Step`, as machine code."""

    def __init__(
        self,
        population: Population,
        splits: Splits,
        penalty: Penalty | None,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        chain: Chain,
        library: Library,
    ):
        """population: its tensors are changed in place, and lie contiguous."""
        self.population, self.train, self.splits, self.device = population, splits.train, splits, population.device
        self.penalty, self.scale, self.number = penalty, None, 0
        self.names, self.library = chain.parameters, library
        self.images = splits.train.images.contiguous()
        # what lies flat has pixels' own numbers
        self.channels = self.images.shape[1] if splits.mean is not None and len(splits.mean) > 1 else 1
        self.scaling = [torch.tensor(each or [], dtype=torch.float32) for each in (splits.mean, splits.std)]
        parameters = {name: population.parameters[name] for name in self.names}
        self.states = [{name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2)]
        made = optimizer(list(parameters.values()))
        (group,) = made.param_groups
        self.rule = _rule(group, type(made).__name__)
        form = None if penalty is None else penalty.form
        self.is_own = form is not None and form.function in PENALTIES
        self.rule.penalty = PENALTIES[form.function] if self.is_own else 0
        self.penalised = form.names if self.is_own else ()
        self.most = MOST_STEPS if penalty is None or self.is_own else 1
        self.rate = float(group["lr"])
        self.networks = [library.functions.make() for _ in range(population.num_members)]
        weakref.finalize(self, _drop, library, self.networks)
        self.threads = min(MOST_THREADS, torch.get_num_threads())

    def begin(self, order: Tensor, batch_size: int, drawn: Tensor | None = None) -> None:
        """Begins an epoch, in the members' orders [members, n]."""
        self.order = order.contiguous()
        self.sizes = torch.tensor([each.shape[1] for each in cut(order, batch_size)])
        self.index = 0

    def advance(self, moments: Sequence[Moment]) -> Tensor:
        """Takes one step a moment; gives loss, penalty and objective, summed over images [3, members]."""
        sizes = self.sizes[self.index : self.index + len(moments)].contiguous()
        first, members = int(self.sizes[: self.index].sum()), self.population.num_members
        self.rate = moments[-1].rate
        rates = torch.tensor([each.rate for each in moments], dtype=torch.float64)
        decays = self._decays(moments).contiguous()
        added, values = self._added(decays)
        sums = torch.zeros(members, 3, dtype=torch.float64)
        calls = []
        for member in range(members):
            tensors = (_Tensor * len(self.names))(*(self._tensor(name, member, added) for name in self.names))
            order = self.order[member, first:]
            calls.append((tensors, self._arguments(sizes, rates, decays[member], order, tensors, sums[member])))
        run = self.library.functions.run
        if members == 1:
            run(self.networks[0], ctypes.byref(calls[0][1]))
        else:
            with ThreadPoolExecutor(self.threads) as threads:
                list(threads.map(lambda network, call: run(network, ctypes.byref(call[1])), self.networks, calls))
        if not self.is_own:  # of one step
            sums[:, 1] = values * sizes.sum()
            sums[:, 2] += decays[:, 0] * sums[:, 1]
        self.index, self.number = self.index + len(moments), self.number + len(moments)
        return sums.T.float()

    def mask(self, masks: Tensors) -> None:
        """Masks some of the population's masked parameters anew, bool [members, *shape] by name; all in place.

        What a mask leaves out becomes 0, and what comes back begins at 0, with nothing remembered of either.
        """
        with torch.no_grad():
            for name, mask in masks.items():
                parameter, before = self.population.parameters[name], self.population.masks[name]
                gone = ~(before & mask)
                before.copy_(mask)
                # of what has diverged p − p is NaN, which is seen when the epoch ends
                parameter.copy_(torch.where(gone, parameter - parameter, parameter))
                for state in self.states:
                    state[name].masked_fill_(gone, 0)

    def masked(self, population: Population) -> Population:
        """The population as the forward pass sees it: as it is."""
        return population

    def _decays(self, moments: Sequence[Moment]) -> Tensor:
        """The decay of each member at each moment, [members, moments]."""
        members = self.population.num_members
        if self.penalty is None:
            return torch.zeros(members, len(moments), dtype=torch.float64)
        scale = 1 if self.scale is None else self.scale
        return torch.stack([self.penalty.decay_at(each.progress) * scale for each in moments], 1).double()

    def _added(self, decays: Tensor) -> tuple[Tensors, Tensor]:
        """The gradients of a penalty that there is no kernel for, by name, and the penalties [members]."""
        if self.penalty is None or self.is_own:
            return {}, torch.zeros(self.population.num_members)
        with torch.enable_grad():
            values = penalties(self.population, self.penalty)()
            if not values.requires_grad:
                return {}, values
            weighted, tensors = (decays[:, 0].float() * values).sum(), self.population.parameters
            found = torch.autograd.grad(weighted, list(tensors.values()), allow_unused=True)
        reached = {name: each.contiguous() for name, each in zip(tensors, found) if each is not None}
        return reached, values.detach()

    def _tensor(self, name: str, member: int, added: Tensors) -> _Tensor:
        """A parameter of a member, as the library takes it."""

        def place(tensors: Tensors) -> int | None:
            return tensors[name][member].data_ptr() if name in tensors else None

        first, second = (place(state) for state in self.states)
        is_penalised = int(name in self.penalised)
        return _Tensor(
            place(self.population.parameters), first, second, place(self.population.masks), place(added), is_penalised
        )

    def _arguments(
        self, sizes: Tensor, rates: Tensor, decays: Tensor, order: Tensor, tensors: ctypes.Array, sums: Tensor
    ) -> _Arguments:
        """What a call for one member is given; the tensors must live as long as the call."""
        mean, deviation = (each.data_ptr() if len(each) else None for each in self.scaling)
        self.rule.number = self.number
        return _Arguments(
            images=self.images.data_ptr(),
            is_float=int(self.images.is_floating_point()),
            mean=mean,
            deviation=deviation,
            channels=self.channels,
            labels=self.train.labels.data_ptr(),
            order=order.data_ptr(),
            sizes=sizes.data_ptr(),
            rates=rates.data_ptr(),
            decays=decays.data_ptr(),
            steps=len(sizes),
            threads=self.threads if self.population.num_members == 1 else 1,
            tensors=ctypes.cast(tensors, ctypes.c_void_p),
            rule=self.rule,
            sums=sums.data_ptr(),
        )


def _rule(group: dict, kind: str) -> _Rule:
    """The numbers of an optimizer's group of parameters."""
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    numbers = {name: float(group.get(name, 0.0)) for name in NUMBERS if not name.startswith("beta")}
    return _Rule(kind=KINDS[kind], beta1=beta1, beta2=beta2, nesterov=int(group.get("nesterov", False)), **numbers)


def _drop(library: Library, networks: Sequence[int]) -> None:
    for each in networks:
        library.functions.drop(each)
