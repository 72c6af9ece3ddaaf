"""How fast endless streams of batches are, timed in turn from a steady state."""

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import psutil

from benchmarks import measure
from benchmarks.report import Row

QUIET, TIMES, LONGEST_WAIT = 0.1, 4, 10.0
"""Seconds: a side is done with what it reads ahead once it uses hardly any processor time so many times in a row (on a
loaded machine a single time may mean that it waits for a processor)."""


class Rate(NamedTuple):
    """Images a second."""

    clock: float
    processor: float
    """Of processor time over all threads: what other programs do hardly changes it."""


class Side(NamedTuple):
    stream: Iterator[int]
    """How many images each batch has."""
    batches: int
    """In a sample."""
    ahead: int
    """Taken before the clock starts: no fewer than the side reads ahead."""


def started(stream: Iterator[int]) -> Iterator[int]:
    """The stream, once its threads and processes are up."""
    next(stream)
    return stream


def alternate(sides: Mapping[str, Side], samples: int) -> dict[str, list[Rate]]:
    """Each side's rates, ``samples`` times in turn."""
    rates: dict[str, list[Rate]] = {name: [] for name in sides}
    for _ in range(samples):
        for name, side in sides.items():
            for _ in range(side.ahead):
                next(side.stream)
            start, used = time.perf_counter(), time.process_time()
            images = sum(next(side.stream) for _ in range(side.batches))
            rates[name].append(Rate(images / (time.perf_counter() - start), images / (time.process_time() - used)))
            if side.ahead:
                _wait_for_quiet()
    return rates


def judged(name: str, shape: str, mine: list[Rate], theirs: list[Rate], peer: str, unit: str, which: int) -> Row:
    """Both were timed in turn: the median of a ratio a round leaves out what the machine did besides."""
    ratio = measure.timing([a[which] / b[which] for a, b in zip(mine, theirs, strict=True)])
    ours, other = (statistics.median(rate[which] for rate in rates) for rates in (mine, theirs))
    return Row(name, shape, "float32", ours, other, peer, unit, ratio.seconds, spread=ratio.spread)


def _wait_for_quiet() -> None:
    """Until neither this process nor those that it started work."""
    us, end, before, quiet = psutil.Process(), time.monotonic() + LONGEST_WAIT, 0.0, 0
    while quiet < TIMES and time.monotonic() < end:
        times = [process.cpu_times() for process in (us, *us.children(recursive=True))]
        used = sum(spent.user + spent.system for spent in times)
        quiet = quiet + 1 if used - before <= QUIET / 5 else 0
        before = used
        time.sleep(QUIET)
