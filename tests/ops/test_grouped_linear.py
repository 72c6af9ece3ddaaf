"""The grouped linear: the kernel against the reference in float64, its gradient also where Megatron keeps it."""

from typing import Any

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


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = draw([700, 1, 0, 90], 200, (2, 150), dtype)
    threads.check_bits(lambda: run(*case))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gradient_is_added_where_megatron_keeps_it(dtype: torch.dtype) -> None:
    """Its hooks hang on the node that would accumulate the gradient, and run without one."""
    rows, weight, ends, grad = draw([3, 0, 5], 16, (2, 8), dtype)
    leaf: Any = weight.clone().requires_grad_()
    leaf.main_grad = torch.ones_like(weight)
    fired = []
    node = leaf.view_as(leaf).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: fired.append(leaf.grad_added_to_main_grad))
    for _ in range(2):
        grouped_linear(rows, leaf, ends, into_main_grad=True).backward(grad)
    leaves = [rows.double(), weight.double().requires_grad_()]
    (once,) = torch.autograd.grad(reference.grouped_linear(*leaves, ends), leaves[1:], grad.double())
    close(leaf.main_grad, 1 + 2 * once)
    assert fired == [True, True]
    assert leaf.grad is None


@pytest.mark.parametrize("reason", ["not asked", "dtype", "shape", "strides"])
def test_other_main_gradients_are_left_to_megatron(reason: str) -> None:
    rows, weight, ends, grad = draw([3, 0, 5], 16, (8,), torch.bfloat16)
    leaf: Any = weight.clone().requires_grad_()
    leaf.main_grad = {
        "not asked": torch.ones_like(weight),
        "dtype": torch.ones_like(weight, dtype=torch.float32),
        "shape": torch.ones_like(weight).flatten(),
        "strides": torch.ones_like(weight).mT.contiguous().mT,
    }[reason]
    grouped_linear(rows, leaf, ends, into_main_grad=reason != "not asked").backward(grad)
    assert torch.equal(leaf.grad, run(rows, weight, ends, grad)[2])
    assert bool((leaf.main_grad == 1).all())
    assert not hasattr(leaf, "grad_added_to_main_grad")


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


def test_bad_arguments_of_the_schemas() -> None:
    rows, weight, ends, grad = draw([3, 5], 16, (8,), torch.float32)
    operators = torch.ops.mmoe
    with pytest.raises(RuntimeError, match=r"^grouped_linear: rows must be float32, bfloat16 or float64"):
        operators.grouped_linear(rows.to(torch.int8), weight.to(torch.int8), ends)
    with pytest.raises(RuntimeError, match=r"^grouped_linear: weight must be \[n, \.\.\., 16\]"):
        operators.grouped_linear_grad_weight(grad, rows, weight[:, :, :4], ends)
    with pytest.raises(RuntimeError, match=r"^grouped_linear: grad_out must be \[8, 8\]"):
        operators.grouped_linear_grad_rows(grad[:, :7], rows, weight, ends)
    with pytest.raises(RuntimeError, match=r"^grouped_linear: into is bfloat16, must be float32"):
        operators.grouped_linear_add_grad_weight(weight.bfloat16(), grad, rows, ends)
    with pytest.raises(RuntimeError, match=r"^grouped_linear: into must be contiguous"):
        operators.grouped_linear_add_grad_weight(weight.mT.contiguous().mT, grad, rows, ends)
