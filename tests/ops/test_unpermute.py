"""The combination: the reference against a loop, the CPU kernel against the reference in float64."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import moving, threads

from mmoe.ops.unpermute import unpermute
from mmoe.reference import unpermute as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
N, Z = 6, 3


def run(case: moving.Case, padded: bool = False) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The result and the gradients to rows, weights, x and identity."""
    leaves = [part.detach().requires_grad_() for part in (case.rows, case.weights, case.x, case.identity)]
    rows, weights, x, identity = leaves
    slot_of_row = case.slot_of_row if padded else None
    out = unpermute(rows, case.row_of_slot, weights, x, identity, slot_of_row=slot_of_row)
    return out.detach(), torch.autograd.grad(out, leaves, case.grad_out)


def compare(case: moving.Case, padded: bool = False) -> None:
    out, grads = run(case, padded)
    moving.check_forward(out, case)
    moving.check_backward(grads, case)


def test_reference_sums_in_slot_order_bit_for_bit():
    case = moving.draw(moving.draw_ids(9, 4, N, Z), N, 5, torch.float32)
    out = reference.unpermute(case.rows, case.row_of_slot, case.weights, case.x, case.identity)
    for t in range(9):
        total = torch.zeros(5)
        for j, row in enumerate(case.row_of_slot[t].tolist()):
            if row >= 0:
                total = total + case.weights[t, j] * case.rows[row]
        assert torch.equal(out[t], total + case.identity[t] * case.x[t])


def test_sums_in_slot_order_then_identity():
    """Only in this order do the ones survive the large numbers."""
    rows = torch.tensor([1.0, 2.0**25, -(2.0**25), 1.0])[:, None].expand(4, 40)
    x = torch.full((1, 40), 2.0**25)
    for order, wanted in [([1, 2, 0, 3], 2.0**25), ([0, 1, 2, 3], 2.0**25), ([1, 2, 0, 0], 2.0**25)]:
        out = unpermute(rows, torch.tensor([order]), torch.ones(1, 4), x, torch.ones(1))
        assert torch.equal(out, torch.full((1, 40), wanted))
        out = unpermute(rows, torch.tensor([order]), torch.ones(1, 4), x, torch.zeros(1))
        assert torch.equal(out, torch.full((1, 40), {0: 1.0, 1: 2.0}[order[0]]))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    top_k=st.integers(0, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    align=st.sampled_from([1, 8]),
    slack=st.sampled_from([None, 0, 5]),
)
def test_against_float64(tokens, top_k, width, dtype, align, slack):
    ids = moving.draw_ids(tokens, top_k, N, Z, seed=width)
    needed = len(moving.permute_index(ids, N, align).slot_of_row)
    rows = {"align": align, "max_rows": None if slack is None else needed + slack}
    compare(moving.draw(ids, N, width, dtype, seed=width, **rows), padded=align > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ids", [torch.full((7, 3), 2), torch.full((7, 3), N), torch.zeros(5, 0, dtype=torch.int64)], ids=str
)
def test_one_expert_or_none(ids, dtype):
    compare(moving.draw(ids, N, 40, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_shifted(dtype):
    case = moving.draw(moving.draw_ids(11, 4, N, Z), N, 48, dtype)
    wanted = run(case)
    strided = [part.t().contiguous().t() if part.ndim == 2 else part for part in case]
    shifted = [moving.shift(part) if part.is_floating_point() else part for part in case]
    for other in (strided, shifted):
        compare(moving.Case(*other))
        assert torch.equal(run(moving.Case(*other))[0], wanted[0])


def test_past_the_caches():
    """More than the 16 MiB from which gradients are written past the caches."""
    ids = moving.draw_ids(700, 4, N, Z)
    case = moving.draw(ids, N, 6144, torch.float32, align=8)
    assert case.rows.nbytes > 1 << 24
    _, (grad_rows, *_) = run(case, padded=True)
    token = case.slot_of_row.clamp(min=0).long() // 4
    weight = case.weights.flatten()[case.slot_of_row.clamp(min=0).long()] * (case.slot_of_row >= 0)
    assert torch.equal(grad_rows, weight[:, None] * case.grad_out[token])
    assert not grad_rows[case.slot_of_row < 0].any()
    bf16 = moving.Case(*(part.bfloat16() if part.ndim == 2 and part.is_floating_point() else part for part in case))
    bf16 = bf16._replace(weights=case.weights, rows=bf16.rows.repeat(2, 1), slot_of_row=case.slot_of_row.repeat(2))
    grad_rows = torch.ops.mmoe.unpermute_backward(bf16.grad_out, *bf16[:5], bf16.slot_of_row)[0][: len(token)]
    assert torch.equal(grad_rows, (weight[:, None] * bf16.grad_out[token]).bfloat16())


@pytest.mark.parametrize("function", [unpermute, reference.unpermute])
def test_gradcheck(function):
    case = moving.draw(moving.draw_ids(4, 3, N, Z), N, 9, torch.float64)
    inputs = [part.requires_grad_() for part in (case.rows, case.weights, case.x, case.identity)]
    assert torch.autograd.gradcheck(lambda r, w, y, i: function(r, case.row_of_slot, w, y, i), inputs)


@pytest.mark.parametrize("align", [1, 8])
def test_opcheck(align):
    case = moving.draw(moving.draw_ids(4, 3, N, Z), N, 9, torch.float32, align=align)
    rows, weights, x, identity = (part.requires_grad_() for part in (case.rows, case.weights, case.x, case.identity))
    arguments = rows, case.row_of_slot, weights, x, identity, case.slot_of_row if align > 1 else None
    results = torch.library.opcheck(torch.ops.mmoe.unpermute.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(bad):
    ids = torch.tensor([[0, 1], [0, N], [2, N]])
    case = moving.draw(ids, N, 40, torch.float32)
    case.rows[case.row_of_slot[0, 0]] = bad
    case.weights[1, 1] = bad  # of a zero slot, which nothing reads
    out, (grad_rows, grad_weights, grad_x, grad_identity) = run(case)
    assert out.isfinite().all(1).tolist() == [False, True, True]
    assert grad_weights.isfinite().tolist() == [[False, True], [True, True], [True, True]]
    assert all(grad.isfinite().all() for grad in (grad_rows, grad_x, grad_identity))
    assert grad_weights[1:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("told", [True, False], ids=["padding told", "padding not told"])
def test_padding_takes_no_part(told):
    case = moving.draw(moving.draw_ids(5, 3, N, Z), N, 40, torch.float32, align=8, max_rows=70)
    pad = case.slot_of_row < 0
    case.rows[pad] = float("nan")
    out, grads = run(case, padded=told)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][pad].any()


def test_any_number_of_threads_gives_the_same_bits():
    case = moving.draw(moving.draw_ids(300, 6, N, Z), N, 1000, torch.float32)

    def both():
        out, grads = run(case)
        return out, *grads

    threads.check_bits(both)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, root):
    """Whatever this machine has beyond it is lowered to ``isa``; both ways of writing, and a ragged width."""
    script = """
import sys, torch
sys.path.insert(0, "tests")
from ops import moving, test_unpermute, test_permute
for dtype in test_unpermute.DTYPES:
    test_unpermute.compare(moving.draw(moving.draw_ids(5, 4, 6, 3), 6, 77, dtype, align=8), padded=True)
    test_permute.compare(moving.draw_ids(5, 4, 6, 3), 6, 77, dtype, align=8)
test_unpermute.test_past_the_caches()
test_permute.test_past_the_caches()
"""
    environment = os.environ | {"MMOE_SIMD": isa}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compile():
    case = moving.draw(moving.draw_ids(4, 3, N, Z), N, 9, torch.float32)
    arguments = case.rows.requires_grad_(), case.row_of_slot, case.weights, case.x, case.identity
    out = torch.compile(unpermute, backend="aot_eager", fullgraph=True)(*arguments)
    assert torch.equal(out, unpermute(*arguments))
    (grad,) = torch.autograd.grad(out, case.rows, case.grad_out)
    assert torch.equal(grad, torch.autograd.grad(unpermute(*arguments), case.rows, case.grad_out)[0])


def test_a_row_outside_is_refused():
    with pytest.raises(RuntimeError, match="row_of_slot must be in -1"):
        unpermute(torch.zeros(3, 2), torch.tensor([[3]]), torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": torch.zeros(3)}, "rows"),
        ({"row_of_slot": torch.zeros(4, 2)}, "row_of_slot"),
        ({"weights": torch.zeros(4, 3)}, "weights"),
        ({"x": torch.zeros(4, 3)}, "x"),
        ({"x": torch.zeros(4, 2, dtype=torch.bfloat16)}, "x"),
        ({"weights": torch.zeros(4, 2, dtype=torch.bfloat16)}, "weights"),
        ({"slot_of_row": torch.zeros(4, dtype=torch.int32)}, "slot_of_row"),
        ({"slot_of_row": torch.zeros(3)}, "slot_of_row"),
        ({"identity": torch.zeros(3)}, "identity"),
        ({"identity": torch.zeros(4, dtype=torch.float64)}, "identity"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "rows": torch.zeros(3, 2),
        "row_of_slot": torch.zeros(4, 2, dtype=torch.int32),
        "weights": torch.zeros(4, 2),
        "x": torch.zeros(4, 2),
        "identity": torch.zeros(4),
    } | change
    with pytest.raises((ValueError, TypeError), match=named):
        unpermute(**arguments)
