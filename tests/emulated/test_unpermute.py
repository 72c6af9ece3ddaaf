"""unpermute: the CUDA kernels on the emulator against the reference in float64."""

import pytest
import torch
from ops import moving

N, Z = 6, 3
# Less than 16 bytes a row, a ragged one, several warps, and several rounds over a row in fp32.
WIDTHS = [1, 7, 24, 517, 4104]


def compare(emulated, case: moving.Case, padded: bool = False) -> None:
    slot_of_row = case.slot_of_row if padded else None
    arguments = *case[:5], slot_of_row
    out, grads = emulated.unpermute(*arguments), emulated.unpermute_backward(case.grad_out, *arguments)
    moving.check_forward(out, case)
    moving.check_backward(grads, case)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(emulated, dtype, width):
    compare(emulated, moving.draw(moving.draw_ids(5, 3, N, Z), N, width, dtype))
    compare(emulated, moving.draw(moving.draw_ids(5, 3, N, Z), N, width, dtype, align=8, max_rows=70), padded=True)


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
    compare(emulated, moving.draw(ids, N, 24, torch.float32))
    compare(emulated, moving.draw(ids, N, 24, torch.float32, align=8, max_rows=150), padded=True)


def test_rows_off_the_vector_grid(emulated):
    case = moving.draw(moving.draw_ids(5, 3, N, Z), N, 24, torch.float32)
    compare(emulated, moving.Case(*(moving.shift(part) if part.is_floating_point() else part for part in case)))
    compare(emulated, moving.Case(*(part.t().contiguous().t() if part.ndim == 2 else part for part in case)))


def test_what_is_not_finite_stays_with_its_token(emulated):
    ids = torch.tensor([[0, 1], [0, N], [2, N]])
    case = moving.draw(ids, N, 40, torch.float32, align=4)
    case.rows[case.row_of_slot[0, 0]] = float("nan")
    case.rows[case.slot_of_row < 0] = float("nan")
    case.weights[1, 1] = float("nan")  # of a zero slot, which nothing uses
    arguments = *case[:5], case.slot_of_row
    assert emulated.unpermute(*arguments).isfinite().all(1).tolist() == [False, True, True]
    grad_rows, grad_weights, grad_x, grad_identity = emulated.unpermute_backward(case.grad_out, *arguments)
    assert grad_weights.isfinite().tolist() == [[False, True], [True, True], [True, True]]
    assert all(grad.isfinite().all() for grad in (grad_rows, grad_x, grad_identity))
    assert not grad_rows[case.slot_of_row < 0].any()


def test_a_row_outside_adds_nothing(emulated):
    case = moving.draw(moving.draw_ids(5, 3, N, Z), N, 24, torch.float32)
    outside = case.row_of_slot.where(case.row_of_slot >= 0, len(case.rows))
    arguments = case.weights, case.x, case.identity, None
    got = emulated.unpermute(case.rows, outside, *arguments)
    assert torch.equal(got, emulated.unpermute(case.rows, case.row_of_slot, *arguments))
