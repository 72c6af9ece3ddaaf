"""What every layer needs to know about the packs of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Travels through Megatron's TransformerBlock in the place of its PackedSeqParams.

    mask: the model's dtype [b, 1, s, s], 0 where the query (row) sees the key (column), -inf elsewhere.
    cos, sin: [s, b, 1, rope/2], in the model's dtype.
    valid: bool [s, b], False on padding.
    loss_tokens: fp32 scalar, how many tokens of this micro-batch carry loss.
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor
    valid: Tensor
    loss_tokens: Tensor


def visibility(document: Tensor, branch: Tensor) -> Tensor:
    """bool [b, 1, s, s] from document and branch ids [b, s].

    A token sees itself and what stands before it in its own document, in the prefix (branch 0) or in its own branch.
    Padding (document 0) sees itself alone, to keep softmax finite.
    """
    size = document.size(1)
    same_document = (document[:, :, None] == document[:, None, :]) & (document > 0)[:, :, None]
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=document.device)
    return ((same_document & same_branch & causal) | itself).unsqueeze(1)


def additive(may_attend: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask to add to attention scores; made once a batch, where a boolean one would be converted in every layer."""
    return torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device).masked_fill_(~may_attend, -torch.inf)


def rotary(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [s, b, 1, dim/2] of position [b, s]; angles in fp32."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim)
    angle = position.t().float()[:, :, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs (x₀, x₁), (x₂, x₃), … of [s, b, heads, dim]; the result holds the pairs' first members,
    then their second ones, as LongCat-Flash's released weights expect (queries and keys alike)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
