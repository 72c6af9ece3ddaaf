"""``mmoe bench data``: images a second into packed batches, beside what others make of the same files; and what the
cache of frozen encoders' features saves."""

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.loading import files as made
from benchmarks.loading import frozen
from benchmarks.loading.rates import Side, alternate, judged, started
from benchmarks.loading.sides import BATCH, PEERS, PROCESSES, SIZE
from benchmarks.ops import machine
from benchmarks.report import Row
from mmoe.data.loader import Loader
from mmoe.errors import UserError
from mmoe.recipe.schema import Data

IMAGES, SAMPLES, BATCHES = 256, 5, 6
"""Files, timed samples of each side, batches in a sample."""
AHEAD = 5
"""Batches that no side reads ahead more of: they are taken before the clock starts."""
PACKS, IMAGE_TOKENS = 2, 4
OURS = ("dali", "simplejpeg", "pillow")
FEATURES = "features"


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them.

    Raises:
        UserError: an unknown name.
    """
    for option, names, known in (("--only", options.only, (*OURS, FEATURES)), ("--skip", options.skip, tuple(PEERS))):
        for name in names:
            if name not in known:
                raise UserError(f"there is no {name!r}", option, f"choose from {', '.join(known)}")
    # The decoders have threads of their own.
    torch.set_num_threads(1)
    console = Console(width=200, soft_wrap=True)
    console.print(machine(torch.device("cpu")), highlight=False)
    ours = [name for name in OURS if not options.only or name in options.only]
    peers = [name for name in PEERS if name not in options.skip]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            rows += _rows(Path(folder), ours, peers, options.threads, quick=options.quick)
    if not options.only or FEATURES in options.only:
        with tempfile.TemporaryDirectory() as folder:
            rows += frozen.rows(Path(folder), options.threads, quick=options.quick)
    targets = [] if options.quick else report.load_targets()
    rows = [report.judge(row, targets) for row in rows]
    report.show("images into batches", rows, console)
    if options.json:
        report.write(options.json, rows)


def _rows(folder: Path, ours: list[str], peers: list[str], threads: int, *, quick: bool) -> list[Row]:
    count, height, width = (BATCH, 32, 48) if quick else (IMAGES, made.HEIGHT, made.WIDTH)
    samples, batches, ahead = (2, 1, 0) if quick else (SAMPLES, BATCHES, AHEAD)
    files = made.write(folder, count, height, width)
    sides: dict[str, Iterator[int]] = {}
    missing: list[str] = []
    with ExitStack() as closing:
        for name in peers:
            try:
                sides[name] = started(PEERS[name](files, threads))
            except ImportError:
                missing.append(name)
        sides |= {f"data.{name}": _ours(files, name, threads, closing) for name in ours}
        rates = alternate({name: Side(side, batches, ahead) for name, side in sides.items()}, samples)
    shape = f"{width}x{height} JPEG → {SIZE}, {threads} threads"
    present = [name for name in peers if name not in missing]
    found = [
        judged(f"data.{name}{measured}", shape, rates[f"data.{name}"], rates[peer], peer, unit, i)
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
    return started(len(batch["images"][SIZE]) for batch in loader)
