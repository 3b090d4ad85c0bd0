"""How far a training is: a bar in a terminal, a few lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .callbacks import Callback
from .state import Training

LINES, PAUSE = 10, 10.0  # at most so many lines for a training, and not before so many seconds from the last


class Bar(Callback):
    """Advances a bar by an epoch."""

    def __init__(self, bar: Progress, task: object) -> None:
        self.bar, self.task = bar, task

    def on_epoch(self, training: Training, row: dict[str, float]) -> None:
        self.bar.update(self.task, completed=row["epoch"])  # type: ignore[arg-type]


class Lines(Callback):
    """Prints an epoch now and then."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name, self.last = console, name, time.monotonic()

    def on_epoch(self, training: Training, row: dict[str, float]) -> None:
        epoch, epochs = int(row["epoch"]), training.epochs
        turn = epoch * LINES // epochs > (epoch - 1) * LINES // epochs
        if epoch == epochs or not turn or time.monotonic() - self.last < PAUSE:
            return
        self.last = time.monotonic()
        test = f", test {row['test_accuracy']:.1f} %" if "test_accuracy" in row else ""
        self.console.print(f"{self.name}: epoch {epoch} of {epochs}, loss {row['loss']:.4g}{test}", soft_wrap=True)


@contextmanager
def shown(console: Console, name: str, epochs: int) -> Iterator[list[Callback]]:
    """Callbacks for one training."""
    if not console.is_terminal:
        yield [] if console.quiet else [Lines(console, name)]
        return
    with a_bar(console) as bar:
        yield [Bar(bar, bar.add_task(name, total=epochs))]


def a_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
