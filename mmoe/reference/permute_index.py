"""Slots sorted by expert: the oracle of :mod:`mmoe.ops.permute_index`."""

from typing import NamedTuple

import torch
from torch import Tensor


class PermuteIndex(NamedTuple):
    """Where every slot goes; see :func:`mmoe.ops.permute_index.permute_index`."""

    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def permute_index(ids: Tensor, experts: int, align: int = 1, max_rows: int | None = None) -> PermuteIndex:
    """A stable argsort of the slots with ``ids < experts``, every expert's run starting at a multiple of ``align``."""
    flat = ids.flatten()
    if (flat < 0).any():
        raise RuntimeError("permute_index: ids must not be negative")
    counts = torch.bincount(flat[flat < experts], minlength=experts)
    ends = ((counts + align - 1) // align * align).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    rows = int(offsets[-1]) if max_rows is None else max_rows
    # Zero experts have the largest ids, so they sort behind every row.
    slot = flat.argsort(stable=True)[: int(counts.sum())]
    expert = flat[slot].long()
    row = offsets[expert] + torch.arange(len(slot), device=ids.device) - (counts.cumsum(0) - counts)[expert]
    slot, row = slot[row < rows], row[row < rows]
    row_of_slot = torch.full_like(flat, -1, dtype=torch.int32)
    row_of_slot[slot] = row.to(torch.int32)
    slot_of_row = row_of_slot.new_full((rows,), -1)
    slot_of_row[row] = slot.to(torch.int32)
    return PermuteIndex(row_of_slot.view(ids.shape), slot_of_row, offsets.clamp(max=rows).to(torch.int32))
