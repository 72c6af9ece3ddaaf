"""Tokens gathered into expert order, in plain PyTorch; the slots of zero experts never enter."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmoe.reference.permute_index import permute_index

FP8_BLOCK = 128
FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""


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


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, d] → float8_e4m3fn [M, d] and the float32 scales [M, d/128] to multiply it with, by blocks of 1 × 128."""
    blocks = x.float().unflatten(1, (x.shape[1] // FP8_BLOCK, FP8_BLOCK))
    amax = blocks.abs().amax(2)
    # A scale that is not a normal number would lose the block; what is that small rounds to 0 by itself.
    tiny = amax < FP8_MAX * torch.finfo(torch.float32).tiny
    scaled = blocks * torch.where(tiny, 1.0, FP8_MAX / amax)[:, :, None]
    return scaled.flatten(1).to(torch.float8_e4m3fn), torch.where(tiny, 1.0, amax / FP8_MAX)


def gather_fp8(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gather`, quantised."""
    return quantize(gather(x, row_of_slot, slot_of_row))
