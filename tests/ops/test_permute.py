"""The permutation against a loop, its gradient and its edge cases; there and back is one test with unpermute."""

import pytest
import torch

from mmoe.ops.permute import permute
from mmoe.ops.unpermute import unpermute
from mmoe.reference import permute as reference

N = 4
CASES = {
    "mixed": [[0, 5], [3, 1], [4, 5], [1, 0], [1, 2]],
    "every token to one expert": [[2, 4]] * 6,
    "all zero experts": [[4, 5], [5, 4]],
    "one token": [[3, 0]],
    "no tokens": [],
}


def ids_of(case: str) -> torch.Tensor:
    return torch.tensor(CASES[case], dtype=torch.int64).reshape(-1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("permute", [permute, reference.permute])
def test_against_a_loop(permute, case):
    ids = ids_of(case)
    x = torch.randn(ids.shape[0], 3)
    out = permute(x, ids, N)
    slots = [(expert, slot) for slot, expert in enumerate(ids.flatten().tolist()) if expert < N]
    slots.sort()
    assert out.slot_of_row.tolist() == [slot for _, slot in slots]
    assert out.offsets.tolist() == [sum(expert < i for expert, _ in slots) for i in range(N + 1)]
    row_of_slot = [-1] * ids.numel()
    for row, (_, slot) in enumerate(slots):
        row_of_slot[slot] = row
        assert torch.equal(out.rows[row], x[slot // 2])
    assert out.row_of_slot.flatten().tolist() == row_of_slot
    assert out.rows.shape == (len(slots), 3)
    assert {out.row_of_slot.dtype, out.slot_of_row.dtype, out.offsets.dtype} == {torch.int32}


def test_zero_slots_never_enter():
    ids = ids_of("mixed")
    out = permute(torch.randn(5, 3), ids, N)
    assert len(out.rows) == int((ids < N).sum())
    assert torch.equal(out.row_of_slot == -1, ids >= N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_kept(dtype):
    assert permute(torch.randn(5, 3).to(dtype), ids_of("mixed"), N).rows.dtype == dtype


def test_gradient_is_the_sum_over_a_tokens_slots():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: permute(y, ids_of("mixed"), N).rows, (x,))
    permute(x, ids_of("mixed"), N).rows.sum().backward()
    assert x.grad[:, 0].tolist() == [1, 2, 0, 2, 2]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    ids = ids_of(case)
    x = torch.randn(ids.shape[0], 3, dtype=torch.float64)
    out = permute(x, ids, N)
    weights = torch.rand(ids.shape, dtype=torch.float64)
    identity = (weights * (ids >= N)).sum(1)
    assert torch.allclose(
        unpermute(out.rows, out.row_of_slot, weights, x, identity), weights.sum(1, keepdim=True) * x, atol=1e-14, rtol=0
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.zeros(5), torch.zeros(5, 2, dtype=torch.int64), N), "x"),
        ((torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64), N), "x"),
        ((torch.zeros(5, 3), torch.zeros(4, 2, dtype=torch.int64), N), "ids"),
        ((torch.zeros(5, 3), torch.zeros(5, 2), N), "ids"),
        ((torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64), 0), "experts"),
    ],
)
def test_errors_name_the_argument(arguments, named):
    with pytest.raises((ValueError, TypeError), match=named):
        permute(*arguments)
