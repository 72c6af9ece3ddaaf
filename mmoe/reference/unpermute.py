"""The experts' rows brought back to their tokens, and the zero experts' identity added, in plain PyTorch."""

import torch
from torch import Tensor


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor, x: Tensor, identity: Tensor) -> Tensor:
    """Weighted sum of a token's rows, plus identity · x. Contract: :func:`mmoe.ops.unpermute.unpermute`."""
    tokens, top_k = row_of_slot.shape
    accumulate = torch.promote_types(torch.float32, rows.dtype)
    # A zero slot reads a row of zeros after the last one, so no slot needs a branch.
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    index = row_of_slot.masked_fill(row_of_slot < 0, rows.shape[0]).flatten()
    slots = padded.index_select(0, index).to(accumulate).view(tokens, top_k, rows.shape[1])
    routed = (weights.to(accumulate)[:, :, None] * slots).sum(1)
    return (routed + identity.to(accumulate)[:, None] * x.to(accumulate)).to(x.dtype)
