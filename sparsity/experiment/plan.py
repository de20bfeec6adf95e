"""The stages of a population in order, their arguments as its members have them, and what they train and prune with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sparsity import nodes
from sparsity.config import Run, Stage
from sparsity.config.signatures import marked
from sparsity.errors import StageError
from sparsity.nodes import EACH, STATE, Regularizer, StageSchedule
from sparsity.population import Population
from sparsity.stages.context import Context, Outcome
from sparsity.stages.holding import holding
from sparsity.stages.training import loop_of
from sparsity.training import Loop


@dataclass(frozen=True)
class Planned:
    """One stage of a population: each member's own, alike but for floats."""

    stages: Sequence[Stage]

    @property
    def name(self) -> str:
        """Its name, unlike those of all other stages of the run."""
        return self.stages[0].name

    @property
    def node(self) -> str:
        """The name of its node, which all its rounds share."""
        return self.stages[0].node

    @property
    def function(self) -> str:
        """The name of its function, such as train."""
        return self.stages[0].call.target.rpartition(".")[2]

    @property
    def sources(self) -> Mapping[str, str]:
        """By argument, the key that it is typed by."""
        return self.stages[0].sources

    def key(self, argument: str) -> str:
        """The key that an argument is typed by."""
        return self.sources.get(argument, f"recipe.{self.node}.{argument}")

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of its function: shared ones as they are, those of each member as lists."""
        call = self.stages[0].call
        each = marked(call.function, EACH)
        return {
            name: [stage.call.numbers[name] for stage in self.stages] if name in each else number
            for name, number in call.numbers.items()
            if number is not None
        }

    @property
    def states(self) -> list[str]:
        """The earlier states that it names."""
        call = self.stages[0].call
        return [call.numbers[name] for name in marked(call.function, STATE) if call.numbers.get(name) is not None]

    def take(self, members: Sequence[int]) -> "Planned":
        """The stage of some of the members."""
        return Planned([self.stages[member] for member in members])

    def run(self, population: Population, context: Context) -> Outcome:
        """What the stage makes of a population."""
        call = self.stages[0].call
        found = call.function(population, replace(context, stage=self.name, sources=self.sources), **self.arguments)
        if not isinstance(found, Outcome):
            raise StageError(f"{self.name}: {call.target} must give an Outcome, got {type(found).__name__}")
        return found

    # What checks and choices look for, whatever the stage is called: arguments of a kind.

    @property
    def schedule(self) -> StageSchedule | None:
        """What it trains by, if it trains."""
        found = self.stages[0].call.numbers.get("schedule")
        return found if isinstance(found, StageSchedule) else None

    @property
    def holds_zeros(self) -> bool:
        """Whether it trains what is not zero alone."""
        return self.arguments.get("hold") == "zeros"

    @property
    def regularizers(self) -> list[Regularizer] | None:
        """The members' regularizers, if it adds a penalty."""
        return self._each(Regularizer)

    @property
    def losses(self) -> list[nodes.Loss] | None:
        """The members' losses, if it trains by one that is named."""
        return self._each(nodes.Loss)

    @property
    def rules(self) -> list[nodes.Rule] | None:
        """The members' pruning rules, if it prunes."""
        return self._each(nodes.Rule)

    @property
    def quantizers(self) -> list[nodes.Quantizer] | None:
        """By what the members' weights are put in few bits, if it does that."""
        return self._each(nodes.Quantizer)

    @property
    def sensitivities(self) -> list[float]:
        """The members' sensitivities; 0 where a budget will find them."""
        return [number or 0.0 for number in self.arguments.get("sensitivity") or [0.0] * len(self.stages)]

    def _each(self, kind: type) -> list[Any] | None:
        for value in self.arguments.values():
            if isinstance(value, list) and value and isinstance(value[0], kind):
                return value
        return None

    def loop(self, population: Population, context: Context) -> Loop | None:
        """The loop that it trains by, if it trains."""
        given = self.arguments
        if self.schedule is None or not {"batch_size", "optimizer"} <= given.keys():
            return None
        numbers = given["batch_size"], given["optimizer"], self.regularizers, self.losses, given.get("augment")
        held = holding(population, given.get("hold", "masks"), context.graph.units)
        as_it_is = not given.get("straight_through", False) and self.quantizers is None
        return loop_of(held, context, self.schedule, *numbers, as_it_is=as_it_is)


def planned(runs: Sequence[Run]) -> list[Planned]:
    """The stages of a population; its runs have the same ones."""
    return [Planned(stages) for stages in zip(*(run.recipe for run in runs))]
