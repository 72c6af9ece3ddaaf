"""The experts' matrix products: rows sorted by expert, each times its expert's weight."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from mmoe.ops import check, kernel, load_library
from mmoe.reference import grouped_linear as reference

__all__ = ["grouped_linear"]


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """out_r = W_e · rows_r for the rows r of expert e: one grouped GEMM.

    On CUDA torch's ``grouped_mm``, one kernel for all experts; on the CPU, where that one runs the experts one after
    another, a kernel of ours with the experts over the threads. The gradient of a weight that has ``main_grad`` of its
    own dtype, as Megatron-Core's DistributedDataParallel gives it, is added there in the same product on the CPU, and
    ``grad_added_to_main_grad`` says so, as with Megatron's fused linears (tensor_parallel/layers.py:581).

    Args:
        rows: [R, K], floating; R may be 0.
        weight: [n, …, K], dtype of ``rows``: n experts; N is the product of the dimensions between.
        ends: [n] int32: expert e owns rows ends[e − 1] … ends[e] − 1, expert 0 those from row 0 on. An expert may have
            none.

    Returns:
        [R, N], dtype of ``rows``; 0 in rows from ends[n − 1] on (on CUDA whatever lay there). Gradient to rows and weight.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: ``ends`` that fall or pass R (not looked for on CUDA).
    """
    check.ndim("rows", rows, 2)
    check.floating("rows", rows)
    if weight.ndim < 3:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [n, …, K]")
    check.shape("weight", weight, (*weight.shape[:-1], rows.shape[1]))
    check.dtype("weight", weight, rows.dtype)
    check.shape("ends", ends, weight.shape[:1])
    check.dtype("ends", ends, torch.int32)
    check.one_device(rows=rows, weight=weight, ends=ends)
    if rows.is_cuda:
        return grouped_mm(rows, weight.flatten(1, -2).transpose(1, 2), offs=ends)
    return (kernel("grouped_linear", rows) or reference.grouped_linear)(rows, weight, ends)


def _fake(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1:-1].numel())


def _fake_grad_rows(grad_out: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _fake_grad_weight(grad_out: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    needs_rows, needs_weight, _ = ctx.needs_input_grad
    grad_rows = grad_weight = None
    if needs_rows:
        grad_rows = torch.ops.mmoe.grouped_linear_grad_rows(grad_out, rows, weight, ends)
    if needs_weight:
        main = getattr(weight, "main_grad", None)
        if main is not None and main.dtype == weight.dtype:
            torch.ops.mmoe.grouped_linear_add_grad_weight(main, grad_out, rows, ends)
            weight.grad_added_to_main_grad = True
            # Never read: the hooks behind the accumulation of the gradient run only if there is one.
            grad_weight = torch.empty_like(weight)
        else:
            grad_weight = torch.ops.mmoe.grouped_linear_grad_weight(grad_out, rows, weight, ends)
    return grad_rows, grad_weight, None


if load_library():
    torch.library.register_fake("mmoe::grouped_linear", _fake)
    torch.library.register_fake("mmoe::grouped_linear_grad_rows", _fake_grad_rows)
    torch.library.register_fake("mmoe::grouped_linear_grad_weight", _fake_grad_weight)
    torch.library.register_autograd("mmoe::grouped_linear", _backward, setup_context=_setup_context)
