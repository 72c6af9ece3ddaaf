"""The combination against a loop: order of the sum, precision, gradients, repeatability."""

import pytest
import torch

from mmoe.ops.permute import permute
from mmoe.ops.unpermute import unpermute
from mmoe.reference import unpermute as reference


def case(dtype: torch.dtype, tokens: int = 9, width: int = 5, top_k: int = 4, experts: int = 6, zeros: int = 3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(experts + zeros, generator=generator)[:top_k] for _ in range(tokens)])
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, top_k, generator=generator, dtype=weight_dtype)
    out = permute(x, ids, experts)
    rows = torch.randn(out.rows.shape, generator=generator, dtype=torch.float64).to(dtype)
    return rows, out.row_of_slot, weights, x, torch.rand(tokens, generator=generator, dtype=weight_dtype)


def test_reference_sums_in_slot_order_bit_for_bit():
    rows, row_of_slot, weights, x, identity = case(torch.float32)
    out = reference.unpermute(rows, row_of_slot, weights, x, identity)
    for t in range(len(x)):
        total = torch.zeros(5)
        for j, row in enumerate(row_of_slot[t].tolist()):
            if row >= 0:
                total = total + weights[t, j] * rows[row]
        assert torch.equal(out[t], total + identity[t] * x[t])


def test_bfloat16_sums_in_fp32():
    rows, row_of_slot, weights, x, identity = case(torch.bfloat16)
    out = unpermute(rows, row_of_slot, weights, x, identity)
    wanted = unpermute(rows.float(), row_of_slot, weights, x.float(), identity).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)


def test_gradient():
    rows, row_of_slot, weights, x, identity = case(torch.float64, tokens=4, width=2)
    inputs = [part.requires_grad_() for part in (rows, weights, x, identity)]
    assert torch.autograd.gradcheck(lambda r, w, y, i: unpermute(r, row_of_slot, w, y, i), inputs)


def test_repeatable_bit_for_bit():
    def run():
        rows, row_of_slot, weights, x, identity = case(torch.float32, tokens=300, width=16)
        inputs = [part.requires_grad_() for part in (rows, weights, x, identity)]
        out = unpermute(rows, row_of_slot, weights, x, identity)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_only_zero_experts():
    x = torch.randn(3, 2)
    identity = torch.tensor([1.0, 0.5, 0.0])
    out = unpermute(x[:0], torch.full((3, 2), -1), torch.rand(3, 2), x, identity)
    assert torch.equal(out, identity[:, None] * x)


def test_no_tokens():
    empty = torch.zeros(0, 2)
    assert unpermute(empty, torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3), empty, torch.zeros(0)).shape == (
        0,
        2,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": torch.zeros(3)}, "rows"),
        ({"row_of_slot": torch.zeros(4, 2)}, "row_of_slot"),
        ({"weights": torch.zeros(4, 3)}, "weights"),
        ({"x": torch.zeros(4, 3)}, "x"),
        ({"x": torch.zeros(4, 2, dtype=torch.bfloat16)}, "x"),
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
