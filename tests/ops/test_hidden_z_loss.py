"""hidden_z_loss: the reference against the equation, the CPU kernel against the reference in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import threads

from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.reference import hidden_z_loss as reference

COEFFICIENT = 0.5
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def draw(tokens: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_reference_is_the_equation():
    z = draw(4, 6)
    valid = torch.tensor([True, False, True, True])
    rows = [math.log(sum(math.exp(abs(v)) for v in row)) ** 2 for row in z[valid].tolist()]
    wanted = COEFFICIENT * sum(rows) / 3
    assert reference.hidden_z_loss(z, COEFFICIENT, valid).item() == pytest.approx(wanted, rel=1e-14)


def compare(z: torch.Tensor, valid: torch.Tensor | None) -> None:
    """Loss and gradient of the kernel against the float64 reference on the same values."""
    z = z.detach().requires_grad_()
    loss = hidden_z_loss(z, COEFFICIENT, valid=valid)
    (grad,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    wanted = reference.hidden_z_loss(exact, COEFFICIENT, valid)
    (wanted_grad,) = torch.autograd.grad(wanted, exact)
    arithmetic = 1e-14 if z.dtype == torch.float64 else 4e-6
    rounding = 0 if z.dtype == torch.float64 else torch.finfo(z.dtype).eps / 2
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=arithmetic, atol=0)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=arithmetic + rounding, atol=torch.finfo(z.dtype).tiny)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(0, 9), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES), masked=st.booleans())
def test_against_float64(tokens, width, dtype, masked):
    valid = torch.arange(tokens) % 3 != 1 if masked else None
    compare(draw(tokens, width, dtype, seed=width), valid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_shifted(dtype):
    compare(draw(33, 40, dtype).t(), None)
    compare(draw(1, 33 * 40 + 1, dtype).flatten()[1:].view(33, 40), None)


def test_gradcheck():
    z = draw(5, 19).requires_grad_()
    valid = torch.tensor([True, True, False, True, True])
    for function in (hidden_z_loss, reference.hidden_z_loss):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, COEFFICIENT, valid=valid), z)


def test_opcheck():
    z = draw(5, 7, torch.float32).requires_grad_()
    results = torch.library.opcheck(torch.ops.mmoe.hidden_z_loss.default, (z, torch.ones(5, dtype=torch.bool), 0.5))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad):
    z = torch.ones(4, 40)
    z[2, 39] = bad
    assert not hidden_z_loss(z, 1.0).isfinite()
    assert hidden_z_loss(z, 1.0, valid=torch.tensor([True, True, False, True])).isfinite()


def test_padding_of_nan_takes_no_gradient():
    z = torch.full((2, 5), float("nan"))
    z[0] = 1.0
    z.requires_grad_()
    hidden_z_loss(z, 1.0, valid=torch.tensor([True, False])).backward()
    assert z.grad[0].isfinite().all()
    assert not z.grad[1].any()


def test_any_number_of_threads_gives_the_same_bits():
    z = draw(300, 2000, torch.float32)

    def run():
        leaf = z.clone().requires_grad_()
        loss = hidden_z_loss(leaf, 1.0)
        loss.backward()
        return loss.detach(), leaf.grad

    threads.check_bits(run)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, root):
    """Whatever this machine has beyond it is lowered to ``isa``; the numbers stay within fp32's rounding."""
    script = """
import torch
from mmoe.ops.hidden_z_loss import hidden_z_loss
z = (3 * torch.randn(6, 1003, generator=torch.Generator().manual_seed(1))).requires_grad_()
loss = hidden_z_loss(z, 0.5)
loss.backward()
print(loss.item(), z.grad.square().sum().item())
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env=os.environ | {"MMOE_SIMD": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    z = (3 * torch.randn(6, 1003, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    loss = reference.hidden_z_loss(z, 0.5)
    loss.backward()
    got = [float(word) for word in run.stdout.split()]
    assert got == pytest.approx([loss.item(), z.grad.square().sum().item()], rel=4e-6)


def test_unknown_instruction_set_is_named(root):
    script = "import torch; from mmoe.ops.hidden_z_loss import hidden_z_loss; hidden_z_loss(torch.ones(1, 1), 1.0)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ | {"MMOE_SIMD": "sse"}, capture_output=True, text=True
    )
    assert "MMOE_SIMD=sse: must be generic, avx2, avx512 or avx512_bf16" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"z": torch.ones(3)}, ValueError, "z has shape"),
        ({"z": torch.ones(3, 0)}, ValueError, "at least one column"),
        ({"z": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "z is"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, ValueError, "valid has shape"),
        ({"valid": torch.ones(3)}, TypeError, "valid is"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        hidden_z_loss(**({"z": torch.ones(3, 2), "coefficient": 1.0} | arguments))
