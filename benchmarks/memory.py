"""What a training step holds beyond what every implementation must: inputs, weights, the result and all gradients.

Each side runs in a process of its own, where the kernel's record of the largest resident size (VmHWM) counts all that
was touched, by whichever allocator; the pool of :mod:`benchmarks.allocator` is not in it. glibc maps every tensor of
128 KiB or more by itself, so that a freed one is gone: by default it keeps freed ones up to 32 MiB, in holes that the
next tensors may or may not fit into, and tells more of the order of the frees than of what is held.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import allocator
from benchmarks.case import Case
from benchmarks.measure import Side, size_of
from benchmarks.operators import module

ROOT = Path(__file__).parents[1]


def extra_bytes(case: Case, side: str, *, quick: bool, threads: int) -> int:
    """Extra memory of one step of ``ours`` or of the peer ``side``, measured by this file as a program."""
    arguments = [case.operator, case.shape, case.dtype_name, side, str(threads), *(["quick"] if quick else [])]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    environment = allocator.system_environment() | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def measure(operator: str, shape: str, dtype: str, side: str, threads: str, *quick: str) -> int:
    torch.set_num_threads(int(threads))
    cases = {(case.shape, case.dtype_name): case for case in module(operator).cases(bool(quick))}
    # The first step loads libraries with workspaces of their own, so it is one of a tiny case.
    step(next(case for case in module(operator).cases(True) if case.dtype_name == dtype), side)
    return step(cases[shape, dtype], side)


def step(case: Case, name: str) -> int:
    """One forward and backward; the peak above what was there before, less the result and the gradients."""
    torch.manual_seed(0)
    workload = case.build()
    side: Side = workload.ours if name == "ours" else workload.peers[name]
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the record of the peak back to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    out = side.forward()
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    given = [torch.ones_like(part) for part in results]
    grads = torch.autograd.grad(results, side.inputs, given)
    return status("VmHWM") - before - size_of(results, given, grads)


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
