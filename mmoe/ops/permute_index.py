"""Slots sorted by expert: the index that `permute` and `unpermute` copy along."""

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.reference import permute_index as reference
from mmoe.reference.permute_index import PermuteIndex

__all__ = ["PermuteIndex", "permute_index"]


def permute_index(ids: Tensor, experts: int) -> PermuteIndex:
    """Sort the slots by expert, keeping their order inside an expert (a counting sort).

    Args:
        ids: [T, k] int32 or int64: the slots' experts; an id ≥ ``experts`` is a zero expert and takes no row. Slot
            number = token · k + place. T may be 0.
        experts: N, the number of FFN experts.

    Returns, with R the number of slots whose id is below N:
        row_of_slot [T, k] int32, −1 for a zero slot; slot_of_row [R] int32, its inverse; offsets [N+1] int32: expert i
        owns rows offsets[i] … offsets[i+1] − 1. No gradient. On CUDA the host waits for R.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: a negative id, or more than 2³¹ − 1 slots.
    """
    check.ndim("ids", ids, 2)
    check.integer("ids", ids)
    if experts < 1:
        raise ValueError(f"permute_index: experts is {experts}, must be at least 1")
    compiled = kernel("permute_index", ids.device.type)
    return PermuteIndex(*compiled(ids, experts)) if compiled else reference.permute_index(ids, experts)


def _fake(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(experts + 1, dtype=torch.int32),
    )


if load_library():
    torch.library.register_fake("mmoe::permute_index", _fake)
