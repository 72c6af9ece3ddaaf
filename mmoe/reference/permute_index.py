"""Slots sorted by expert: the oracle of :mod:`mmoe.ops.permute_index`."""

from typing import NamedTuple

import torch
from torch import Tensor


class PermuteIndex(NamedTuple):
    """Where every slot goes; see :func:`mmoe.ops.permute_index.permute_index`."""

    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def permute_index(ids: Tensor, experts: int) -> PermuteIndex:
    """A stable argsort of the slots with ``ids < experts``."""
    flat = ids.flatten()
    if (flat < 0).any():
        raise RuntimeError("permute_index: ids must not be negative")
    rows = int((flat < experts).sum())
    # Zero experts have the largest ids, so they sort behind every row.
    slot_of_row = flat.argsort(stable=True)[:rows]
    row_of_slot = torch.full_like(flat, -1, dtype=torch.int32)
    row_of_slot[slot_of_row] = torch.arange(rows, dtype=torch.int32, device=ids.device)
    bounds = torch.arange(experts + 1, device=ids.device)
    offsets = torch.searchsorted(flat[slot_of_row].contiguous(), bounds.to(ids.dtype))
    return PermuteIndex(row_of_slot.view(ids.shape), slot_of_row.to(torch.int32), offsets.to(torch.int32))
