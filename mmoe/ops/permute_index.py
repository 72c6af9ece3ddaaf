"""Slots sorted by expert: the index that `permute` and `unpermute` copy along."""

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.reference import permute_index as reference
from mmoe.reference.permute_index import PermuteIndex

__all__ = ["PermuteIndex", "permute_index"]


def permute_index(ids: Tensor, experts: int, *, align: int = 1, max_rows: int | None = None) -> PermuteIndex:
    """Sort the slots by expert, keeping their order inside an expert (a counting sort).

    Args:
        ids: [T, k] int32 or int64: the slots' experts; an id ≥ ``experts`` is a zero expert and takes no row. Slot
            number = token · k + place. T may be 0.
        experts: N, the number of FFN experts.
        align: every expert's run of rows is padded to a multiple of it, as grouped GEMM kernels want.
        max_rows: the number of rows to lay out. None: R, as many as the runs need; on CUDA the host waits for it. With
            a number nothing waits, so the call can be captured into a CUDA graph. T · k + N · (``align`` − 1) is always
            enough; of runs that need more than ``max_rows``, the rows from there on are dropped: their slots get −1, as
            if they were zero experts', and no offset is larger than ``max_rows``.

    Returns:
        row_of_slot [T, k] int32, −1 for a zero slot; slot_of_row [R or ``max_rows``] int32, its inverse, −1 for padding
        and behind the last run; offsets [N+1] int32: expert i owns rows offsets[i] … offsets[i+1] − 1, its padding
        among them. No gradient.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: a negative id (on CUDA with ``max_rows`` it takes no row instead), or more than 2³¹ − 1 rows.
    """
    check.ndim("ids", ids, 2)
    check.integer("ids", ids)
    if experts < 1:
        raise ValueError(f"permute_index: experts is {experts}, must be at least 1")
    if align < 1:
        raise ValueError(f"permute_index: align is {align}, must be at least 1")
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"permute_index: max_rows is {max_rows}, must not be negative")
    compiled = kernel("permute_index", ids) or reference.permute_index
    return PermuteIndex(*compiled(ids, experts, align, max_rows))


def _fake(ids: Tensor, experts: int, align: int = 1, max_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if max_rows is None else max_rows
    return (
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty(rows, dtype=torch.int32),
        ids.new_empty(experts + 1, dtype=torch.int32),
    )


if load_library():
    torch.library.register_fake("mmoe::permute_index", _fake)
