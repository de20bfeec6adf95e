"""The one training loop, and evaluation: a population in, a population and its history out; names no method."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.capture import Way
from sparsity.data import Files, Images, Splits, count_batches
from sparsity.errors import ConfigError
from sparsity.evaluation import evaluate, images_at_once
from sparsity.kernels import Kernels, KernelStep
from sparsity.nodes import Average
from sparsity.population import Population, choose
from sparsity.step import CROSS_ENTROPY, Augmentation, Loss, Moment, Penalty, Seen, Shrink, Step, cuda_devices, leaves
from sparsity.tensors import Tensors


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
    augment: Augmentation | None = None
    draws: int = 0  # numbers that are drawn for each image of an epoch, to augment it by
    average: Average | None = None  # measured and handed back in place of the last weights
    image_bytes: int = 0  # what evaluating one image of one member takes; 0: no bound
    kernels: Kernels | None = None  # of the network, where steps are computed by them


@dataclass(frozen=True)
class Gradual:
    """Pruning while training: masks that change every so many steps; Zhu, Gupta, 2017.

    They change before the first step, after every `every` steps, and last of all at the end of the span over which
    they rise, whose share of the way is exactly 1. An entry may come back, and then begins at 0 with no moments; one
    that an earlier stage masked never does.
    """

    # the population as it is now, with the masks that training began with, and the share of the way in [0, 1] to masks
    # bool [members, *shape] by name; a parameter without one is kept whole; changes nothing, takes NaN of the diverged
    masks: Callable[[Population, float], Tensors]
    names: Collection[str]  # the parameters that may come to be masked
    curve: Callable[[float], float]  # progress in [0, 1] of the span to the share in [0, 1] of the way
    until: float  # where the span ends, as a share in [0, 1] of the training's steps
    every: int  # steps between changes
    straight_through: bool = False  # whether what is masked is trained on: the forward pass alone is under the masks
    regrows = False  # whether what was masked before may come back

    def shares(self, num_steps: int) -> dict[int, float]:
        """How far masks are after so many steps, wherever they change in a training of num_steps."""
        span = round(self.until * num_steps)
        return {step: self.curve(step / span) for step in range(0, span, self.every)} | {span: 1.0}


@dataclass(frozen=True)
class Regrowth:
    """Masks whose entries are exchanged while training, as many as there are; Mocanu et al., 2018; Evci et al., 2020.

    They change after every `every` steps of the span. What comes back begins at 0, with no moments.
    """

    # the population as it is now, and the share in [0, 1] of what each mask keeps that is exchanged, to masks by name
    masks: Callable[[Population, float], Tensors]
    names: Collection[str]  # the parameters whose masks change
    share: float  # in [0, 1], exchanged at first; it falls to 0 along a cosine
    until: float  # where the span ends, as a share in [0, 1] of the training's steps
    every: int  # steps between changes
    straight_through = False
    regrows = True

    def shares(self, num_steps: int) -> dict[int, float]:
        """What share is exchanged after so many steps, wherever masks change in a training of num_steps."""
        span = round(self.until * num_steps)
        steps = range(self.every, span, self.every)
        return {step: self.share * (1 + math.cos(math.pi * step / span)) / 2 for step in steps}


@dataclass(frozen=True)
class Adaptation:
    """Decays that are found while they act: raised while what would be left falls too slowly, lowered where too fast.

    The logarithm of what is left is to fall evenly, and to be as asked after SETTLED of the training: later, learning
    rates are low.
    """

    excess: Callable[[Population], list[float]]  # what would be left of each member / what may be
    every: int  # steps from one look to the next

    SETTLED = 0.8
    FALL, RISE = 0.8, 1.25  # the most that a decay is multiplied by at once

    def factor(self, last: tuple[float, float], now: tuple[float, float]) -> float:
        """What a decay is multiplied by; last, now: shares of training, and log(excess) after them."""
        (before, was), (progress, left) = last, now
        if not math.isfinite(left) or left <= 0:
            return self.FALL if left <= 0 else 1.0
        needed = left / max(self.SETTLED - progress, 0.05)
        fallen = max((was - left) / (progress - before), needed / 100)
        return min(max((needed / fallen) ** 0.5, self.FALL), self.RISE)


class Epoch(NamedTuple):
    """What one epoch came to; each list has one entry a member."""

    epoch: int  # 1 is the first, 0 the state before it
    loss: list[float] | None  # mean over the epoch's batches, without the penalty
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
    selected: Population  # at the selected epochs, masks too; the same as `last` where nothing was selected
    selected_epoch: list[int] | None
    diverged: list[int | None]  # the epoch in which a member's loss or weights became NaN or infinite
    history: list[Epoch]
    scale: list[float] | None = None  # what the members' decays came to be multiplied by, where they were adapted


def train(
    population: Population,
    splits: Splits,
    loop: Loop,
    generators: list[torch.Generator],
    *,
    loss: Loss = CROSS_ENTROPY,
    penalty: Penalty | None = None,
    shrink: Shrink | None = None,
    seen: Seen | None = None,
    select: bool = False,
    gradual: Gradual | Regrowth | None = None,
    adaptation: Adaptation | None = None,
    stop: int | None = None,
    watcher: Watcher = Watcher(),
) -> Trained:
    """Every member trained by loss + decay · penalty, or shrunk step by step; entries whose mask is 0 stay as they are.

    generators: one a member, for the order of its images. seen: what the forward pass sees in place of the parameters,
    which is what is measured and handed back. select: measure test accuracy after every epoch too, and
    keep the state whose validation accuracy is highest: the earliest of equals, the state before the first epoch
    among them. gradual: masks that change on the way; only states whose masks have come all the way are selected. stop:
    end after so many epochs of the whole schedule. Training ends early when every member has diverged.
    """
    num_batches = count_batches(len(splits.train), loop.batch_size)
    check_stop(loop, stop)
    if isinstance(gradual, Gradual):
        check_gradual(loop, num_batches, gradual, stop=stop if select else None)
    population = population if gradual is None else _maskable(population, gradual.names)
    population = leaves(population, contiguous=loop.kernels is not None)
    how = {"precision": loop.precision, "way": loop.way, "augment": loop.augment, "seen": seen}
    how["straight_through"] = gradual is not None and gradual.straight_through
    if loop.kernels is not None:
        step: Step | KernelStep = KernelStep(
            population, splits, penalty, loop.optimizer, loop.kernels.chain, loop.kernels.library
        )
    else:
        step = Step(population, splits, penalty, loop.optimizer, loss=loss, shrink=shrink, **how)
    masking = _Masking(gradual, step, loop.epochs * num_batches)
    masking.after(0)
    averaging = _Averaging(loop, population, loop.epochs * num_batches)
    adapting = _Adapting(adaptation, step, loop.epochs * num_batches)
    memory = _Memory(step.masked(population), select and splits.validation is not None)
    if select:
        row = _measure(0, step.masked(population), splits, loop, time.perf_counter(), test=True)
        memory.add(row, step.masked(population), watcher, may_select=masking.is_final)
    # a module that draws random numbers does so from the member's own state
    with torch.random.fork_rng(devices=cuda_devices(population)):
        torch.manual_seed(generators[0].initial_seed())
        for epoch in range(1, (loop.epochs if stop is None else stop) + 1):
            start = time.perf_counter()
            sums = _run_epoch(epoch, population, loop, generators, step, masking, averaging, adapting, watcher)
            found = step.masked(averaging.after_epoch())
            row = _measure(epoch, found, splits, loop, start, test=select, sums=sums, lr=step.rate)
            memory.add(row, found, watcher, may_select=masking.is_final)
            if memory.all_diverged:
                break
    return replace(memory.trained(), scale=None if step.scale is None else step.scale.tolist())


def check_stop(loop: Loop, stop: int | None) -> None:
    """Refuses an epoch to stop after that is none of the loop's."""
    if stop is not None and not 1 <= stop <= loop.epochs:
        raise ConfigError(f"training of {loop.epochs} epochs cannot stop after epoch {stop}: take 1 to {loop.epochs}")


def check_gradual(loop: Loop, num_batches: int, gradual: Gradual, *, stop: int | None = None) -> None:
    """Refuses gradual pruning that no epoch, of num_batches steps, ends late enough to be selected after.

    stop: the epoch that training ends after, in place of the last.
    """
    if not 0 <= gradual.until <= 1:
        raise ConfigError(f"until={gradual.until}: gradual pruning ends at a share of the training in [0, 1]")
    if gradual.every < 1:
        raise ConfigError(f"every={gradual.every}: masks change every so many steps, 1 at least")
    epochs = loop.epochs if stop is None else stop
    end = max(gradual.shares(loop.epochs * num_batches))
    if end > epochs * num_batches:
        raise ConfigError(
            f"no epoch ends at the final sparsity: with until={gradual.until} and every={gradual.every} masks change "
            f"until step {end} of {loop.epochs} epochs, and training stops after epoch {epochs}, at step "
            f"{epochs * num_batches}: lower until, or stop later"
        )


def _maskable(population: Population, names: Collection[str]) -> Population:
    """The population with a mask for each of the named parameters, of ones where it had none."""
    ones = {name: torch.ones_like(population.parameters[name], dtype=torch.bool) for name in names}
    return replace(population, masks=ones | population.masks)


QUIET = 2**60  # steps: more than any training has


class _Masking:
    """Remembers how far masks have come, and changes them when it is time."""

    def __init__(self, gradual: Gradual | Regrowth | None, step: Step, num_steps: int):
        self.gradual, self.step = gradual, step
        self.shares = {} if gradual is None else gradual.shares(num_steps)
        self.earlier = {} if gradual is None else {name: mask.clone() for name, mask in step.population.masks.items()}
        self.is_final = gradual is None or gradual.regrows

    def quiet_after(self, num_done: int) -> int:
        """How many steps after so many the next change comes; many where none does."""
        return next((step - num_done for step in self.shares if step > num_done), QUIET)

    def after(self, num_done: int) -> None:
        """Changes the masks where they are to change after so many steps."""
        share = self.shares.get(num_done)
        if share is None:
            return
        now = self.step.population.map(Tensor.detach)
        found = self.gradual.masks(now if self.gradual.regrows else replace(now, masks=self.earlier), share)
        assert found.keys() <= set(self.gradual.names), found.keys() - set(self.gradual.names)
        if not self.gradual.regrows:
            found = {name: self.earlier[name] & found.get(name, True) for name in self.gradual.names}
        self.step.mask(found)
        self.is_final |= share == 1.0


class _Adapting:
    """Remembers what was left when it was last looked, and changes the decays when it is time."""

    def __init__(self, adaptation: Adaptation | None, step: Step, num_steps: int):
        self.adaptation, self.step, self.num_steps = adaptation, step, num_steps
        self.last: list[tuple[float, float]] = []
        if adaptation is not None:
            step.scale = torch.ones(step.population.num_members, device=step.device)
            self.last = self._seen(0)

    def quiet_after(self, num_done: int) -> int:
        """How many steps after so many it looks next."""
        return QUIET if self.adaptation is None else self.adaptation.every - num_done % self.adaptation.every

    def after(self, num_done: int) -> None:
        """Changes the decays where it is time to look."""
        if self.adaptation is None or num_done % self.adaptation.every:
            return
        now = self._seen(num_done)
        factors = [self.adaptation.factor(*pair) for pair in zip(self.last, now)]
        self.step.scale *= torch.tensor(factors, device=self.step.device)
        self.last = now

    def _seen(self, num_done: int) -> list[tuple[float, float]]:
        left = self.adaptation.excess(self.step.population.map(Tensor.detach))
        return [(num_done / self.num_steps, math.log(each) if each > 0 else -math.inf) for each in left]


class _Averaging:
    """Remembers the average of a population's weights, and of the statistics of its normalisations."""

    def __init__(self, loop: Loop, population: Population, num_steps: int):
        self.average = None if loop.average is None or loop.average.kind == "none" else loop.average
        self.population, self.num_done, self.count = population, 0, 0
        self.start = round(self.average.start * num_steps) if self.average else num_steps
        self.kept: Population | None = None

    @property
    def takes_steps(self) -> bool:
        """Whether it forgets by steps."""
        return self.average is not None and self.average.kind == "ema"

    def quiet_after(self, num_done: int) -> int:
        """How many steps after so many it takes the weights next."""
        return max(1, self.start - num_done + 1) if self.takes_steps else QUIET

    def after(self, num_done: int) -> None:
        """Takes the weights after so many steps into the average, if it forgets by steps and has begun."""
        self.num_done = num_done
        if self.takes_steps and num_done > self.start:
            self._take(1 - self.average.decay)

    def after_epoch(self) -> Population:
        """The population to be measured: the average once it has begun, masked as the weights are now."""
        if self.average is None or self.num_done <= self.start:
            return self.population
        if self.average.kind == "mean":
            self._take(1 / (self.count + 1))
        masks = self.population.masks
        held = {name: p * masks[name] if name in masks else p for name, p in self.kept.parameters.items()}
        return replace(self.kept, parameters=held, masks=masks)

    @torch.no_grad()
    def _take(self, share: float) -> None:
        """Moves the average a share of the way to the weights as they are; all the way the first time."""
        self.count += 1
        if self.kept is None:
            self.kept = self.population.clone()
            return
        for part in ("parameters", "buffers"):
            kept, now = getattr(self.kept, part), getattr(self.population, part)
            for name, tensor in kept.items():
                if tensor.is_floating_point():
                    tensor.lerp_(now[name], share)
                else:
                    tensor.copy_(now[name])


def _run_epoch(
    epoch: int,
    population: Population,
    loop: Loop,
    generators: list[torch.Generator],
    step: Step,
    masking: _Masking,
    averaging: "_Averaging",
    adapting: "_Adapting",
    watcher: Watcher,
) -> Tensor:
    """One pass over train, every member in an order of its own; mean loss, penalty and objective [3, members]."""
    population.module.train()
    num_images = len(step.train)
    order = torch.stack([torch.randperm(num_images, generator=generator) for generator in generators])
    sums = torch.zeros(3, population.num_members, device=population.device)
    num_batches = count_batches(num_images, loop.batch_size)
    step.begin(order, loop.batch_size, _drawn(generators, num_images, loop.draws) if loop.augment else None)
    first, done = (epoch - 1) * num_batches, 0
    while done < num_batches:
        quiet = (each.quiet_after(first + done) for each in (masking, adapting, averaging))
        count = min(step.most, num_batches - done, *quiet)
        shares = [(epoch - 1 + index / num_batches) / loop.epochs for index in range(done, done + count)]
        sums += step.advance([Moment(progress, loop.learning_rate(progress)) for progress in shares])
        done += count
        masking.after(first + done)
        adapting.after(first + done)
        averaging.after(first + done)
        for _ in range(count):
            watcher.batch()
    return sums / num_images


def _drawn(generators: list[torch.Generator], num_images: int, draws: int) -> Tensor:
    """Numbers in [0, 1) of every member's own: [members, images, draws]."""
    return torch.stack([torch.rand(num_images, draws, generator=generator) for generator in generators])


def _measure(
    epoch: int,
    population: Population,
    splits: Splits,
    loop: Loop,
    start: float,
    *,
    test: bool,
    sums: Tensor | None = None,
    lr: float | None = None,
) -> Epoch:
    """The row of one epoch; `seconds` counts its training and its evaluation."""
    loss, penalty, objective = (None, None, None) if sums is None else sums.tolist()
    at_once, held_out = images_at_once(population, loop.batch_size, loop.image_bytes), splits.validation
    validation = None if held_out is None else measured(population, held_out, splits, at_once, loop.kernels)
    tested = measured(population, splits.test, splits, at_once, loop.kernels) if test else None
    return Epoch(epoch, loss, penalty, objective, validation, tested, lr, time.perf_counter() - start)


def measured(
    population: Population, data: Images | Files, splits: Splits, at_once: int, kernels: Kernels | None
) -> list[float]:
    """The accuracy of every member on a set, in [0, 1], by kernels where there are some.

    at_once: the number of images in a forward pass without them.
    """
    found = None if kernels is None else kernels.accuracies(population, data, splits)
    return evaluate(population, data, splits, at_once) if found is None else found


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

    def add(self, row: Epoch, population: Population, watcher: Watcher, *, may_select: bool) -> None:
        """Takes note of an epoch and of the state after it."""
        self._note_divergence(row, population)
        alive = torch.tensor([epoch is None for epoch in self.diverged])
        self.last = choose(alive.to(population.device), population.map(Tensor.detach), self.last)  # a copy
        if self.select and may_select:
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
