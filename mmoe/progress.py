"""How far a long command is: a bar where stderr is a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.ending import say

EVERY = 10.0
"""Seconds."""


class Unit(NamedTuple):
    """What is counted: its name, how much of it one is, and the decimals of an amount."""

    name: str
    size: float = 1
    decimals: int = 0


GB, IMAGES = Unit("GB", 1e9, 1), Unit("images")


@contextmanager
def progress(title: str, total: int, unit: Unit = GB, *, silent: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives the function that is told of what is done, of ``total``: bytes for ``GB``; ``silent`` shows nothing."""
    far = _Far(total, unit)
    if silent:
        yield far.advance
        return
    if not sys.stderr.isatty():
        yield _Lines(title, far).advance
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[far]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, far="")

        def advance(count: int) -> None:
            far.advance(count)
            bar.update(task, advance=count, far=str(far))

        yield advance


class _Far:
    def __init__(self, total: int, unit: Unit) -> None:
        self.total, self.unit, self.done, self.begin = total, unit, 0, time.monotonic()

    @property
    def rate(self) -> float:
        """A second."""
        return self.done / max(time.monotonic() - self.begin, 1e-9)

    def advance(self, count: int) -> None:
        self.done += count

    def __str__(self) -> str:
        name, size, decimals = self.unit
        done, total = (f"{amount / size:.{decimals}f}" for amount in (self.done, self.total))
        return f"{done} of {total} {name}, {self.rate / size:.{decimals + 1}f} {name}/s"


class _Lines:
    def __init__(self, title: str, far: _Far) -> None:
        self.title, self.far, self.told = title, far, far.begin

    def advance(self, count: int) -> None:
        self.far.advance(count)
        now = time.monotonic()
        if now - self.told < EVERY:
            return
        self.told = now
        left = (self.far.total - self.far.done) / max(self.far.rate, 1e-9)
        minutes, seconds = divmod(round(left), 60)
        say(f"{self.title}: {self.far}, {minutes}:{seconds:02} left")
