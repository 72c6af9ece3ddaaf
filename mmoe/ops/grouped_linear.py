"""The experts' matrix products: rows sorted by expert, each times its expert's weight."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from mmoe.ops import check, kernel, load_library
from mmoe.reference import grouped_linear as reference

__all__ = ["grouped_linear"]


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor, *, into_main_grad: bool = False) -> Tensor:
    """out_r = W_e · rows_r for the rows r of expert e: one grouped GEMM.

    In bfloat16 on CUDA torch's ``grouped_mm``. On the CPU, where that one runs the experts one after another, a kernel
    of ours with the experts over the threads.

    Args:
        rows: [R, K], floating; R may be 0. Under autocast rows and weight are taken in its dtype, as by torch's linear.
        weight: [n, …, K], dtype of ``rows``: n experts; N is the product of the dimensions between.
        ends: [n] int32: expert e owns rows ends[e − 1] … ends[e] − 1, expert 0 those from row 0 on. An expert may have
            none.
        into_main_grad: where ``weight`` has a ``main_grad`` of its own dtype and shape (Megatron-Core's
            DistributedDataParallel gives it one), add its gradient there in the same product, set
            ``grad_added_to_main_grad``, and hand autograd none, as Megatron's fused linears do
            (tensor_parallel/layers.py:581). For parameters that nothing else in the graph reads: Megatron drops what
            autograd finds elsewhere. CPU only; on CUDA the gradient takes autograd's way.

    Returns:
        [R, N], dtype of ``rows``; 0 in rows from ends[n − 1] on (``grouped_mm`` leaves there whatever it finds). First
        gradients to rows and weight.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: ``ends`` that fall or pass R (not looked for on CUDA); K or N of no whole 16 bytes on CUDA.
    """
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    check.ndim("rows", rows, 2)
    check.floating("rows", rows)
    if weight.ndim < 3:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [n, …, K]")
    check.shape("weight", weight, (*weight.shape[:-1], rows.shape[1]))
    check.dtype("weight", weight, rows.dtype)
    check.shape("ends", ends, weight.shape[:1])
    check.dtype("ends", ends, torch.int32)
    check.one_device(rows=rows, weight=weight, ends=ends)
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return grouped_mm(rows, weight.flatten(1, -2).transpose(1, 2), offs=ends)
    compiled = kernel("grouped_linear", rows)
    if compiled is None:
        return reference.grouped_linear(rows, weight, ends)
    return compiled(rows, weight, ends, into_main_grad)


def _fake(rows: Tensor, weight: Tensor, ends: Tensor, into_main_grad: bool = False) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1:-1].numel())


def _fake_grad_rows(grad_out: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _fake_grad_weight(grad_out: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.into_main_grad = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ends = ctx.saved_tensors
    needs_rows, needs_weight, *_ = ctx.needs_input_grad
    grad_rows = grad_weight = None
    if needs_rows:
        grad_rows = torch.ops.mmoe.grouped_linear_grad_rows(grad_out, rows, weight, ends)
    if needs_weight:
        main = getattr(weight, "main_grad", None) if ctx.into_main_grad else None
        if main is not None and (main.dtype, main.shape) == (weight.dtype, weight.shape) and main.is_contiguous():
            torch.ops.mmoe.grouped_linear_add_grad_weight(main, grad_out, rows, ends)
            weight.grad_added_to_main_grad = True
        else:
            grad_weight = torch.ops.mmoe.grouped_linear_grad_weight(grad_out, rows, weight, ends)
    return grad_rows, grad_weight, None, None


if load_library():
    torch.library.register_fake("mmoe::grouped_linear", _fake)
    torch.library.register_fake("mmoe::grouped_linear_grad_rows", _fake_grad_rows)
    torch.library.register_fake("mmoe::grouped_linear_grad_weight", _fake_grad_weight)
    torch.library.register_autograd("mmoe::grouped_linear", _backward, setup_context=_setup_context)
