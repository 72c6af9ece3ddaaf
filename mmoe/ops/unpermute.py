"""The experts' rows brought back to their tokens."""

from torch import Tensor

from mmoe.ops import check
from mmoe.reference import unpermute as reference

__all__ = ["unpermute"]


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor, x: Tensor, identity: Tensor) -> Tensor:
    """out_t = Σ_j weights_tj · rows[row_of_slot_tj] + identity_t · x_t, summed in fp32, in slot order.

    Args:
        rows: [R, d]: the experts' outputs in the order of :func:`mmoe.ops.permute.permute`. R may be 0.
        row_of_slot: [T, k] int32 or int64; −1 (a zero expert's slot) adds nothing, its weight takes no gradient.
        weights: [T, k] float32 (float64 for checks).
        x: [T, d], dtype of ``rows``: the tokens before the experts.
        identity: [T], dtype of ``weights``: the zero experts' weight of x.

    Returns:
        [T, d], dtype of ``x``. Gradient to rows, weights, x and identity.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check.ndim("rows", rows, 2)
    check.floating("rows", rows)
    check.ndim("row_of_slot", row_of_slot, 2)
    check.integer("row_of_slot", row_of_slot)
    tokens, top_k = row_of_slot.shape
    check.shape("weights", weights, (tokens, top_k))
    check.floating("weights", weights)
    check.shape("x", x, (tokens, rows.shape[1]))
    check.dtype("x", x, rows.dtype)
    check.shape("identity", identity, (tokens,))
    check.dtype("identity", identity, weights.dtype)
    return reference.unpermute(rows, row_of_slot, weights, x, identity)
