"""The one training loop, and evaluation: a population in, a population and its history out; names no method."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.capture import Way
from sparsity.data import Splits, count_batches
from sparsity.evaluation import evaluate, images_at_once
from sparsity.population import Population, choose
from sparsity.step import Penalty, Step, cuda_devices, leaves


@dataclass(frozen=True)
class Loop:
    """The numbers of one training stage, the same for all members."""

    epochs: int
    batch_size: int
    learning_rate: Callable[[float], float]  # progress in [0, 1] to the learning rate
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    precision: torch.dtype = torch.float32
    way: Way = "eager"  # how a step is computed: the same numbers up to rounding
    elementwise: bool = True  # whether the optimizer moves every entry by its own gradients alone
    image_bytes: int = 0  # what evaluating one image of one member takes; 0: no bound


class Epoch(NamedTuple):
    """What one epoch came to; each list has one entry a member."""

    epoch: int  # 1 is the first, 0 the state before it
    loss: list[float] | None  # mean cross-entropy over the epoch's batches, nats
    penalty: list[float] | None  # mean penalty over them, without the decay
    objective: list[float] | None  # mean of what was minimised: loss + decay · penalty
    validation: list[float] | None  # accuracy after the epoch, in [0, 1]
    test: list[float] | None
    lr: float | None  # at the epoch's end
    seconds: float


class Watcher:
    """Is told of every batch and epoch; this one does nothing."""

    def batch(self) -> None:
        """One more batch is done."""

    def epoch(self, row: Epoch) -> None:
        """One more epoch is done."""

    def close(self) -> None:
        """Training is over, well or badly."""


@dataclass(frozen=True)
class Trained:
    """What training gives back."""

    last: Population  # after the last epoch; of a diverged member the last good state
    selected: Population  # at the selected epochs; the same as `last` where nothing was selected
    selected_epoch: list[int] | None
    diverged: list[int | None]  # the epoch in which a member's loss or weights became NaN or infinite
    history: list[Epoch]


def train(
    population: Population,
    splits: Splits,
    loop: Loop,
    generators: list[torch.Generator],
    *,
    penalty: Penalty | None = None,
    select: bool = False,
    watcher: Watcher = Watcher(),
) -> Trained:
    """Every member trained by cross-entropy + decay · penalty; entries whose mask is 0 stay as they are.

    generators: one a member, for the order of its images. select: measure test accuracy after every epoch too, and
    keep the state whose validation accuracy is highest: the earliest of equals, the state before the first epoch
    among them. Training ends early when every member has diverged.
    """
    population = leaves(population)
    step = Step(population, splits, penalty, loop.optimizer, precision=loop.precision, way=loop.way)
    memory = _Memory(population, select and splits.validation is not None)
    at_once = images_at_once(population, loop.batch_size, loop.image_bytes)
    if select:
        memory.add(_measure(0, population, splits, time.perf_counter(), at_once, test=True), population, watcher)
    # a module that draws random numbers does so from the member's own state
    with torch.random.fork_rng(devices=cuda_devices(population)):
        torch.manual_seed(generators[0].initial_seed())
        for epoch in range(1, loop.epochs + 1):
            start = time.perf_counter()
            sums = _run_epoch(epoch, population, loop, generators, step, watcher)
            row = _measure(epoch, population, splits, start, at_once, test=select, sums=sums, lr=step.rate)
            memory.add(row, population, watcher)
            if memory.all_diverged:
                break
    return memory.trained()


def _run_epoch(
    epoch: int,
    population: Population,
    loop: Loop,
    generators: list[torch.Generator],
    step: Step,
    watcher: Watcher,
) -> Tensor:
    """One pass over train, every member in an order of its own; mean loss, penalty and objective [3, members]."""
    population.module.train()
    num_images = len(step.train)
    order = torch.stack([torch.randperm(num_images, generator=generator) for generator in generators])
    sums = torch.zeros(3, population.num_members, device=population.device)
    num_batches = count_batches(num_images, loop.batch_size)
    for index, batch in enumerate(step.batches(order, loop.batch_size)):
        step.rate = loop.learning_rate((epoch - 1 + index / num_batches) / loop.epochs)
        sums += step(*batch) * batch[-1].shape[1]
        watcher.batch()
    return sums / num_images


def _measure(
    epoch: int,
    population: Population,
    splits: Splits,
    start: float,
    at_once: int,
    *,
    test: bool,
    sums: Tensor | None = None,
    lr: float | None = None,
) -> Epoch:
    """The row of one epoch; `seconds` counts its training and its evaluation."""
    loss, penalty, objective = (None, None, None) if sums is None else sums.tolist()
    validation = None
    if splits.validation is not None:
        validation = evaluate(population, splits.validation, splits, at_once)
    tested = evaluate(population, splits.test, splits, at_once) if test else None
    return Epoch(epoch, loss, penalty, objective, validation, tested, lr, time.perf_counter() - start)


class _Memory:
    """Remembers the last good and the best state of every member, and the history."""

    def __init__(self, population: Population, select: bool):
        self.last = self.selected = population.clone()
        self.select = select
        self.best = torch.full((population.num_members,), -1.0)
        self.selected_epoch = [0] * population.num_members
        self.diverged: list[int | None] = [None] * population.num_members
        self.history: list[Epoch] = []

    @property
    def all_diverged(self) -> bool:
        """Whether no member is left."""
        return None not in self.diverged

    def add(self, row: Epoch, population: Population, watcher: Watcher) -> None:
        """Takes note of an epoch and of the state after it."""
        self._note_divergence(row, population)
        alive = torch.tensor([epoch is None for epoch in self.diverged])
        self.last = choose(alive.to(population.device), population.map(Tensor.detach), self.last)  # a copy
        self._note_best(row, alive)
        self.history.append(row)
        watcher.epoch(row)

    def _note_divergence(self, row: Epoch, population: Population) -> None:
        members = population.num_members
        each = [p.detach().reshape(members, -1).isfinite().all(1) for p in population.parameters.values()]
        finite = torch.stack(each).all(0)
        if row.objective is not None:
            finite = finite.cpu() & torch.tensor(row.objective).isfinite()
        for member, is_finite in enumerate(finite.tolist()):
            if not is_finite and self.diverged[member] is None:
                self.diverged[member] = row.epoch

    def _note_best(self, row: Epoch, alive: Tensor) -> None:
        if not self.select:
            return
        validation = torch.tensor(row.validation)
        better = alive & (validation > self.best)
        self.best = torch.where(better, validation, self.best)
        self.selected = choose(better.to(self.last.device), self.last, self.selected)
        for member in better.nonzero().flatten().tolist():
            self.selected_epoch[member] = row.epoch

    def trained(self) -> Trained:
        """The outcome."""
        selected, epochs = (self.selected, self.selected_epoch) if self.select else (self.last, None)
        return Trained(self.last, selected, epochs, self.diverged, self.history)
