"""The vector functions of csrc/common/simd.h, through the operators that show them."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_exp_is_within_two_units_in_the_last_place(isa, root):
    """hidden_z_loss_backward gives lse · exp(|z| - lse): exact but for exp at lse = 128 and z on a grid of 2^-12."""
    script = """
import torch, mmoe.ops
assert mmoe.ops.load_library()
x = torch.arange(-87 * 4096, 83 * 4096, dtype=torch.float64) / 4096
one = torch.ones(())
z = (x + 128).float()[None]
got = torch.ops.mmoe.hidden_z_loss_backward(one, z, torch.full((1,), 128.0), one, 0.5)[0].double() / 128
wanted = x.exp()
unit = torch.exp2(torch.floor(torch.log2(wanted)) - 23)
print(((got - wanted).abs() / unit).max().item())

z = torch.tensor([[float("nan"), float("inf"), 128.0 + 89, 128.0 - 87.5, 0.5]])
print(*torch.ops.mmoe.hidden_z_loss_backward(one, z, torch.full((1,), 128.0), one, 0.5)[0].tolist())
"""
    environment = os.environ | {"MMOE_SIMD": isa}
    run = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    largest, special = run.stdout.splitlines()
    assert float(largest) <= 2.0
    assert special == "nan inf inf 0.0 0.0"
