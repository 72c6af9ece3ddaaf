"""The CUDA kernels' own source, compiled for the CPU."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmoe.ops.emulated import load


@pytest.fixture(scope="session")
def emulated(need_emulator: None) -> Any:
    """``torch.ops.mmoe_emulated``."""
    return load()


@pytest.fixture(scope="session")
def need_emulator() -> None:
    """Skips where the emulator cannot be built; a source that does not compile is a failure, not a skip."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc in PATH: the emulated build needs CUDA's headers")
    if not Path("/usr/include/boost/context").is_dir():
        pytest.skip("no Boost.Context: install libboost-context-dev")
