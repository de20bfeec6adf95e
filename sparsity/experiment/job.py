"""One member of a population: what it is to run, and what it has come to."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity.config import Run
from sparsity.errors import SparsityError
from sparsity.experiment.keys import Key
from sparsity.population import Population
from sparsity.tracking import Following
from sparsity.training import Epoch

log = logging.getLogger("sparsity")


@dataclass(frozen=True)
class Job:
    """One member: its checked run, its folder; its config, notes and overrides as they are written into the result."""

    run: Run
    folder: Path
    config: Any = None
    notes: Sequence[str] = ()
    overrides: Sequence[str] = ()  # of the command line: those that run the member by itself
    flags: Sequence[str] = ()  # of the command line, before the overrides
    in_sweep: bool = False  # says one line on the terminal, not two tables
    number: int = 0  # among the jobs that run together


@dataclass
class Member:
    """What one member has come to."""

    job: Job
    keys: Mapping[str, Key]
    population: Population  # of this member alone
    error: SparsityError | None = None
    finished: dict[str, Any] | None = None  # the result, where another process was first
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and hash of the networks written
    warnings: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)  # the stages that were not in the store
    computed_with: dict[str, dict[str, Any]] = field(default_factory=dict)  # threads, versions, … of every stage
    given: dict[str, float | None] | None = None  # the accuracy of the weights that it starts from, if it is given any
    stages: list[dict[str, Any]] = field(default_factory=list)  # what each stage came to, in order
    histories: dict[str, list[Epoch]] = field(default_factory=dict)
    seen: dict[str, dict[str, float]] = field(default_factory=dict)  # what the pruning rule saw: stds, thresholds
    densities: list[dict[str, float]] = field(default_factory=list)  # of every parameter, after each stage
    course: dict[str, Any] | None = None  # the densities on the way through the last stage that prunes while it trains
    states: dict[str, Population] = field(default_factory=dict)  # that a later stage names
    following: Following | None = None  # what follows it in other programs
    penalized: tuple[Population, Population] | None = None  # before and after the last stage with a penalty

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took where it was computed."""
        return {stage["name"]: stage["seconds"] for stage in self.stages}

    def warn(self, line: str) -> None:
        """Keeps a warning for the result."""
        self.warnings.append(line)
        log.warning(f"warning: {line}", extra={"member": self.job.number})
