"""Tokens gathered into expert order and quantised to FP8 on the way, for an FP8 grouped GEMM or all-to-all."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute_fp8 as reference
from mmoe.reference.unpermute import unpermute as reference_sum

__all__ = ["PermuteFp8Output", "permute_fp8"]


class PermuteFp8Output(NamedTuple):
    """What :func:`permute_fp8` returns; only ``straight_through`` takes gradient."""

    rows: Tensor
    scales: Tensor
    straight_through: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def permute_fp8(
    x: Tensor, ids: Tensor, experts: int, *, align: int = 1, max_rows: int | None = None
) -> PermuteFp8Output:
    """:func:`mmoe.ops.permute.permute` in e4m3, in blocks of 1 × 128 along d (DeepSeek-V3, arXiv 2412.19437, § 3.3).

    Autograd casts the gradient of an FP8 tensor to FP8, so the gradient to ``x`` goes through ``straight_through``:
    zeros of the shape of ``rows`` and the dtype of ``x`` in the memory of one number. The autograd function that
    consumes ``rows`` and ``scales`` takes it as a third input and returns for it the gradient of what it read,
    rows · scales; the quantisation counts as the identity.

    Args:
        x: [T, d], float32, bfloat16 or float16, d a multiple of 128. T may be 0. Takes gradient.
        ids, experts, align, max_rows: as for ``permute``.

    Returns, with R as for ``permute``:
        rows [R, d] float8_e4m3fn: x · (448 / amax) of the block, rounded to nearest even; scales [R, d/128] float32,
        amax / 448, by which rows are to be multiplied. A block whose largest magnitude is below 448 · 2⁻¹²⁶, and a row
        of padding, is 0 with a scale of 1. NaN or infinity in a block leaves nothing of it finite. straight_through
        [R, d]; row_of_slot, slot_of_row and offsets as for ``permute``.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: as ``permute_index``.
    """
    check.ndim("x", x, 2)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}, must be float32, bfloat16 or float16")
    if x.shape[1] % reference.BLOCK:
        raise ValueError(f"x has shape {tuple(x.shape)}, must have a multiple of {reference.BLOCK} columns")
    check.ndim("ids", ids, 2)
    check.integer("ids", ids)
    check.shape("ids", ids, (x.shape[0], ids.shape[1]))
    check.one_device(x=x, ids=ids)
    index = permute_index(ids, experts, align=align, max_rows=max_rows)
    compiled = kernel("permute_fp8", x) or reference.permute_fp8
    rows, scales = compiled(x.detach(), index.row_of_slot, index.slot_of_row)
    return PermuteFp8Output(rows, scales, _StraightThrough.apply(x, index.row_of_slot, rows.shape[0]), *index)


class _StraightThrough(torch.autograd.Function):
    """Zeros [R, d] whose gradient is summed over a token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_of_slot: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.new_zeros(()).expand(rows, x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        compiled = kernel("permute_backward", grad_rows)
        if compiled:
            return compiled(grad_rows, row_of_slot), None, None
        ones = torch.ones_like(row_of_slot, dtype=torch.float32)
        nothing = grad_rows.new_zeros(row_of_slot.shape[0], grad_rows.shape[1])
        return reference_sum(grad_rows, row_of_slot, ones, nothing, ones.new_zeros(row_of_slot.shape[0])), None, None


def _fake(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = slot_of_row.shape[0], x.shape[1]
    return (
        x.new_empty(rows, width, dtype=torch.float8_e4m3fn),
        x.new_empty(rows, width // reference.BLOCK, dtype=torch.float32),
    )


if load_library():
    torch.library.register_fake("mmoe::permute_fp8", _fake)
