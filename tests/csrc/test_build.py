"""The extension as setup.py builds it: the CUDA part compiled where there is nvcc, and one OpenMP runtime."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_cuda_build_loads_without_a_driver(cuda_build):
    script = f"""
import torch
torch.ops.load_library({str(cuda_build)!r})
has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key("mmoe::permute_index", key)
print(has("CPU"), has("CUDA"), torch.ops.mmoe.permute_index(torch.tensor([[1, 0]]), 2)[1].tolist())
"""
    assert run_python(script, CUDA_VISIBLE_DEVICES="").split("\n")[0] == "True True [1, 0]"


def test_cuda_without_compiler_is_refused(build, tmp_path):
    run = build(tmp_path, MMOE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0
    assert "MMOE_BUILD_CUDA=1, but there is no nvcc" in run.stderr


def test_unknown_build_mode_is_refused(build, tmp_path):
    run = build(tmp_path, MMOE_BUILD_CUDA="yes")
    assert run.returncode != 0
    assert "MMOE_BUILD_CUDA=yes: must be auto, 0 or 1" in run.stderr


@pytest.mark.latest
def test_one_openmp_runtime(root):
    script = """
import json, re, torch, mmoe.ops, mmoe._host, nvidia.dali
from mmoe.ops.permute_index import permute_index
permute_index(torch.zeros(50000, 4, dtype=torch.int64), 2)
maps = open("/proc/self/maps").read().split()
print(json.dumps(sorted({path for path in maps if re.search(r"/lib(gomp|omp|iomp5)[^/]*$", path)})))
"""
    (runtime,) = json.loads(run_python(script, cwd=root))
    assert "/torch" in runtime


def run_python(script: str, cwd: Path | None = None, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
