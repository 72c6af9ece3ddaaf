"""The experts' rows brought back to their tokens."""

from typing import Any

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.reference import unpermute as reference

__all__ = ["unpermute"]


def unpermute(
    rows: Tensor,
    row_of_slot: Tensor,
    weights: Tensor,
    x: Tensor,
    identity: Tensor,
    *,
    slot_of_row: Tensor | None = None,
) -> Tensor:
    """out_t = Σ_j weights_tj · rows[row_of_slot_tj] + identity_t · x_t, summed in fp32, in slot order.

    Args:
        rows: [R, d], floating: the experts' outputs in the order of :func:`mmoe.ops.permute.permute`. R may be 0.
        row_of_slot: [T, k] int32 or int64; −1 (a zero expert's slot) reads and adds nothing, its weight takes no
            gradient.
        weights: [T, k] float32 (float64 for float64 ``rows``).
        x: [T, d], dtype of ``rows``: the tokens before the experts. Under autocast the two may differ, and are taken in
            the wider dtype.
        identity: [T], dtype of ``weights``: the zero experts' weight of x.
        slot_of_row: [R] int32 or int64, from ``permute``: which rows are padding (−1 in it). Rows without a slot get a
            gradient of 0 with or without it; without it, all of the gradient is cleared first.

    Returns:
        [T, d], dtype of ``x``. Gradient to rows, weights, x and identity.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: a row outside −1 … R − 1 in ``row_of_slot`` (on CUDA it adds nothing instead).
    """
    check.ndim("rows", rows, 2)
    check.floating("rows", rows)
    check.ndim("row_of_slot", row_of_slot, 2)
    check.integer("row_of_slot", row_of_slot)
    check.one_device(
        rows=rows, row_of_slot=row_of_slot, weights=weights, x=x, identity=identity, slot_of_row=slot_of_row
    )
    if torch.is_autocast_enabled(rows.device.type):
        wider = torch.promote_types(rows.dtype, x.dtype)
        rows, x = rows.to(wider), x.to(wider)
    tokens, top_k = row_of_slot.shape
    check.shape("weights", weights, (tokens, top_k))
    check.dtype("weights", weights, torch.promote_types(torch.float32, rows.dtype))
    check.shape("x", x, (tokens, rows.shape[1]))
    check.dtype("x", x, rows.dtype)
    check.shape("identity", identity, (tokens,))
    check.dtype("identity", identity, weights.dtype)
    if slot_of_row is not None:
        check.shape("slot_of_row", slot_of_row, rows.shape[:1])
        check.integer("slot_of_row", slot_of_row)
        slot_of_row = slot_of_row.to(torch.int32)
    compiled = kernel("unpermute", rows)
    if compiled is None:
        return reference.unpermute(rows, row_of_slot, weights, x, identity)
    return compiled(rows, row_of_slot.to(torch.int32), weights, x, identity, slot_of_row)


def _fake(
    rows: Tensor, row_of_slot: Tensor, weights: Tensor, x: Tensor, identity: Tensor, slot_of_row: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    rows: Tensor,
    row_of_slot: Tensor,
    weights: Tensor,
    x: Tensor,
    identity: Tensor,
    slot_of_row: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape) for like in (rows, weights, x, identity))


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_rows, grad_weights, grad_x, grad_identity = torch.ops.mmoe.unpermute_backward(grad_out, *ctx.saved_tensors)
    return grad_rows, None, grad_weights, grad_x, grad_identity, None


if load_library():
    torch.library.register_fake("mmoe::unpermute", _fake)
    torch.library.register_fake("mmoe::unpermute_backward", _fake_backward)
    torch.library.register_autograd("mmoe::unpermute", _backward, setup_context=_setup_context)
