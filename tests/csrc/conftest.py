"""One CUDA build for all tests of this folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
def cuda_build(build, tmp_path_factory) -> tuple[Path, str]:
    """The library built with CUDA, and what the compilers printed."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc in PATH")
    folder = tmp_path_factory.mktemp("cuda")
    run = build(folder, MMOE_BUILD_CUDA="1")
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "lib" / "mmoe" / "_C.so", run.stdout
