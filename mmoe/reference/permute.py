"""Tokens gathered into expert order, in plain PyTorch; the slots of zero experts never enter."""

from typing import NamedTuple

from torch import Tensor

from mmoe.reference.permute_index import permute_index


class PermuteOutput(NamedTuple):
    """What :func:`permute` returns; only ``rows`` takes gradient."""

    rows: Tensor
    row_of_slot: Tensor
    slot_of_row: Tensor
    offsets: Tensor


def gather(x: Tensor, slot_of_row: Tensor, top_k: int) -> Tensor:
    """[T, d] → [R, d]: the token of every row's slot."""
    return x.index_select(0, slot_of_row // top_k)


def permute(x: Tensor, ids: Tensor, experts: int) -> PermuteOutput:
    """Rows of ``x`` sorted by expert, then by slot. Contract: :func:`mmoe.ops.permute.permute`."""
    index = permute_index(ids, experts)
    return PermuteOutput(gather(x, index.slot_of_row, ids.shape[1]), *index)
