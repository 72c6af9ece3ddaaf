"""The quantising permutation: the reference by hand and by its error; its gradient. The kernel: tests/emulated."""

import pytest
import torch
from ops import moving

from mmoe.ops.permute import permute
from mmoe.ops.permute_fp8 import permute_fp8
from mmoe.reference import permute_fp8 as reference

pytestmark = pytest.mark.filterwarnings("ignore:mmoe. permute_fp8 runs as PyTorch reference on cpu:RuntimeWarning")
N, Z = 6, 3


def test_quantize_by_hand():
    x = torch.zeros(1, 512)
    x[0, :3] = torch.tensor([448.0, 1.0, -17.0])  # scale 1; 17 lies between 16 and 18 and goes to the even one
    x[0, 128:130] = torch.tensor([-7.0, 3.5])  # scale 2⁻⁶: -448 and 224
    x[0, 256] = 2.0**-130  # too small for a scale that is a normal number
    rows, scales = reference.quantize(x)
    assert scales.tolist() == [[1.0, 2.0**-6, 1.0, 1.0]]
    assert rows.dtype == torch.float8_e4m3fn
    assert rows.float()[0, [0, 1, 2, 128, 129, 256, 511]].tolist() == [448, 1, -16, -448, 224, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_a_number(dtype):
    """Half a unit in the last of 4 bits, or half the smallest subnormal 2⁻⁹ of the scale."""
    x = (torch.randn(30, 256) * torch.logspace(-4, 4, 30)[:, None]).to(dtype)
    rows, scales = reference.quantize(x)
    size = scales.repeat_interleave(128, 1)
    error = (rows.float() * size - x.float()).abs()
    assert (error <= x.float().abs() * (2.0**-4 + 1e-6) + size * 2.0**-10).all()


def test_rows_are_the_quantised_tokens():
    x, ids = torch.randn(7, 256), moving.draw_ids(7, 3, N, Z)
    out, plain = permute_fp8(x, ids, N, align=8), permute(x, ids, N, align=8)
    for name in ("row_of_slot", "slot_of_row", "offsets"):
        assert torch.equal(getattr(out, name), getattr(plain, name))
    wanted, scales = reference.quantize(plain.rows)
    assert torch.equal(out.rows.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(out.scales, scales)
    assert (scales[out.slot_of_row < 0] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    x = torch.randn(2, 256)
    x[1, 130] = bad
    rows, scales = reference.quantize(x)
    finite = (rows.float() * scales.repeat_interleave(128, 1)).isfinite()
    assert finite[0].all()
    assert finite[1, :128].all()
    assert not finite[1, 128:].any()


def test_gradient_passes_straight_through():
    x, ids = torch.randn(7, 256, requires_grad=True), moving.draw_ids(7, 3, N, Z)
    out, plain = permute_fp8(x, ids, N), permute(x, ids, N)
    assert not out.rows.requires_grad
    assert out.straight_through.shape == out.rows.shape
    assert out.straight_through.untyped_storage().nbytes() == 4
    upstream = torch.randn(plain.rows.shape)
    grads = [torch.autograd.grad(rows, x, upstream)[0] for rows in (out.straight_through, plain.rows)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 256), (5, 0)])
def test_empty(shape):
    out = permute_fp8(torch.zeros(shape), moving.draw_ids(shape[0], 3, N, Z), N, max_rows=9)
    assert out.rows.shape == (9, shape[1])
    assert out.scales.shape == (9, shape[1] // 128)


@pytest.mark.parametrize(
    ("x", "error"), [(torch.zeros(5, 100), ValueError), (torch.zeros(5, 128, dtype=torch.float64), TypeError)]
)
def test_errors_name_the_argument(x, error):
    with pytest.raises(error, match="x "):
        permute_fp8(x, moving.draw_ids(5, 3, N, Z), N)
