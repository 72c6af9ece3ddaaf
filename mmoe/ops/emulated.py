"""The CUDA implementations on the CPU: built from the checkout, loaded as ``torch.ops.mmoe_emulated``."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmoe.errors import UserError

CHECKOUT = Path(__file__).parents[2]


@functools.cache
def build(variant: str = "plain", *sources: str) -> Path:
    """Compile CUDA sources against the emulator, where they changed; the library's path.

    Args:
        variant: ``plain``; ``asan`` and ``tsan`` need the sanitizer's runtime preloaded in the process that loads them.
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
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        raise UserError(
            f"the emulated operators were not built: {errors[0] if errors else done.stderr[-200:]}",
            "",
            "install nvcc 13 and libboost-context-dev, or mend the source",
        )
    name = Path(sources[0]).stem if sources else "mmoe_emulated"
    return CHECKOUT / "build" / "emulated" / variant / f"{name}.so"


@functools.cache
def load() -> Any:
    """``torch.ops.mmoe_emulated``: the operators' schemas, on CPU tensors, run by the CUDA kernels' source."""
    torch.ops.load_library(build())
    return torch.ops.mmoe_emulated
