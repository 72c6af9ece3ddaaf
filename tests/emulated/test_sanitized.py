"""Every operator's CUDA kernels under AddressSanitizer and ThreadSanitizer: no report."""

from pathlib import Path

import cases
import pytest
from processes import run_python

from mmoe.ops.emulated import build

SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
import cases, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[2])
for name in sys.argv[3:]:
    print(name, flush=True)
    getattr(cases, name)(torch.ops.mmoe_emulated)
"""


def test_every_operator_has_a_case(operators):
    assert operators == [name for name in operators if hasattr(cases, name)]


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_silence(operators, variant):
    run = run_python(variant, SCRIPT, Path(cases.__file__).parent, build(variant), *operators)
    assert (run.returncode, run.stderr) == (0, ""), f"in {run.stdout.split()[-1:]}\n{run.stderr}"
    assert run.stdout.split() == operators
