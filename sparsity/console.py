"""What a person sees while a run works: progress bars, tables, one line at the end."""

import logging
import sys
import time
from collections.abc import Iterable

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from sparsity.accounting import Report
from sparsity.training import Epoch, Watcher

log = logging.getLogger("sparsity")
SECONDS_BETWEEN_LINES = 10.0  # of the plain lines that stand for a bar where the output is no terminal
WIDTH = 132  # characters where the output is no terminal
NARROW = 118  # characters that the whole table needs on LeNet-5
COLUMNS = ("tensor", "shape", "std", "threshold", "non-zeros", "of", "density", "live in", "live out", "MACs")
LEFT_OUT_WHEN_NARROW = ("shape", "std", "threshold", "of")


class StageProgress(Watcher):
    """A bar for one stage, or plain lines from time to time where the output is no terminal."""

    def __init__(self, stage: str, num_epochs: int, num_batches: int):
        self.stage = stage
        self.num_epochs, self.num_batches = num_epochs, num_batches
        self.start = self.last_line = time.monotonic()
        self.batches = 0
        self.bar: Progress | None = None
        if sys.stderr.isatty() and num_epochs:
            self.bar = Progress(
                TextColumn("{task.description:<10}"),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
                TextColumn("{task.fields[text]}"),
                BarColumn(bar_width=24),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(stage, total=num_epochs * num_batches, text="")
            self.bar.start()

    def batch(self) -> None:
        """Moves the bar."""
        self.batches += 1
        if self.bar:
            self.bar.update(self.task, completed=self.batches)

    def epoch(self, row: Epoch) -> None:
        """Shows what an epoch came to."""
        text = describe(row, self.num_epochs)
        if self.bar:
            self.bar.update(self.task, text=text)
        is_last = row.epoch == self.num_epochs
        if row.epoch and (is_last or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES):
            self.last_line = time.monotonic()
            if not self.bar:
                log.info(f"{self.stage:<10} {text}{'' if is_last else f' | {self._left(row.epoch)} left'}")

    def _left(self, epoch: int) -> str:
        seconds = (time.monotonic() - self.start) / epoch * (self.num_epochs - epoch)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

    def close(self) -> None:
        """Takes the bar down; what it showed last stays."""
        if self.bar:
            self.bar.stop()


def describe(row: Epoch, num_epochs: int) -> str:
    """One epoch in words; over several members, their means."""
    parts = [f"epoch {row.epoch}/{num_epochs}"]
    if row.loss is not None and row.penalty is not None:
        parts += [f"loss {_mean(row.loss):.4f}", f"penalty {_mean(row.penalty):.4g}"]
    if row.validation is not None:
        parts.append(f"validation {_mean(row.validation):.2%}")
    return " | ".join(parts)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def show_report(title: str, report: Report) -> None:
    """The table of what is left, per tensor and whole, on stdout; a narrow terminal gets fewer columns."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    is_wide = console.width >= NARROW
    table = Table(title=title, title_justify="left", box=HEAVY_HEAD if is_wide else SIMPLE_HEAD, padding=(0, 1))
    columns = [name for name in COLUMNS if is_wide or name not in LEFT_OUT_WHEN_NARROW]
    for column in columns:
        table.add_column(column, justify="left" if column == "tensor" else "right", no_wrap=True)
    for row in report.rows:
        cells = _cells(row.name, "×".join(map(str, row.shape)), (row.std, row.threshold), (row.nonzero, row.total))
        cells |= {"live in": _count(row.live_inputs), "live out": _count(row.live_outputs), "MACs": _count(row.macs)}
        table.add_row(*(cells[column] for column in columns))
    table.add_section()
    for kind, macs in (("weights", report.macs["pruned"]), ("parameters", None)):
        cells = _cells(f"all {kind}", "", (None, None), (report.nonzero[kind], report.total[kind]))
        cells |= {"live in": "", "live out": "", "MACs": _count(macs)}
        table.add_row(*(cells[column] for column in columns))
    console.print(table)


def _cells(name: str, shape: str, numbers: tuple[float | None, ...], counts: tuple[int, int]) -> dict[str, str]:
    std, threshold = ("" if number is None else f"{number:.4g}" for number in numbers)
    nonzero, total = map(_count, counts)
    cells = {"tensor": name, "shape": shape, "std": std, "threshold": threshold, "non-zeros": nonzero, "of": total}
    return {**cells, "density": f"{counts[0] / counts[1]:.2%}"}


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def show_line(parts: Iterable[str]) -> None:
    """The one line that says what came out, on stdout."""
    print(" | ".join(parts), flush=True)
