"""Steps of a population by its network's library: many at a call, the members side by side on the cores."""

import ctypes
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsity import regularizers
from sparsity.data import Splits, cut
from sparsity.kernels.calls import NUMBERS, Rule, Source, parameters_of, side_by_side
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
        self.source = Source(splits.train, splits)
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

    def begin(self, order: Tensor, batch_size: int, drawn: Tensor | None = None) -> None:
        """Begins an epoch, in the members' orders [members, n]."""
        self.order = order.contiguous()
        self.sizes = torch.tensor([each.shape[1] for each in cut(order, batch_size)])
        self.index = 0

    def advance(self, moments: Sequence[Moment]) -> Tensor:
        """Takes one step a moment; gives loss, penalty and objective, summed over images [3, members]."""
        sizes = self.sizes[self.index : self.index + len(moments)].contiguous()
        done, members = int(self.sizes[: self.index].sum()), self.population.num_members
        self.rate = moments[-1].rate
        rates = torch.tensor([each.rate for each in moments], dtype=torch.float64)
        decays = self._decays(moments).contiguous()
        added, values = self._added(decays)
        sums = torch.zeros(members, 3, dtype=torch.float64)
        self.rule.number = self.number

        def run(member: int, threads: int) -> None:
            first, second = self.states
            tensors = {"first": first, "second": second, "added": added, "mask": self.population.masks}
            own = parameters_of(self.names, member, self.penalised, value=self.population.parameters, **tensors)
            given = {"order": self.order[member, done:], "sizes": sizes, "rates": rates, "decays": decays[member]}
            call = self.source.arguments(own, threads, **given, sums=sums[member])
            call.rule = self.rule
            self.library.functions.run(self.networks[member], ctypes.byref(call))

        side_by_side(run, members)
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


def _rule(group: dict, kind: str) -> Rule:
    """The numbers of an optimizer's group of parameters."""
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    numbers = {name: float(group.get(name, 0.0)) for name in NUMBERS if not name.startswith("beta")}
    return Rule(kind=KINDS[kind], beta1=beta1, beta2=beta2, nesterov=int(group.get("nesterov", False)), **numbers)


def _drop(library: Library, networks: Sequence[int]) -> None:
    for each in networks:
        library.functions.drop(each)
