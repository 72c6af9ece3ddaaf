"""What must be alike on all ranks before the first step, and who is the odd one out.

Facts are gathered on every rank (:class:`Facts`), then judged in one place (:func:`judge`, which is pure): versions,
code and recipe by majority, clocks and bandwidths against the median. Another version, code or recipe is an error; the
rest are warnings. Clocks are among those: nothing in training compares the times of two ranks. The watchdog counts
seconds since a rank's record changed by the reader's own monotonic clock, checkpoints are ordered by their step, and
the wall clock is written to TensorBoard's files and to events.jsonl only. A clock that is off makes logs of several
hosts hard to lay side by side, and the goodput of a run wrong that goes on with another host as its first.
"""

import hashlib
import importlib.metadata
import itertools
import platform
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmoe
from mmoe.errors import UserError
from mmoe.recipe.load import dump_recipe
from mmoe.recipe.schema import Recipe

PACKAGES = (
    "torch",
    "megatron-core",
    "nvidia-dali-cuda130",
    "transformers",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "numpy",
    "pillow",
)
CLOCK_SECONDS = 1.0
"""A clock this far from the median, beyond what its measurement leaves open, is worth a warning."""
SLOW = 0.5
"""A rank below this share of the median bandwidth is worth a warning."""
LEAST_FREE = 1 << 30
"""Bytes in the run's folder."""
ROUND_TRIPS = 8
QUESTIONS = 1024
"""Of all ranks together, from so many ranks on one each: the first rank answers one after another."""
BYTES = 1 << 24
"""Of each rank's tensor in a measured collective."""
REPEATS = 3
_calls = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one rank is and has."""

    rank: int
    host: str
    versions: dict[str, str]
    """Of Python, mmoe and the packages that take part in training, by name."""
    code: str
    """SHA-256 of mmoe's Python sources."""
    operators: str
    """SHA-256 of the compiled operators; "" where there are none."""
    recipe: str
    """SHA-256 of the complete recipe; "" without one."""
    clock: float
    """Seconds that the clock is ahead of the first rank's."""
    clock_error: float
    """Seconds that the clock may be off from that: half of the fastest round trip."""
    free: int
    """Bytes free in the run's folder."""
    all_reduce: float | None = None
    """Bytes per second through this rank's link, (2 · (n − 1) / n · bytes) / time; None where it is not measured."""
    all_to_all: float | None = None
    """The same, ((n − 1) / n · bytes) / time."""


@dataclass(frozen=True)
class Finding:
    """What is odd, and where."""

    what: str
    fatal: bool

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.what}"


def judge(everyone: Sequence[Facts]) -> list[Finding]:
    """What differs between the ranks, errors first."""
    names = sorted({name for facts in everyone for name in facts.versions})
    found = [line for name in names for line in _odd(everyone, name, lambda f, n=name: f.versions.get(n, "missing"))]
    found += _odd(everyone, "the code of mmoe", lambda facts: facts.code[:8])
    found += _odd(everyone, "the recipe", lambda facts: facts.recipe[:8] or "none")
    findings = [Finding(line, True) for line in found]
    odd = _odd(everyone, "the library of operators", lambda facts: facts.operators[:8] or "none")
    findings += [Finding(line, False) for line in odd]
    clocks = [facts.clock for facts in everyone]
    # Of two in the middle the one nearer to the first rank's: of two ranks, the other one is odd.
    middle = min(statistics.median_low(clocks), statistics.median_high(clocks), key=abs)
    for facts in everyone:
        ahead = facts.clock - middle
        if abs(ahead) > CLOCK_SECONDS + facts.clock_error:
            line = f"the clock of {_named([facts])} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
            findings.append(Finding(f"{line} (± {facts.clock_error:.3f} s)", False))
    scarce = [facts for facts in everyone if facts.free < LEAST_FREE]
    if scarce:
        line = f"{min(facts.free for facts in scarce) / 1e9:.2f} GB free in the run's folder on {_named(scarce)}"
        findings.append(Finding(line, False))
    for name, rate in (("all-reduce", "all_reduce"), ("all-to-all", "all_to_all")):
        rates = [(facts, getattr(facts, rate)) for facts in everyone if getattr(facts, rate) is not None]
        usual = statistics.median_high(value for _, value in rates) if rates else 0.0
        for facts, value in rates:
            if value < SLOW * usual:
                line = f"{name} of {_named([facts])} is {value / 1e9:.2f} GB/s, the median {usual / 1e9:.2f}"
                findings.append(Finding(line, False))
    return findings


def _odd(everyone: Sequence[Facts], name: str, value: Callable[[Facts], str]) -> Iterator[str]:
    """A line for each value that is not the majority's; of equally many, the first rank's counts."""
    counts = Counter(value(facts) for facts in everyone)
    usual, ranks = counts.most_common(1)[0]
    for other in counts:  # in the order of the ranks, so that every rank finds the same first line
        if other == usual:
            continue
        odd = [facts for facts in everyone if value(facts) == other]
        yield f"{name} is {other} on {_named(odd)}, {usual} on {ranks} of {len(everyone)} ranks"


def _named(some: Sequence[Facts]) -> str:
    """``rank 3 (node7)``, or the first of many."""
    shown = ", ".join(f"{facts.rank} ({facts.host})" for facts in some[:4])
    return f"rank{'s' if len(some) > 1 else ''} {shown}{f' and {len(some) - 4} more' if len(some) > 4 else ''}"


def agree(recipe: Recipe, out: Path) -> list[str]:
    """Compares all ranks but for bandwidth, in a few round trips; every rank calls it, in its process group.

    Args:
        recipe: as this rank has read it.
        out: the run's folder; it need not exist yet.

    Returns:
        The warnings, a line each and the same on every rank, for the first one to print.

    Raises:
        UserError: versions, code or recipe differ; on every rank alike, naming the odd rank and its host.
    """
    findings = judge(gather(recipe, out))
    refuse(findings)
    return [finding.what for finding in findings]


def refuse(findings: Iterable[Finding]) -> None:
    """Raises :class:`UserError` with the first error among them."""
    errors = [finding.what for finding in findings if finding.fatal]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        fix = "start all ranks with one installation and one recipe; `mmoe doctor --preflight` lists them"
        raise UserError(f"the ranks differ: {errors[0]}{more}", "before step 1", fix)


def gather(recipe: Recipe | None, out: Path, *, bandwidth: bool = False) -> list[Facts]:
    """Every rank's facts, by rank, on every rank; with ``bandwidth`` a collective of each kind is timed."""
    import torch.distributed as dist

    from mmoe.parallel import engine

    clock, error = _clock()
    reduce, exchange = _bandwidths() if bandwidth else (None, None)
    return engine.gather(
        Facts(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            versions=versions(),
            code=code(),
            operators=operators(),
            recipe=hashlib.sha256(dump_recipe(recipe).encode()).hexdigest() if recipe else "",
            clock=clock,
            clock_error=error,
            free=free(out),
            all_reduce=reduce,
            all_to_all=exchange,
        )
    )


def versions() -> dict[str, str]:
    """Of everything that takes part in training, by name."""
    found = {"python": platform.python_version(), "mmoe": mmoe.__version__}
    return found | {package: version(package) for package in PACKAGES}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code() -> str:
    """SHA-256 of mmoe's Python sources and their places in the package."""
    root = Path(mmoe.__file__).parent
    digest = hashlib.sha256()
    for source in sorted(root.rglob("*.py")):
        digest.update(f"{source.relative_to(root)}\0{hashlib.sha256(source.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def operators() -> str:
    """SHA-256 of the compiled operators; "" where there are none."""
    from mmoe import ops

    if not ops.LIBRARY.is_file():
        return ""
    with ops.LIBRARY.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free(folder: Path) -> int:
    """Bytes free where ``folder`` is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def now() -> float:
    """This rank's clock, in seconds."""
    return time.time()


def _clock() -> tuple[float, float]:
    """Seconds that this rank's clock is ahead of the first rank's, and how much that may be off.

    The first rank answers the others one after another through the process group's store. Its answer was given at some
    time between question and answer: half of the round trip is the uncertainty, and the fastest one counts.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed import distributed_c10d

    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return 0.0, 0.0
    # A connection of its own: a question that waits for its answer holds up nobody else's.
    shared: Any = distributed_c10d._get_default_store()
    store = PrefixStore(f"preflight {next(_calls)}", shared.clone())
    best = (0.0, float("inf")) if rank else (0.0, 0.0)
    trips = max(1, min(ROUND_TRIPS, QUESTIONS // world))
    for other in range(1, world) if rank == 0 else [rank]:
        for trip in range(trips):
            question, answer = f"{other} asks {trip}", f"{other} is told {trip}"
            if rank == 0:
                store.get(question)
                store.set(answer, repr(now()))
            else:
                before, begin = now(), time.perf_counter()
                store.set(question, "")
                told = float(store.get(answer))
                half = (time.perf_counter() - begin) / 2
                best = min(best, (before + half - told, half), key=lambda pair: pair[1])
    return best


def _bandwidths() -> tuple[float | None, float | None]:
    """Bytes per second through this rank's link in an all-reduce and an all-to-all over all ranks."""
    import torch
    import torch.distributed as dist

    from mmoe.parallel import cpu_platform

    world = dist.get_world_size()
    if world == 1:
        return None, None
    rows = torch.zeros(BYTES // 4 // world * world, device=cpu_platform.device())
    received = torch.empty_like(rows)
    size = rows.numel() * rows.itemsize * (world - 1) / world
    reduce = _fastest(lambda: dist.all_reduce(rows))
    return 2 * size / reduce, size / _fastest(lambda: dist.all_to_all_single(received, rows))


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls that all ranks begin together, the first not counted."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def run(recipe: Recipe | None, out: Path) -> None:
    """`mmoe doctor --preflight`: starts the ranks' process group, measures, and the first rank prints the table.

    Raises:
        UserError: versions, code or recipe differ, on every rank alike.
    """
    import torch.distributed as dist

    from mmoe.parallel import engine
    from mmoe.recipe.schema import Parallel

    engine.join(Parallel())
    everyone = gather(recipe, out, bandwidth=True)
    findings = judge(everyone)
    if dist.get_rank() == 0:
        show(everyone, findings)
    refuse(findings)


def show(everyone: Sequence[Facts], findings: Sequence[Finding]) -> None:
    """Prints what each rank has, what they share, and what is odd."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    names = ("rank", "host", "code", "recipe", "clock (s)", "free", "reduce", "exchange")
    for name in names:
        table.add_column(name, no_wrap=name != "host")
    for facts in everyone:
        rates = ["-" if rate is None else f"{rate / 1e9:.2f}" for rate in (facts.all_reduce, facts.all_to_all)]
        clock = f"{facts.clock:+.3f} ± {facts.clock_error:.3f}"
        hashes = facts.code[:8], facts.recipe[:8] or "-"
        table.add_row(str(facts.rank), facts.host, *hashes, clock, f"{facts.free / 1e9:.1f}", *rates)
    console = Console()
    # A log has no width of its own, and 80 columns would cut the hosts' names.
    Console(width=None if console.is_terminal else 120).print(table)
    print("free in GB; reduce and exchange: all-reduce and all-to-all through the rank's link, GB/s")
    print("first rank:", ", ".join(f"{name} {text}" for name, text in everyone[0].versions.items()))
    for finding in findings:
        print(finding)
    if not findings:
        print(f"{len(everyone)} rank{'s' if len(everyone) > 1 else ''}: nothing is odd")
