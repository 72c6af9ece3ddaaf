"""Tokens gathered into expert order, in plain PyTorch; the slots of zero experts never enter."""

from typing import NamedTuple

import torch
from torch import Tensor


class PermuteOutput(NamedTuple):
    """What :func:`permute` returns; only ``rows`` takes gradient."""

    rows: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def permute_index(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counting sort of the slots by expert: (row_of_slot, slot_of_row, offsets). Contract: :func:`mmoe.ops.permute.permute`."""
    flat = ids.flatten().clamp(max=experts)
    ends = torch.bincount(flat, minlength=experts + 1)[:experts].cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    rows = int(offsets[-1])
    order = flat.argsort(stable=True)[:rows]
    row_of_slot = torch.full_like(flat, -1, dtype=torch.int32)
    row_of_slot[order] = torch.arange(rows, dtype=torch.int32, device=ids.device)
    return row_of_slot.view_as(ids), order.to(torch.int32), offsets


def permute(x: Tensor, ids: Tensor, experts: int) -> PermuteOutput:
    """Rows of ``x`` sorted by expert, then by slot. Contract: :func:`mmoe.ops.permute.permute`."""
    row_of_slot, slot_of_row, offsets = permute_index(ids, experts)
    rows = x.index_select(0, slot_of_row // ids.shape[1])
    return PermuteOutput(rows, row_of_slot, slot_of_row, offsets)
