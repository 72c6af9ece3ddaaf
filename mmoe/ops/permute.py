"""Tokens gathered into expert order for the grouped GEMM and the all-to-all."""

from typing import Any

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute as reference
from mmoe.reference.permute import PermuteOutput

__all__ = ["PermuteOutput", "permute"]


def permute(x: Tensor, ids: Tensor, experts: int, *, align: int = 1, max_rows: int | None = None) -> PermuteOutput:
    """Copy every token once per FFN slot, in expert order. The slots of zero experts never enter.

    Args:
        x: [T, d], any floating type. T may be 0. Takes gradient.
        ids: [T, k] int32 or int64: the slots' experts; an id ≥ ``experts`` is a zero expert.
        experts: N, the number of FFN experts.
        align, max_rows: how many rows there are, see :func:`mmoe.ops.permute_index.permute_index`.

    Returns, with R the number of rows that the aligned runs need, or ``max_rows``:
        rows [R, d], dtype of ``x``, by expert and then by slot (slot number = token · k + place), zeros in the padding;
        row_of_slot [T, k] int32, −1 for a zero slot; slot_of_row [R] int32, −1 for padding; offsets [N+1] int32: expert
        i owns rows offsets[i] … offsets[i+1] − 1. The gradient of a token is the sum over its slots in slot order, in
        fp32.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: as ``permute_index``.
    """
    check.ndim("x", x, 2)
    check.floating("x", x)
    check.ndim("ids", ids, 2)
    check.integer("ids", ids)
    check.shape("ids", ids, (x.shape[0], ids.shape[1]))
    check.one_device(x=x, ids=ids)
    index = permute_index(ids, experts, align=align, max_rows=max_rows)
    compiled = kernel("permute", x) or reference.gather
    return PermuteOutput(compiled(x, index.row_of_slot, index.slot_of_row), *index)


def _fake(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> Tensor:
    return x.new_empty(slot_of_row.shape[0], x.shape[1])


def _fake_backward(grad_rows: Tensor, row_of_slot: Tensor) -> Tensor:
    return grad_rows.new_empty(row_of_slot.shape[0], grad_rows.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mmoe.permute_backward(grad_rows, *ctx.saved_tensors), None, None


if load_library():
    torch.library.register_fake("mmoe::permute", _fake)
    torch.library.register_fake("mmoe::permute_backward", _fake_backward)
    torch.library.register_autograd("mmoe::permute", _backward, setup_context=_setup_context)
