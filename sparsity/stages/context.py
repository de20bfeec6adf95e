"""What a stage is given beside its population, and what it gives back."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from sparsity.data import Splits
from sparsity.errors import SparsityError
from sparsity.graph import Graph
from sparsity.population import Population
from sparsity.teachers import Teacher
from sparsity.training import Epoch, Loop, Watcher


@dataclass(frozen=True)
class Context:
    """The data, the network's graph, and how steps are computed; the same for all members but their seeds."""

    splits: Splits
    seeds: list[int]
    graph: Graph
    stage: str = ""  # its name: what members draw in it is unlike what they draw in others
    precision: torch.dtype = torch.float32
    precision_is_asked: bool = False  # not chosen here, as what is fastest
    step: Literal["auto", "eager", "recorded", "compiled", "kernels"] = "eager"
    model: str = ""  # the name of its function
    image_bytes: int = 0  # what evaluating one image of one member takes; 0: no bound
    watch: Callable[[str, Loop, int], Watcher] = lambda stage, loop, num_images: Watcher()
    choices: Mapping[str, str] = field(default_factory=dict)  # made in each group, for messages
    sources: Mapping[str, str] = field(default_factory=dict)  # of arguments: the keys that they are typed by
    states: Mapping[str, Population] = field(default_factory=dict)  # those that the stage names
    teachers: Mapping[str, Teacher] = field(default_factory=dict)  # by the weights file that a loss names
    stop: int | None = None  # the epoch after which training ends, whatever its schedule; None: the last

    def take(self, members: list[int]) -> "Context":
        """The context of some of the members."""
        states = {name: state.take(members) for name, state in self.states.items()}
        return replace(self, seeds=[self.seeds[member] for member in members], states=states)

    def generators(self) -> list[torch.Generator]:
        """A generator a member, of this stage."""
        return [torch.Generator().manual_seed(derived_seed(seed, self.stage)) for seed in self.seeds]

    def key(self, argument: str) -> str:
        """The key that an argument of the stage is typed by."""
        return self.sources.get(argument, f"recipe.{self.stage}.{argument}")


@dataclass(frozen=True)
class Outcome:
    """What a stage gives back: the population after it, and what there is to say of each member."""

    population: Population
    did: tuple[str, ...] = ()  # of DEEDS, whatever the members
    notes: list[dict[str, Any]] = field(default_factory=list)  # one a member, as JSON takes them
    history: list[Epoch] = field(default_factory=list)
    selected_epoch: list[int] | None = None
    diverged: list[int | None] | None = None  # the epoch in which a member's loss became NaN or infinite
    errors: list[SparsityError | None] | None = None  # why a member goes no further


PENALIZED, MASKED, SELECTED = DEEDS = ("penalized", "masked", "selected")


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose of a member, unlike those of its other purposes and of other seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1
