"""The CUDA kernels' own source, compiled for the CPU."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmoe.ops.emulated import load


@pytest.fixture(scope="session")
def emulated(need_emulator: None) -> Any:
    """``torch.ops.mmoe_emulated``."""
    return load()


@pytest.fixture(scope="session")
def operators(emulated: Any, root: Path) -> list[str]:
    """The operators, without their backwards, that have a CUDA implementation."""
    declared = re.findall(r'"(\w+)\(', (root / "csrc" / "bindings.cpp").read_text())
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in declared if not name.endswith("_backward") and has_kernel(f"mmoe_emulated::{name}", "CPU")]


@pytest.fixture(scope="session")
def need_emulator() -> None:
    """Skips where the emulator cannot be built; a source that does not compile is a failure, not a skip."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc in PATH: the emulated build needs CUDA's headers")
    if not Path("/usr/include/boost/context").is_dir():
        pytest.skip("no Boost.Context: install libboost-context-dev")
