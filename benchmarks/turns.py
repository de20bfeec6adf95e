"""Contenders measured by interleaving, each in a process of its own that waits while the others have theirs.

A process of its own, because what one sets must not reach another: whether denormals are flushed, which holds for the
threads that a process starts afterwards, the threads themselves, and memory.
"""

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

Reading = dict[str, float]  # `seconds`, and what else was measured
Tell = Callable[..., None]  # takes a reading by keyword, and comes back when it is the contender's turn again
Function = Callable[..., None]  # of a Tell and picklable arguments; measures until it is stopped


class Contender:
    """A function in a process of its own, measured when asked."""

    def __init__(self, function: Function, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def turn(self) -> Reading:
        """The next reading."""
        self.pipe.send(None)
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise RuntimeError("a contender ended early: its own error is above") from error

    def stop(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, function: Function, arguments: tuple[Any, ...]) -> None:
    def tell(**reading: float) -> None:
        pipe.send(reading)
        pipe.recv()

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU is no news
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # nobody asks any more
        pipe.recv()
        function(tell, *arguments)


@contextlib.contextmanager
def started(contenders: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Contender]]:
    """The contenders of the functions and arguments given, which end with the block."""
    running: dict[str, Contender] = {}
    try:
        for name, call in contenders.items():
            running[name] = Contender(*call)
        yield running
    finally:
        for contender in running.values():
            contender.stop()


class Turns:
    """The readings of contenders, all of a round before the next round."""

    def __init__(self, contenders: Mapping[str, tuple[Any, ...]], rounds: int):
        """The first turn of each warms up, alone, and is kept apart."""
        with started(contenders) as running:
            self.first = {name: contender.turn() for name, contender in running.items()}
            self.rounds = [{name: each.turn() for name, each in running.items()} for _ in range(rounds)]

    def all(self, name: str, key: str = "seconds") -> list[float]:
        """A contender's readings, one a round."""
        return [turn[name][key] for turn in self.rounds]

    def median(self, name: str, key: str = "seconds") -> float:
        """The median of a contender's readings."""
        return median(self.all(name, key))

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long one takes as another: the median of the rounds' own ratios."""
        return median(slower / faster for slower, faster in zip(self.all(slow), self.all(fast)))

    def one_off(self, name: str) -> float:
        """The seconds by which a contender's first turn is longer than its others."""
        return self.first[name]["seconds"] - self.median(name)
