"""The CUDA implementations on the CPU: built from the checkout, loaded as ``torch.ops.mmoe_emulated``.

:func:`count` runs a second build of them, which counts memory traffic as a profiler does.
"""

import ctypes
import fcntl
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmoe.errors import UserError

CHECKOUT = Path(__file__).parents[2]


@functools.cache
def build(variant: str = "plain", *sources: str) -> Path:
    """Compile CUDA sources against the emulator, where they changed; the library's path.

    Args:
        variant: ``plain``; ``counted`` for :func:`count`; ``asan`` and ``tsan`` need the sanitizer's runtime preloaded
            in the process that loads them.
        sources: files of the checkout; none means the operators'.

    Raises:
        UserError: no checkout, no CUDA headers, no Boost.Context, or a source that does not compile.
    """
    script = CHECKOUT / "setup.py"
    if not (CHECKOUT / "csrc" / "emulator").is_dir():
        raise UserError("the emulated operators are built from source", "", "run this from a checkout of mmoe")
    command = [sys.executable, script, "build_emulated", f"--variant={variant}"]
    if sources:
        command.append(f"--sources={','.join(sources)}")
    folder = CHECKOUT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes would write the same objects
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()
        errors = [line for line in said if " error: " in line or "undefined reference" in line]
        raise UserError(
            f"the emulated operators were not built: {errors[0] if errors else done.stderr[-200:]}",
            "",
            "install nvcc 13 and libboost-context-dev, or mend the source",
        )
    name = Path(sources[0]).stem if sources else "mmoe_emulated"
    return folder / variant / f"{name}.so"


@functools.cache
def load() -> Any:
    """``torch.ops.mmoe_emulated``: the operators' schemas, on CPU tensors, run by the CUDA kernels' source."""
    torch.ops.load_library(build())
    return torch.ops.mmoe_emulated


class Counters(NamedTuple):
    """What all launches of a kernel did; the unit is an access of a warp, which is up to 32 threads'."""

    launches: int
    blocks: int
    load_bytes: int
    """Distinct bytes of every load from global memory; a byte that two warps load counts twice."""
    load_sectors: int
    """Sectors of 32 bytes that the loads touch: what the memory moves."""
    ideal_load_sectors: int
    """Sectors that the loads would touch if each one's bytes lay together."""
    store_bytes: int
    store_sectors: int
    ideal_store_sectors: int
    shared_accesses: int
    bank_conflicts: int
    """Extra passes over shared memory, because lanes need different words of a bank."""
    barriers: int
    """Of a block, each time one completes."""
    atomics: int
    """Of a thread, on either memory; not among the loads and stores."""

    @property
    def bytes(self) -> int:
        return self.load_bytes + self.store_bytes

    @property
    def sector_ratio(self) -> float:
        """Sectors over ideal ones, 1 for a kernel that touches no global memory."""
        ideal = self.ideal_load_sectors + self.ideal_store_sectors
        return (self.load_sectors + self.store_sectors) / ideal if ideal else 1.0


def counters(library: ctypes.CDLL) -> dict[str, Counters]:
    """What a ``counted`` library's kernels did since they were last asked, by kernel; forgotten then."""
    library.mmoe_counters.restype = ctypes.c_char_p
    found = json.loads(library.mmoe_counters())
    library.mmoe_reset_counters()
    return {kernel: Counters(**numbers) for kernel, numbers in found.items()}


def count(run: Callable[[Any], object]) -> dict[str, Counters]:
    """The memory traffic of the kernels that ``run(operators)`` launches, by kernel.

    Args:
        run: is given ``torch.ops.mmoe_counted``, the operators as in :func:`load`, and calls them on CPU tensors.
    """
    library = _load_counted()
    counters(library)
    run(torch.ops.mmoe_counted)
    return counters(library)


@functools.cache
def _load_counted() -> ctypes.CDLL:
    path = build("counted")
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))
