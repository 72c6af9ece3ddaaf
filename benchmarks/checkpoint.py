"""``mmoe bench checkpoint``: how long training stands still for one, and how long it takes to write and to read."""

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import report
from benchmarks.ops import machine
from benchmarks.report import Row
from benchmarks.training.ours import Ours, recipe
from mmoe.checkpoint import layout, load
from mmoe.checkpoint.save import Saved, Saver

ROUNDS = 5
PIECE = 16 << 20


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them."""
    torch.set_num_threads(options.threads)
    console = Console(width=200, soft_wrap=True)
    console.print(machine(torch.device("cpu")), highlight=False)
    # Beside the checkout: /tmp may be memory.
    build = Path(__file__).parents[1] / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        rows = _Bench(Path(folder), quick=options.quick).rows()
    report.show("checkpoints of one process", rows, console)
    if options.json:
        report.write(options.json, rows)


class _Bench:
    """A model in training, its checkpoints, and the same bytes copied, written and read plainly."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.rounds = folder, 2 if quick else ROUNDS
        self.model = Ours(recipe(quick=quick), balanced=False)
        self.model.step()
        (folder / "tokenizer.json").write_text("{}")
        self.steps = 0

    def rows(self) -> list[Row]:
        alone = statistics.median(self._step() for _ in range(2 * self.rounds))
        beside: list[float] = []
        stalls = {True: list[float](), False: list[float]()}
        whole: dict[str, list[float]] = {"saved": [], "written": [], "copied": [], "loaded": [], "read": []}
        for _ in range(self.rounds):
            # Both in turn, and the plain passes over the same bytes between them.
            for asynchronous in (True, False):
                saved = self._save(asynchronous, beside if asynchronous else [])
                stalls[asynchronous].append(saved.stall)
            whole["saved"].append(saved.seconds)
            content = self._bytes(saved.bytes)
            whole["copied"].append(_seconds(content.clone))
            whole["written"].append(_seconds(lambda data=content: self._write(data)))
            whole["loaded"].append(_seconds(lambda path=saved.path: self._load(path)))
            whole["read"].append(_seconds(self._read))
        times = {name: statistics.median(values) for name, values in whole.items()}
        shape = f"{saved.bytes / 1e9:.2f} GB"
        stall, still = (statistics.median(stalls[asynchronous]) for asynchronous in (True, False))
        return [
            _row("stall", shape, stall, still, "asynchronous = false"),
            _row("stall", shape, stall, times["copied"], "copy in memory"),
            _row("step while it is written", shape, statistics.median(beside or [alone]), alone, "step alone"),
            _row("whole, asynchronous = false", shape, times["saved"], times["written"], "write + fsync + SHA-256"),
            _row("verified and loaded", shape, times["loaded"], times["read"], "read + SHA-256"),
        ]

    def _step(self) -> float:
        return _seconds(self.model.step)

    def _save(self, asynchronous: bool, beside: list[float]) -> Saved:
        """One checkpoint, training on until it is whole; the steps' seconds go to ``beside``."""
        self.steps += 1
        settings = self.model.recipe
        settings = replace(settings, checkpoint=replace(settings.checkpoint, asynchronous=asynchronous, keep_last=1))
        saver = Saver(self.folder, settings, self.folder / "tokenizer.json")
        stepper = self.model.stepper
        saved = saver.start(self.steps, stepper.wrapped, stepper.optimizer, {})
        while not saved:
            beside.append(self._step())
            saved = saver.poll()
        return saved[0]

    def _bytes(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8)

    def _write(self, content: Tensor) -> None:
        digest, data = hashlib.sha256(), content.numpy().data
        with (self.folder / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for begin in range(0, len(data), PIECE):
            digest.update(data[begin : begin + PIECE])

    def _read(self) -> None:
        with (self.folder / "plain").open("rb") as file:
            hashlib.file_digest(file, "sha256")
        with (self.folder / "plain").open("rb") as file:
            shutil.copyfileobj(file, _Nowhere(), PIECE)

    def _load(self, path: Path) -> None:
        layout.verify(path)
        load.resume(path, self.model.stepper.wrapped, self.model.stepper.optimizer)


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _row(name: str, shape: str, ours: float, peer: float, peer_name: str) -> Row:
    return Row(name, shape, "fp32", 1e3 * ours, 1e3 * peer, peer_name, ratio=peer / ours)
