"""Run by test_watchdog.py on two ranks of one machine, whose stderr is the file LOG: one kind of stall after another.

A stall ends once the watchdog's line stands in LOG, so that the collective behind it completes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mmoe.parallel import calls, watchdog

LIMIT = 2.0
LOG = Path(sys.argv[1])
rank = int(os.environ["RANK"])


def told() -> None:
    """Returns once there is one line more than at the scenario's start."""
    before = LOG.read_text().count("watchdog:")
    for _ in range(400):
        if LOG.read_text().count("watchdog:") > before:
            return
        time.sleep(0.05)
    raise AssertionError("the watchdog says nothing")


def never_enters() -> None:
    group = dist.new_group([0, 1], group_desc="experts")
    x = torch.zeros(4, 3)
    dist.all_reduce(x, group=group)
    if rank == 1:
        told()
    dist.all_to_all_single(torch.empty_like(x), x, group=group)


def never_enters_before_wait() -> None:
    if rank == 0:
        told()
    work = dist.all_reduce(torch.zeros(2), async_op=True)
    assert work is not None
    work.wait()


def different_collectives() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4 * LIMIT), group_desc="confused")
    x = torch.zeros(4)
    try:
        if rank == 0:
            dist.all_reduce(x, group=group)
        else:
            dist.all_to_all_single(torch.empty_like(x), x, group=group)
    except RuntimeError:
        return
    raise AssertionError("two different collectives completed")


def nothing_sent() -> None:
    if rank == 0:
        told()
        dist.send(torch.ones(3), dst=1)
    else:
        dist.recv(torch.empty(3), src=0)


def batch_not_sent() -> None:
    if rank == 1:
        told()
    other = 1 - rank
    x, y = torch.ones(3), torch.empty(3)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, y, other)])
    for work in works:
        work.wait()


def stop_until(line: str) -> None:
    """This process, until the watchdog has said it of whomever."""
    wait = f"for i in $(seq 200); do grep -q '{line}' {LOG} && break; sleep 0.1; done"
    subprocess.Popen(["sh", "-c", f"{wait}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def stopped() -> None:
    if rank == 1:
        stop_until("stopped or dead: not heard of")
    dist.barrier()


def stopped_with_the_store() -> None:
    if rank == 0:
        stop_until("store does not answer")
    dist.barrier()


def standing_still() -> None:
    """As on CUDA: the call returns at once, and the rank stands still at a later line."""
    watchdog.stop()
    watchdog.start(LIMIT, blocking=False)
    work = None
    if rank == 0:
        work = dist.all_reduce(torch.zeros(2), async_op=True)
        subprocess.run(
            ["sh", "-c", f"for i in $(seq 200); do tail -n 1 {LOG} | grep -q '^==' || break; sleep 0.1; done"]
        )
    else:
        told()
        work = dist.all_reduce(torch.zeros(2), async_op=True)
    assert work is not None
    work.wait()
    watchdog.stop()
    watchdog.start(LIMIT, blocking=True)


def healthy() -> None:
    """Longer than the limit, but no wait is: compute, calls one after another, one that nobody waits for yet."""
    x = torch.zeros(8)
    late = dist.all_reduce(torch.zeros(1), async_op=True)
    for _ in range(6):
        dist.all_to_all_single(torch.empty_like(x), x)
        time.sleep(LIMIT / 3)
    assert late is not None
    late.wait()


def saving() -> None:
    with calls.phase("saving a checkpoint"):
        if rank == 0:
            time.sleep(1.5 * LIMIT)
        dist.barrier()


SCENARIOS: list[Callable[[], None]] = [
    healthy,
    never_enters,
    never_enters_before_wait,
    nothing_sent,
    batch_not_sent,
    stopped,
    stopped_with_the_store,
    saving,
    standing_still,
    different_collectives,
]


def main() -> None:
    torch.set_num_threads(1)
    calls.install()
    dist.init_process_group("gloo")
    watchdog.start(LIMIT, blocking=True)
    for scenario in SCENARIOS:
        dist.barrier()
        if rank == 0:
            print(f"== {scenario.__name__}", file=sys.stderr, flush=True)
        dist.barrier()
        scenario()
        dist.barrier()
        # The next stall is another one once the watchdog has seen that this one is over.
        time.sleep(LIMIT / 2)
    watchdog.stop()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
