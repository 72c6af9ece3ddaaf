"""``mmoe bench data``: images a second into packed batches, beside what others make of the same files."""

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console

from benchmarks import measure, report
from benchmarks.loading import files as made
from benchmarks.loading.sides import BATCH, PEERS, PROCESSES, SIZE
from benchmarks.ops import machine
from benchmarks.report import Row
from mmoe.data.loader import Loader
from mmoe.errors import UserError
from mmoe.recipe.schema import Data

HEIGHT, WIDTH = 480, 640
IMAGES, SAMPLES, BATCHES = 256, 5, 6
"""Files, timed samples of each side, batches in a sample."""
QUIET, TIMES, LONGEST_WAIT = 0.1, 4, 10.0
"""Seconds: a side is done with what it reads ahead once it uses hardly any processor time so many times in a row (on a
loaded machine a single time may mean that it waits for a processor)."""
AHEAD = 5
"""Batches that no side reads ahead more of: they are taken before the clock starts."""
PACKS, IMAGE_TOKENS = 2, 4
OURS = ("dali", "simplejpeg", "pillow")


class Rate(NamedTuple):
    """Images a second."""

    clock: float
    processor: float
    """Of processor time over all threads: what other programs do hardly changes it."""


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them.

    Raises:
        UserError: an option that is not for this, or an unknown name.
    """
    if options.emulated or options.sweep or options.profile or options.device != "cpu":
        raise UserError(
            "`mmoe bench data` times whole loaders on the CPU", "", "leave --emulated, --device and the like out"
        )
    for option, names, known in (("--only", options.only, OURS), ("--skip", options.skip, tuple(PEERS))):
        for name in names:
            if name not in known:
                raise UserError(f"there is no {name!r}", option, f"choose from {', '.join(known)}")
    # The decoders have threads of their own.
    torch.set_num_threads(1)
    console = Console(width=200, soft_wrap=True)
    console.print(machine(torch.device("cpu")), highlight=False)
    ours = [name for name in OURS if not options.only or name in options.only]
    peers = [name for name in PEERS if name not in options.skip]
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder), ours, peers, options.threads, quick=options.quick)
    targets = [] if options.quick else report.load_targets()
    rows = [report.judge(row, targets) for row in rows]
    report.show("images into batches", rows, console)
    if options.json:
        report.write(options.json, rows)


def _rows(folder: Path, ours: list[str], peers: list[str], threads: int, *, quick: bool) -> list[Row]:
    count, height, width = (BATCH, 32, 48) if quick else (IMAGES, HEIGHT, WIDTH)
    samples, batches, ahead = (2, 1, 0) if quick else (SAMPLES, BATCHES, AHEAD)
    files = made.write(folder, count, height, width)
    sides: dict[str, Iterator[int]] = {}
    missing: list[str] = []
    with ExitStack() as closing:
        for name in peers:
            try:
                sides[name] = _started(PEERS[name](files, threads))
            except ImportError:
                missing.append(name)
        sides |= {f"data.{name}": _ours(files, name, threads, closing) for name in ours}
        rates = _alternate(sides, samples, batches, ahead)
    shape = f"{width}x{height} JPEG → {SIZE}, {threads} threads"
    present = [name for name in peers if name not in missing]
    found = [
        _row(f"data.{name}{measured}", shape, rates[f"data.{name}"], rates[peer], peer, unit, i)
        for name in ours
        for i, (measured, unit) in enumerate((("", "images/s"), (".processor", "images/CPU s")))
        for peer in present
        if not (i and peer in PROCESSES)
    ]
    for name in missing:
        for side in ours:
            speed = statistics.median(rate.clock for rate in rates[f"data.{side}"])
            found.append(Row(f"data.{side}", shape, "float32", speed, None, f"{name}: not installed", "images/s"))
    return found


def _row(name: str, shape: str, mine: list[Rate], theirs: list[Rate], peer: str, unit: str, which: int) -> Row:
    """Both were timed in turn: the median of a ratio a round leaves out what the machine did besides."""
    ratio = measure.timing([a[which] / b[which] for a, b in zip(mine, theirs, strict=True)])
    ours, other = (statistics.median(rate[which] for rate in rates) for rates in (mine, theirs))
    return Row(name, shape, "float32", ours, other, peer, unit, ratio.seconds, spread=ratio.spread)


def _ours(files: made.Files, decoder: str, threads: int, closing: ExitStack) -> Iterator[int]:
    data = Data(
        mixture=str(files.mixture),
        root=str(files.root),
        sequence_length=1024,
        images_per_pack=BATCH // PACKS,
        workers=threads,
        decoder=decoder,  # pyright: ignore[reportArgumentType]
    )
    loader = Loader(data, image_tokens=IMAGE_TOKENS, image_sizes=(SIZE,), micro_batch=PACKS, global_batch=PACKS, seed=0)
    closing.callback(loader.close)
    return _started(len(batch["images"][SIZE]) for batch in loader)


def _started(side: Iterator[int]) -> Iterator[int]:
    """The iterator, once its threads and processes are up."""
    next(side)
    return side


def _alternate(sides: dict[str, Iterator[int]], samples: int, batches: int, ahead: int) -> dict[str, list[Rate]]:
    """Each side's rates, ``samples`` times in turn."""
    rates: dict[str, list[Rate]] = {name: [] for name in sides}
    for _ in range(samples):
        for name, side in sides.items():
            for _ in range(ahead):
                next(side)
            start, used = time.perf_counter(), time.process_time()
            images = sum(next(side) for _ in range(batches))
            rates[name].append(Rate(images / (time.perf_counter() - start), images / (time.process_time() - used)))
            if ahead:
                _wait_for_quiet()
    return rates


def _wait_for_quiet() -> None:
    """Until neither this process nor those that it started work."""
    us, end, before, quiet = psutil.Process(), time.monotonic() + LONGEST_WAIT, 0.0, 0
    while quiet < TIMES and time.monotonic() < end:
        times = [process.cpu_times() for process in (us, *us.children(recursive=True))]
        used = sum(spent.user + spent.system for spent in times)
        quiet = quiet + 1 if used - before <= QUIET / 5 else 0
        before = used
        time.sleep(QUIET)
