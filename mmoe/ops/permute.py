"""Tokens gathered into expert order for the grouped GEMM and the all-to-all."""

from torch import Tensor

from mmoe.ops import check
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute as reference
from mmoe.reference.permute import PermuteOutput

__all__ = ["PermuteOutput", "permute"]


def permute(x: Tensor, ids: Tensor, experts: int) -> PermuteOutput:
    """Copy every token once per FFN slot, in expert order. The slots of zero experts never enter.

    Args:
        x: [T, d], any floating type. T may be 0. Takes gradient.
        ids: [T, k] int32 or int64: the slots' experts; an id ≥ ``experts`` is a zero expert.
        experts: N, the number of FFN experts.

    Returns, with R the number of slots whose id is below N:
        rows [R, d], dtype of ``x``, by expert and then by slot (slot number = token · k + place); row_of_slot [T, k]
        int32, −1 for a zero slot; slot_of_row [R] int32; offsets [N+1] int32: expert i owns rows offsets[i] …
        offsets[i+1] − 1. The gradient of a token is the sum over its slots.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check.ndim("x", x, 2)
    check.floating("x", x)
    check.ndim("ids", ids, 2)
    check.integer("ids", ids)
    check.shape("ids", ids, (x.shape[0], ids.shape[1]))
    if experts < 1:
        raise ValueError(f"permute: experts is {experts}, must be at least 1")
    index = permute_index(ids, experts)
    return PermuteOutput(reference.gather(x, index.slot_of_row, ids.shape[1]), *index)
