"""How much of a step two expert-parallel ranks spend waiting for each other, with ScMoE's overlap and without.

Exposed is the time that a rank's threads are blocked in a collective, or in the wait for one, over the step's time,
mean of the ranks: in the all-to-alls, and in all collectives. Both sides are trained in turn in the same processes. A
second pair has a slow link: an all-to-all is not done before its bytes could have passed at a rate at which those of a
step take a third of the undisturbed step; both sides alike, whoever waits for it and when.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import allocator
from benchmarks.measure import QUICK, Effort, timing
from benchmarks.report import Row
from benchmarks.training.ours import Ours, recipe
from mmoe.parallel import calls, engine
from mmoe.recipe.schema import Parallel

ROOT = Path(__file__).parents[2]
RANKS = 2
LINK_SHARE = 1 / 3


class SlowLink:
    """Stands in for ``torch.distributed.all_to_all_single``; ``rate`` in bytes/s, None for as fast as it goes."""

    def __init__(self) -> None:
        self.plain = dist.all_to_all_single
        self.rate: float | None = None
        self.free = self.slept = 0.0
        self.bytes = 0

    def __call__(self, output: Any, source: Any, *sizes: Any, async_op: bool = False, **options: Any) -> Any:
        self.bytes += source.nbytes
        work = self.plain(output, source, *sizes, async_op=True, **options)
        if self.rate is not None:
            self.free = max(self.free, time.perf_counter()) + source.nbytes / self.rate
        late = _Late(self, work, self.free)
        return late if async_op else late.wait()


class _Late:
    def __init__(self, link: SlowLink, work: Any, due: float) -> None:
        self.link, self.work, self.due = link, work, due

    def wait(self) -> None:
        self.work.wait()
        rest = self.due - time.perf_counter()
        if rest > 0:
            time.sleep(rest)
            self.link.slept += rest


class Side:
    """One of the two sides, and what its steps took."""

    def __init__(self, link: SlowLink, *, quick: bool, dtype: str, overlap: bool) -> None:
        layout = Parallel(expert=RANKS, overlap_moe=overlap)
        self.ours = Ours(recipe(quick=quick, dtype=dtype, packs=2, parallel=layout), balanced=True)
        self.link = link
        self.seconds: list[float] = []
        self.waits: defaultdict[str, list[float]] = defaultdict(list)

    def step(self) -> None:
        before, slept = calls.seconds_waited(), self.link.slept
        start = time.perf_counter()
        self.ours.step()
        self.seconds.append(time.perf_counter() - start)
        after = calls.seconds_waited()
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
        to_all = spent.get("all_to_all_single", 0.0) + self.link.slept - slept
        self.waits["all-to-all"].append(to_all / self.seconds[-1])
        rest = sum(seconds for name, seconds in spent.items() if name != "all_to_all_single")
        self.waits["all"].append((to_all + rest) / self.seconds[-1])

    def forget(self) -> None:
        self.seconds.clear()
        self.waits.clear()


def worker(dtype: str, threads: str, *quick: str) -> None:
    """One rank; the first prints a JSON list of [link, overlap, seconds, {kind: exposed fraction}]."""
    torch.set_num_threads(int(threads))
    link = SlowLink()
    setattr(dist, "all_to_all_single", link)
    effort = QUICK if quick else Effort()
    sides = {overlap: Side(link, quick=bool(quick), dtype=dtype, overlap=overlap) for overlap in (True, False)}
    found = []
    for name in ("fast link", "slow link"):
        for side in sides.values():
            side.step()
            side.forget()
        begin, again = time.perf_counter(), True
        while again:
            for side in sides.values():
                side.step()
            enough = effort.satisfied(len(sides[True].seconds), time.perf_counter() - begin)
            again = engine.from_first(not enough)
        for overlap, side in sides.items():
            exposed = {kind: timing(values).seconds for kind, values in side.waits.items()}
            ranks = engine.gather((timing(side.seconds).seconds, exposed))
            mean = {kind: sum(waits[kind] for _, waits in ranks) / len(ranks) for kind in exposed}
            found.append((name, overlap, max(seconds for seconds, _ in ranks), mean))
        sent, link.bytes = link.bytes, 0
        sides[False].step()
        per_step, link.bytes = link.bytes, sent
        plain = next(seconds for _, overlap, seconds, _ in found if not overlap)
        link.rate = engine.from_first(per_step / (LINK_SHARE * plain))
    if dist.get_rank() == 0:
        print(json.dumps(found))


def rows(dtype: str, *, quick: bool, threads: int) -> list[Row]:
    """Runs the ranks, ``threads`` over them, and reads what they found.

    Raises:
        RuntimeError: a rank failed.
    """
    each = max(1, threads // RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", __spec__.name]
    command = [sys.executable, *launch, dtype, str(each), *(["quick"] if quick else [])]
    environment = allocator.system_environment() | {"OMP_NUM_THREADS": str(each)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the ranks failed: {done.stderr.strip()}")
    found = {
        (name, overlap): (seconds, waits) for name, overlap, seconds, waits in json.loads(done.stdout.splitlines()[-1])
    }
    out = []
    for name in ("fast link", "slow link"):
        (seconds, exposed), (plain_seconds, plain) = found[name, True], found[name, False]
        time_ratio = plain_seconds / seconds
        shape = f"EP {RANKS}, {name}"
        out.append(
            Row("overlap.step", shape, dtype, seconds * 1e3, plain_seconds * 1e3, "no overlap", ratio=time_ratio)
        )
        for kind in plain:
            ours, theirs = 100 * exposed[kind], 100 * plain[kind]
            row = Row(f"overlap.exposed {kind}", shape, dtype, ours, theirs, "no overlap", unit="% of step")
            row.ratio = theirs / max(ours, 1e-3)
            out.append(row)
    return out


if __name__ == "__main__":
    worker(*sys.argv[1:])
