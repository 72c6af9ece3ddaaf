"""Run by `make test-cuda-build`: a CUDA build of torch loads the operators, on both devices' dispatch keys."""

import re
from pathlib import Path

import torch

import mmoe.ops

assert torch.version.cuda, f"torch {torch.__version__} is no CUDA build"
assert mmoe.ops.load_library(), mmoe.ops.LIBRARY
# Its CPU side is the PyTorch reference.
CUDA_ONLY = {"permute_fp8"}
declared = re.findall(r'"(\w+)\(', (Path(__file__).parents[2] / "csrc" / "bindings.cpp").read_text())
for name in declared:
    for key in ("CUDA",) if name in CUDA_ONLY else ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mmoe::{name}", key), f"{name} has no {key} kernel"
print(f"{len(declared)} operators on CPU and CUDA from {mmoe.ops.LIBRARY}, torch {torch.__version__}")
