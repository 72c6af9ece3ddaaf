"""The grouped linear: the kernel against the reference in float64, its gradient also where Megatron keeps it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import threads
from torch.nn.functional import grouped_mm

from mmoe.ops.grouped_linear import grouped_linear
from mmoe.reference import grouped_linear as reference

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
"""Of the largest value: rounding of a sum of products, and of the result."""


def draw(
    counts: list[int], inputs: int, middle: tuple[int, ...], dtype: torch.dtype, rest: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, weight, ends and a gradient of the result; ``rest`` rows have no expert."""
    generator = torch.Generator().manual_seed(sum(counts) + inputs)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    total = sum(counts) + rest
    shapes = (total, inputs), (len(counts), *middle, inputs), (total, torch.Size(middle).numel())
    rows, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return rows, weight, ends, grad


def run(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [rows.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = grouped_linear(*leaves, ends)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    largest = wanted.abs().max() if wanted.numel() else 0.0
    assert ((got.double() - wanted).abs() <= TOLERANCE[got.dtype] * largest).all()


def compare(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, grad: torch.Tensor) -> None:
    leaves = [rows.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = reference.grouped_linear(*leaves, ends)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    for got, right in zip(run(rows, weight, ends, grad), [wanted.detach(), *wanted_grads], strict=True):
        close(got, right)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    inputs=st.integers(1, 40),
    middle=st.sampled_from([(1,), (7,), (2, 5), (600,)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    rest=st.sampled_from([0, 0, 3]),
)
def test_against_float64(
    counts: list[int], inputs: int, middle: tuple[int, ...], dtype: torch.dtype, rest: int
) -> None:
    case = draw(counts, inputs, middle, dtype, rest)
    compare(*case)
    assert not run(*case)[0][sum(counts) :].any()


@pytest.mark.parametrize("counts", [[1500, 0, 3], [0, 0, 0], [511, 512, 513]], ids=str)
def test_experts_in_several_pieces_and_none(counts: list[int]) -> None:
    case = draw(counts, 24, (2, 300), torch.float32)
    compare(*case)
    grad_weight = run(*case)[2]
    assert [bool(part.any()) for part in grad_weight] == [count > 0 for count in counts]


def test_the_reference_is_torchs_grouped_mm() -> None:
    rows, weight, ends, _ = draw([3, 0, 5], 16, (8,), torch.float32)
    close(reference.grouped_linear(rows, weight, ends), grouped_mm(rows, weight.mT, offs=ends).double())


def test_strided_inputs() -> None:
    rows, weight, ends, grad = draw([4, 2], 12, (6,), torch.float32)
    wanted = run(rows, weight, ends, grad)
    strided = rows.t().contiguous().t(), weight.mT.contiguous().mT, torch.stack((ends, ends), 1)[:, 0]
    for got, right in zip(run(*strided, grad.t().contiguous().t()), wanted, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("function", [grouped_linear, reference.grouped_linear])
def test_gradcheck(function) -> None:
    rows, weight, ends, _ = draw([2, 0, 3], 4, (2, 3), torch.float64, rest=1)
    inputs = rows.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: function(r, w, ends), inputs)


def test_opcheck() -> None:
    rows, weight, ends, grad = draw([2, 0, 3], 8, (6,), torch.float32)
    operators = torch.ops.mmoe
    calls = [
        (operators.grouped_linear, (rows.clone().requires_grad_(), weight.clone().requires_grad_(), ends)),
        (operators.grouped_linear_grad_rows, (grad, rows, weight, ends)),
        (operators.grouped_linear_grad_weight, (grad, rows, weight, ends)),
        (operators.grouped_linear_add_grad_weight, (torch.ones_like(weight), grad, rows, ends)),
    ]
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator.default, arguments).values()) == {"SUCCESS"}


def test_any_number_of_threads_gives_the_same_bits() -> None:
    case = draw([700, 1, 0, 90], 200, (2, 150), torch.float32)
    threads.check_bits(lambda: run(*case))


def test_a_gradient_is_added_where_megatron_keeps_it() -> None:
    rows, weight, ends, grad = draw([3, 0, 5], 16, (2, 8), torch.float32)
    _, _, wanted = run(rows, weight, ends, grad)
    leaf = weight.clone().requires_grad_()
    leaf.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    fired = []
    leaf.register_post_accumulate_grad_hook(lambda tensor: fired.append(tensor.grad_added_to_main_grad))
    grouped_linear(rows, leaf, ends).backward(grad)
    torch.testing.assert_close(leaf.main_grad, wanted + 1)  # type: ignore[attr-defined]
    assert fired == [True]


def test_a_main_gradient_of_another_dtype_is_left_to_megatron() -> None:
    rows, weight, ends, grad = draw([3, 0, 5], 16, (8,), torch.bfloat16)
    _, _, wanted = run(rows, weight, ends, grad)
    leaf = weight.clone().requires_grad_()
    leaf.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    grouped_linear(rows, leaf, ends).backward(grad)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, wanted)
    assert not (leaf.main_grad != 1).any()  # type: ignore[attr-defined]


def test_bad_arguments() -> None:
    rows, weight, ends, _ = draw([3, 5], 16, (8,), torch.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        grouped_linear(rows, weight[:, :, :9], ends)
    with pytest.raises(ValueError, match=r"must be \[n, …, K\]"):
        grouped_linear(rows, weight[0], ends)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        grouped_linear(rows, weight.double(), ends)
    with pytest.raises(TypeError, match=r"ends is torch\.int64"):
        grouped_linear(rows, weight, ends.long())
    for wrong in ([5, 3], [3, 9], [-1, 8]):
        with pytest.raises(RuntimeError, match="ends must not fall nor pass R = 8"):
            grouped_linear(rows, weight, torch.tensor(wrong, dtype=torch.int32))
