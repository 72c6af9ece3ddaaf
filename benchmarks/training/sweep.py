"""``mmoe bench step --sweep``: what a step costs over its tokens and over the number of zero experts at fixed K_e.

Every point is a process of its own, twice: for the time as it is, and for the memory with every tensor mapped by itself
(:mod:`benchmarks.memory`). Memory is the largest resident size during a step above what was resident before it:
activations and what comes and goes, not weights, gradients and moments, which are there before.
"""

import ctypes
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks import allocator
from benchmarks.measure import calls_of, repeat, timing
from benchmarks.memory import status
from benchmarks.training.ours import Ours, recipe

ROOT = Path(__file__).parents[2]
PACKS, PACKS_BESIDE = (1, 2, 4, 8, 16), 4
ZERO_EXPERTS, ZERO_EXPERTS_BESIDE = (16, 32, 64, 128, 256), 64
QUICK_PACKS, QUICK_ZERO_EXPERTS = (1, 2), (4, 8)
SEQUENCE = 256


@dataclass(frozen=True)
class Point:
    """``packs`` × SEQUENCE tokens a step, balanced so that K_e is met; memory in MiB."""

    packs: int
    zero_experts: int
    tokens: int
    active_experts: float
    seconds: float
    spread: float
    memory: float


def measure(what: str, packs: str, zero_experts: str, threads: str, steps: str, *quick: str) -> dict[str, float]:
    """One point's time or memory, in this process."""
    torch.set_num_threads(int(threads))
    length = 32 if quick else SEQUENCE
    ours = Ours(
        recipe(quick=bool(quick), packs=int(packs), sequence=length, zero_experts=int(zero_experts)), balanced=True
    )
    base = {"tokens": ours.tokens, "active_experts": ours.active_experts()}
    ours.step()
    if what == "memory":
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the record of the peak back to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        ours.step()
        return base | {"memory": (status("VmHWM") - before) / 2**20}
    run = repeat(ours.step)
    count = calls_of(run(1))
    took = timing([run(count) / count for _ in range(int(steps))])
    return base | {"seconds": took.seconds, "spread": took.spread}


def point(packs: int, zero_experts: int, *, quick: bool, threads: int, steps: int) -> Point:
    found: dict[str, float] = {}
    for what in ("time", "memory"):
        arguments = [what, str(packs), str(zero_experts), str(threads), str(steps), *(["quick"] if quick else [])]
        environment = allocator.system_environment()
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
        if what == "memory":
            environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
        command = [sys.executable, "-m", __spec__.name, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return Point(packs=packs, zero_experts=zero_experts, **found)  # type: ignore[arg-type]


def run(options: Namespace, console: Console) -> None:
    """Measures, prints, and writes step_sweep.json and step_sweep.png into ``options.out``."""
    if options.quick:
        packs, zeros, beside = QUICK_PACKS, QUICK_ZERO_EXPERTS, (QUICK_PACKS[-1], QUICK_ZERO_EXPERTS[0])
    else:
        packs, zeros, beside = PACKS, ZERO_EXPERTS, (PACKS_BESIDE, ZERO_EXPERTS_BESIDE)
    sizes = list(dict.fromkeys([*((count, beside[1]) for count in packs), *((beside[0], count) for count in zeros)]))
    progress = Console(stderr=True)
    found: dict[tuple[int, int], Point] = {}
    for size in sizes:
        with progress.status(f"{size[0]} packs, {size[1]} zero experts"):
            found[size] = point(*size, quick=options.quick, threads=options.threads, steps=3 if options.quick else 9)
    tokens, kinds = [found[count, beside[1]] for count in packs], [found[beside[0], count] for count in zeros]
    summary = {
        "tokens": _linear([p.tokens for p in tokens], tokens),
        "zero_experts": _flat(kinds),
    }
    for title, points in (("tokens", tokens), ("zero experts", kinds)):
        for p in points:
            console.print(
                f"{p.tokens} tokens, {p.zero_experts} zero experts, K {p.active_experts:.2f}: "
                f"{p.seconds * 1e3:.1f} ms (± {50 * p.spread:.0f}%), {p.memory:.1f} MiB",
                highlight=False,
            )
        console.print(f"{title}: {summary[title.replace(' ', '_')]}", highlight=False)
    record = {"summary": summary, "tokens": [asdict(p) for p in tokens], "zero_experts": [asdict(p) for p in kinds]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step_sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(tokens, kinds, options.out / "step_sweep.png")
    console.print(f"written: {options.out}/step_sweep.json, step_sweep.png", highlight=False)


def _linear(x: Sequence[float], points: Sequence[Point]) -> dict[str, float]:
    """Least squares, fixed + per_token · x, and the largest distance from that line as a fraction of it."""
    out = {}
    for name in ("seconds", "memory"):
        y = np.array([getattr(p, name) for p in points])
        slope, fixed = np.polyfit(np.array(x, dtype=float), y, 1)
        line = fixed + slope * np.array(x)
        out |= {
            f"{name}_per_token": float(slope),
            f"{name}_fixed": float(fixed),
            f"{name}_worst_deviation": float(np.max(np.abs(y - line) / line)),
        }
    return out


def _flat(points: Sequence[Point]) -> dict[str, float]:
    """The largest value over the smallest, less 1."""
    return {
        name: max(getattr(p, name) for p in points) / min(getattr(p, name) for p in points) - 1
        for name in ("seconds", "memory")
    }


def draw(tokens: Sequence[Point], kinds: Sequence[Point], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mmoe.evaluate.figures import BLUE, MUTED, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2)
        panels = (("tokens", "tokens a step", tokens), ("zero_experts", "zero experts", kinds))
        for row, (quantity, unit, scale) in enumerate((("seconds", "ms a step", 1e3), ("memory", "MiB a step", 1.0))):
            for column, (field, label, points) in enumerate(panels):
                axes = grid[row][column]
                x = np.array([getattr(p, field) for p in points], dtype=float)
                y = np.array([getattr(p, quantity) for p in points]) * scale
                fit = np.polyfit(x, y, 1) if field == "tokens" else np.array([0.0, y.mean()])
                axes.plot([0, x.max()], np.polyval(fit, [0, x.max()]), color=MUTED, linewidth=0.8)
                axes.plot(x, y, "o", color=BLUE, markersize=5)
                axes.set_xlim(0, None)
                axes.set_ylim(0, 1.1 * y.max())
                axes.set_xlabel(label)
                axes.set_title(f"{unit} over {label}" + (", K_e fixed" if field == "zero_experts" else ""))
        figure.savefig(path, dpi=130)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
