"""Every operator's CUDA kernels under AddressSanitizer and ThreadSanitizer: no report."""

import re
from pathlib import Path

import cases
import pytest
import torch
from processes import run_python

from mmoe.ops.emulated import build

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import cases, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[2])
for name in sys.argv[3:]:
    print(name, flush=True)
    getattr(cases, name)(torch.ops.mmoe_emulated)
"""


def operators(emulated, root) -> list[str]:
    """The operators, without their backwards, that have a CUDA implementation."""
    declared = re.findall(r'"(\w+)\(', (root / "csrc" / "bindings.cpp").read_text())
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in declared if not name.endswith("_backward") and has_kernel(f"mmoe_emulated::{name}", "CPU")]


def test_every_operator_has_a_case(emulated, root):
    assert operators(emulated, root) == [name for name in operators(emulated, root) if hasattr(cases, name)]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_silence(emulated, root, variant):
    names = operators(emulated, root)
    run = run_python(variant, SCRIPT, Path(cases.__file__).parent, build(variant), *names)
    assert (run.returncode, run.stderr) == (0, ""), f"in {run.stdout.split()[-1:]}\n{run.stderr}"
    assert run.stdout.split() == names
