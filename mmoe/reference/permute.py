"""Tokens gathered into expert order, in plain PyTorch; the slots of zero experts never enter."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmoe.reference.permute_index import permute_index


class PermuteOutput(NamedTuple):
    """What :func:`permute` returns; only ``rows`` takes gradient."""

    rows: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def gather(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> Tensor:
    """[T, d] → [R, d]: the token of every row's slot, zeros where a row has no slot."""
    token = slot_of_row.div(max(row_of_slot.shape[1], 1), rounding_mode="floor")
    # A row without a slot reads a row of zeros after the last token.
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return padded.index_select(0, token.where(slot_of_row >= 0, x.shape[0]))


def permute(x: Tensor, ids: Tensor, experts: int, align: int = 1, max_rows: int | None = None) -> PermuteOutput:
    """Rows of ``x`` sorted by expert, then by slot. Contract: :func:`mmoe.ops.permute.permute`."""
    index = permute_index(ids, experts, align, max_rows)
    return PermuteOutput(gather(x, index.row_of_slot, index.slot_of_row), *index)
