"""How the extension is built, and the library as it was built."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmoe.ops import LIBRARY, load_library

Build = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def build(root) -> Build:
    """``build(folder, VARIABLE=value)`` runs setup.py's build_ext into the folder."""

    def run(folder: Path, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "setup.py", "build_ext"]
        command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
        return subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def cuda_build() -> Path:
    """The operators' library, with its CUDA part: what `make build` makes where there is nvcc."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc in PATH")
    assert load_library()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mmoe::permute_index", "CUDA"), (
        f"{LIBRARY.name} was built without CUDA, but nvcc is in PATH: run make build"
    )
    return LIBRARY
