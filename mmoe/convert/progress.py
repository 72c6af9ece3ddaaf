"""How far a conversion is: a bar where stderr is a terminal, else a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

EVERY = 10.0
"""Seconds."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that is told of the bytes that are done, of ``total``."""
    if not sys.stderr.isatty():
        yield _Lines(title, total).advance
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.begin = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told < EVERY:
            return
        self.told = now
        rate = self.done / (now - self.begin)
        minutes, seconds = divmod(round((self.total - self.done) / max(rate, 1)), 60)
        line = f"{self.title}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s"
        print(f"{line}, {minutes}:{seconds:02} left", file=sys.stderr, flush=True)
