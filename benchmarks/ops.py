"""``mmoe bench ops``: every operator against its peers and against what this machine's memory can do."""

import os
import platform
from argparse import Namespace
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import allocator, ceilings, emulated, measure, memory, report
from benchmarks.case import Case, Workload
from benchmarks.measure import Effort, Timing
from benchmarks.operators import OPERATORS, TOGETHER, module
from benchmarks.report import Row
from mmoe.errors import UserError

PEERS = {"eager": "eager", "compile": "compile", "transformers": "transformers", "megatron": "Megatron-Core"}
TRIAD_MEBIBYTES = 512
GEMM_SIDE = 4096


class Bench:
    """One run over some operators; ``skip`` names peers that are left out, ``shape`` is a pattern of those measured."""

    def __init__(self, *, quick: bool, skip: Sequence[str], shape: str, threads: int, device: torch.device) -> None:
        self.quick, self.threads, self.device, self.shape = quick, threads, device, shape
        self.skip = {PEERS[name] for name in skip}
        self.effort = measure.QUICK if quick else Effort()
        self.triad = ceilings.Triad(device, 1 if quick else TRIAD_MEBIBYTES)
        # Tiny shapes were never asked about.
        self.targets = [] if quick else report.load_targets()

    def ceilings(self) -> list[Row]:
        return ceilings.rows(self.triad, self.device, self.effort, 64 if self.quick else GEMM_SIDE)

    def operator(self, name: str) -> Iterator[Row]:
        """The rows of all cases of an operator; tensors of a case are gone before the next."""
        for case in module(name).cases(self.quick):
            if fnmatchcase(case.shape, self.shape):
                for row in self._case(case):
                    yield report.judge(row, self.targets)

    def _case(self, case: Case) -> Iterator[Row]:
        torch.manual_seed(0)
        # Else the eighth shape of a function would silently run uncompiled.
        torch.compiler.reset()
        with self.device:
            workload = case.build()
        peers = [name for name in workload.peers if name not in self.skip]
        for which in case.passes:
            yield from self._pass(case, workload, which, peers)
        if case.memory and self.device.type == "cpu":
            ours, *others = (
                memory.extra_bytes(case, side, quick=self.quick, threads=self.threads) / 2**20
                for side in ("ours", *peers)
            )
            for peer, theirs in zip(peers, others, strict=True):
                yield Row(
                    f"{case.operator}.memory", case.shape, case.dtype_name, ours, theirs, peer, "MiB", theirs / ours
                )

    def _pass(self, case: Case, workload: Workload, which: str, peers: Sequence[str]) -> Iterator[Row]:
        name, start = f"{case.operator}.{which}", getattr(measure, which)
        for peer in peers:
            allocator.release()
            ours, theirs = measure.alternate(start(workload.ours), start(workload.peers[peer]), self.effort)
            yield Row(
                name,
                case.shape,
                case.dtype_name,
                ours.seconds * 1e3,
                theirs.seconds * 1e3,
                peer,
                ratio=theirs.seconds / ours.seconds,
                spread=ours.spread,
            )
        if workload.floor:
            allocator.release()
            ours, triad = measure.alternate(start(workload.ours), measure.repeat(self.triad), self.effort)
            yield self._bandwidth(name, case, getattr(workload.floor, which), ours, triad)

    def _bandwidth(self, name: str, case: Case, size: int, ours: Timing, triad: Timing) -> Row:
        rate, ceiling = size / ours.seconds / 1e9, self.triad.bytes / triad.seconds / 1e9
        return Row(
            name,
            case.shape,
            case.dtype_name,
            rate,
            peer_name="triad",
            unit="GB/s",
            ratio=rate / ceiling,
            ceiling=ceiling,
            spread=ours.spread,
        )


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them.

    Raises:
        UserError: an unknown operator or peer, or no such device.
    """
    known = [*emulated.OPERATORS] if options.emulated else [*OPERATORS, *TOGETHER]
    _check("--only", options.only, known)
    _check("--skip", options.skip, list(PEERS))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", "--device cuda", "leave it out to measure the CPU")
    console = Console(width=200, soft_wrap=True)
    if options.emulated:
        emulated.run(options, console)
        return
    pool = options.allocator == "pool" and options.device == "cpu" and not options.quick
    if pool:
        allocator.preload()
    torch.set_num_threads(options.threads)
    bench = Bench(
        quick=options.quick,
        skip=options.skip,
        shape=options.shape,
        threads=options.threads,
        device=torch.device(options.device),
    )
    console.print(machine(bench.device) + (", large tensors from a pool" if pool else ""), highlight=False)
    rows: list[Row] = []
    progress = Console(stderr=True)
    for name in ["ceilings", *(name for name in known if not options.only or name in options.only)]:
        mine: list[Row] = []
        with progress.status(name) as status:
            for row in bench.ceilings() if name == "ceilings" else bench.operator(name):
                mine.append(row)
                status.update(f"{row.name} · {row.shape} · {row.dtype}")
        report.show(name, mine, console)
        rows += mine
        if options.json:
            report.write(options.json, rows)
    if asked := [row for row in rows if row.met is not None]:
        console.print(f"{sum(row.met is True for row in asked)} of {len(asked)} targets met")


def _check(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"there is no {name!r}", option, f"choose from {', '.join(known)}")


def machine(device: torch.device) -> str:
    """One line on what the numbers are of. A load above a few tenths means that they are of its neighbours too."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    load = os.getloadavg()[0]
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, load {load:.1f} before the start"
