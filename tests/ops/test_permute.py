"""The permutation against a loop, its gradient and its edge cases; there and back is one test with unpermute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import moving, threads

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


def compare(ids: torch.Tensor, experts: int, width: int, dtype: torch.dtype, **rows: int | None) -> None:
    """Rows equal the reference's; the gradient is the float64 sum up to the rounding of k additions."""
    x = torch.randn(len(ids), width, dtype=torch.float64).to(dtype).requires_grad_()
    out, wanted = permute(x, ids, experts, **rows), reference.permute(x, ids, experts, **rows)
    for name, one, other in zip(wanted._fields, out, wanted, strict=True):
        assert torch.equal(one, other), name
    upstream = torch.randn(out.rows.shape, dtype=torch.float64).to(dtype)
    (grad,) = torch.autograd.grad(out.rows, x, upstream)
    exact = x.detach().double().requires_grad_()
    exact_rows = reference.permute(exact, ids, experts, **rows).rows
    signed = upstream.double()
    sums = [torch.autograd.grad(exact_rows, exact, each, retain_graph=True)[0] for each in (signed, signed.abs())]
    moving.within(grad, *sums, ids.shape[1])


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(0, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    align=st.sampled_from([1, 8, 128]),
    spare=st.sampled_from([None, -3, 0, 5]),
)
def test_against_the_reference(tokens, top_k, width, dtype, align, spare):
    ids = moving.draw_ids(tokens, top_k, 6, 3, seed=width)
    needed = len(moving.permute_index(ids, 6, align).slot_of_row)
    compare(ids, 6, width, dtype, align=align, max_rows=None if spare is None else max(0, needed + spare))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_shifted(dtype):
    ids = moving.draw_ids(11, 4, 6, 3)
    x = torch.randn(11, 48).to(dtype)
    wanted = permute(x, ids, 6).rows
    assert torch.equal(permute(x.t().contiguous().t(), ids, 6).rows, wanted)
    assert torch.equal(permute(moving.shift(x), ids.t().contiguous().t(), 6).rows, wanted)


def test_past_the_caches():
    """More than the 16 MiB from which rows are written past the caches."""
    x, ids = torch.randn(700, 6144), moving.draw_ids(700, 4, 6, 3)
    out = permute(x, ids, 6, align=8)
    assert out.rows.nbytes > 1 << 24
    assert torch.equal(out.rows, reference.gather(x, out.row_of_slot, out.slot_of_row))


def test_padding_of_rows_is_zero_whatever_x_holds():
    ids = moving.draw_ids(5, 3, 6, 3)
    out = permute(torch.full((5, 40), float("nan")), ids, 6, align=8, max_rows=70)
    assert torch.equal(out.rows.isnan().all(1), out.slot_of_row >= 0)
    assert not out.rows[out.slot_of_row < 0].any()


def test_gradient_does_not_read_padding():
    x = torch.randn(5, 40, requires_grad=True)
    out = permute(x, moving.draw_ids(5, 3, 6, 3), 6, align=8)
    upstream = torch.where(out.slot_of_row[:, None] < 0, torch.nan, torch.ones(40))
    (grad,) = torch.autograd.grad(out.rows, x, upstream)
    assert torch.equal(grad[:, 0], (out.row_of_slot >= 0).sum(1).float())


@pytest.mark.parametrize("rows", [{}, {"align": 8, "max_rows": 100}])
def test_opcheck(rows):
    index = moving.permute_index(moving.draw_ids(5, 3, 6, 3), 6, **rows)
    x = torch.randn(5, 40, requires_grad=True)
    results = torch.library.opcheck(torch.ops.mmoe.permute.default, (x, index.row_of_slot, index.slot_of_row))
    assert set(results.values()) == {"SUCCESS"}


def test_compile():
    """The number of rows depends on the data; with max_rows it does not, and there is one graph."""
    x, ids = torch.randn(5, 40, requires_grad=True), moving.draw_ids(5, 3, 6, 3)

    def rows_of(x: torch.Tensor) -> torch.Tensor:
        return permute(x, ids, 6, align=8, max_rows=60).rows

    out, wanted = torch.compile(rows_of, backend="aot_eager", fullgraph=True)(x), rows_of(x)
    assert torch.equal(out, wanted)
    assert torch.equal(*(torch.autograd.grad(rows.sum(), x)[0] for rows in (out, wanted)))


def test_a_row_outside_is_refused():
    row_of_slot, slot_of_row = torch.tensor([[3]], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="row_of_slot must be in -1"):
        torch.ops.mmoe.permute(torch.zeros(1, 2), row_of_slot, slot_of_row)


def test_any_number_of_threads_gives_the_same_bits():
    x, ids = torch.randn(300, 1000), moving.draw_ids(300, 6, 6, 3)

    def run():
        leaf = x.clone().requires_grad_()
        rows = permute(leaf, ids, 6, align=8).rows
        rows.square().sum().backward()
        return rows.detach(), leaf.grad

    threads.check_bits(run)


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
