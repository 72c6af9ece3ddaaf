"""permute and permute_fp8: the CUDA kernels on the emulator against the reference, which they equal bit for bit."""

import pytest
import torch
from ops import moving

from mmoe.reference import permute as reference
from mmoe.reference import permute_fp8 as reference_fp8

N, Z = 6, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Less than 16 bytes a row, a ragged one, one of several rounds of four pieces a thread.
WIDTHS = [1, 7, 24, 517]


def compare(emulated, x: torch.Tensor, ids: torch.Tensor, **rows: int) -> None:
    """Copies exactly; the gradient up to the rounding of k additions."""
    index = moving.permute_index(ids, N, **rows)
    got = emulated.permute(x, index.row_of_slot, index.slot_of_row)
    assert torch.equal(got, reference.gather(x, index.row_of_slot, index.slot_of_row))
    upstream = torch.randn(got.shape).to(x.dtype)
    grad = emulated.permute_backward(upstream, index.row_of_slot)
    exact = torch.zeros(x.shape, dtype=torch.float64, requires_grad=True)
    exact_rows = reference.gather(exact, index.row_of_slot, index.slot_of_row)
    grads = [
        torch.autograd.grad(exact_rows, exact, g, retain_graph=True)[0]
        for g in (upstream.double(), upstream.double().abs())
    ]
    moving.within(grad, *grads, ids.shape[1])


@pytest.mark.parametrize("rows", [{}, {"align": 8}, {"align": 8, "max_rows": 60}, {"max_rows": 5}], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(emulated, dtype, width, rows):
    compare(emulated, torch.randn(9, width).to(dtype), moving.draw_ids(9, 3, N, Z), **rows)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(0, 3, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.full((5, 3), N),
        torch.full((5, 3), 2),
        moving.draw_ids(3, 40, N, Z),  # more slots than a warp has lanes
    ],
    ids=["no tokens", "no slots", "zero experts", "one expert", "many slots"],
)
def test_edges(emulated, ids):
    compare(emulated, torch.randn(len(ids), 24), ids)
    compare(emulated, torch.randn(len(ids), 24), ids, align=8, max_rows=150)


def test_rows_off_the_vector_grid(emulated):
    compare(emulated, moving.shift(torch.randn(5, 24)), moving.draw_ids(5, 3, N, Z))
    compare(emulated, torch.randn(24, 5).t(), moving.draw_ids(5, 3, N, Z))


def test_a_row_outside_is_left_out(emulated):
    slot_of_row = torch.tensor([0, 1], dtype=torch.int32)
    rows = emulated.permute(torch.ones(1, 8), torch.tensor([[0, 1, 2]], dtype=torch.int32), slot_of_row)
    assert torch.equal(rows, torch.ones(2, 8))


def compare_fp8(emulated, x: torch.Tensor, ids: torch.Tensor, **rows: int) -> None:
    index = moving.permute_index(ids, N, **rows)
    got, scales = emulated.permute_fp8(x, index.row_of_slot, index.slot_of_row)
    wanted, wanted_scales = reference_fp8.permute_fp8(x, index.row_of_slot, index.slot_of_row)
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("rows", [{}, {"align": 8, "max_rows": 60}], ids=str)
@pytest.mark.parametrize("width", [128, 384, 4224])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_bit_for_bit(emulated, dtype, width, rows):
    """Magnitudes over eight orders, a block of zeros, one of numbers below every scale."""
    x = torch.randn(5, width) * torch.logspace(-4, 4, 5)[:, None]
    x[0, :128] = 0
    x[1, :128] = 2.0**-130
    compare_fp8(emulated, x.to(dtype), moving.draw_ids(5, 3, N, Z), **rows)


def test_fp8_of_every_bfloat16(emulated):
    """All finite ones, each in a block with those near it, so that every rounding and every scale is met."""
    finite = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = finite[finite.isfinite()].view(-1, 128)
    compare_fp8(emulated, finite, torch.zeros(len(finite), 1, dtype=torch.int64))


def test_fp8_off_the_vector_grid(emulated):
    compare_fp8(emulated, moving.shift(torch.randn(5, 256)), moving.draw_ids(5, 3, N, Z))
    compare_fp8(emulated, moving.shift(torch.randn(5, 256).bfloat16()), moving.draw_ids(5, 3, N, Z))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_of_what_is_not_finite(emulated, bad):
    x = torch.randn(2, 256)
    x[1, 130] = bad
    index = moving.permute_index(torch.tensor([[0], [0]]), N)
    rows, scales = emulated.permute_fp8(x, index.row_of_slot, index.slot_of_row)
    finite = (rows.float() * scales.repeat_interleave(128, 1)).isfinite()
    assert finite.view(4, 128).all(1).tolist() == [True, True, True, False]
    assert not finite[1, 128:].any()


@pytest.mark.parametrize("tokens", [0, 2])
def test_fp8_of_nothing(emulated, tokens):
    compare_fp8(emulated, torch.zeros(tokens, 128), torch.full((tokens, 2), N), max_rows=3)
