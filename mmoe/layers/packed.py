"""What every layer needs to know about the packs of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Travels through Megatron's TransformerBlock in the place of its PackedSeqParams.

    q: queries of this context-parallel rank; s: keys, the tokens of whole packs, in the order of :func:`key_places`.

    mask: the model's dtype [b, 1, q, s], 0 where the query (row) sees the key (column), -inf elsewhere.
    rotary_q, rotary_k: (cos, sin), [q, b, 1, rope/2] and [s, b, 1, rope/2], in the model's dtype.
    valid: bool [t, b], False on padding; t: the tokens of the packs that this rank routes.
    loss_tokens: fp32 scalar, how many tokens of this micro-batch carry loss, on all ranks together.
    """

    mask: Tensor
    rotary_q: tuple[Tensor, Tensor]
    rotary_k: tuple[Tensor, Tensor]
    valid: Tensor
    loss_tokens: Tensor


def query_places(size: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """int64 [size / ranks]: the places in a pack that context-parallel rank ``rank`` holds.

    Chunks rank and 2·ranks − 1 − rank of 2·ranks: under a causal mask every rank sees the same number of keys.
    """
    chunks = torch.arange(size, device=device).view(2 * ranks, -1) if ranks > 1 else None
    if chunks is None:
        return torch.arange(size, device=device)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def key_places(size: int, ranks: int, sequence_shards: int, device: torch.device | None = None) -> Tensor:
    """int64 [size]: the place in the pack of each key, gathered over ``ranks`` context-parallel ranks first and then
    over the ``sequence_shards`` in which sequence parallelism cut each rank's part."""
    by_rank = torch.stack([query_places(size, ranks, rank, device) for rank in range(ranks)])
    return by_rank.view(ranks, sequence_shards, -1).transpose(0, 1).reshape(-1)


def visibility(document: Tensor, branch: Tensor, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """bool [b, 1, q, s] from document and branch ids [b, s] of whole packs, for the places ``queries`` and ``keys``
    (all in order where None).

    A token sees itself and what stands before it in its own document, in the prefix (branch 0) or in its own branch.
    Padding (document 0) sees itself alone, to keep softmax finite.
    """
    everywhere = torch.arange(document.size(1), device=document.device)
    queries = everywhere if queries is None else queries
    keys = everywhere if keys is None else keys
    document_q, document_k = document[:, queries, None], document[:, None, keys]
    branch_q, branch_k = branch[:, queries, None], branch[:, None, keys]
    same_document = (document_q == document_k) & (document_q > 0)
    same_branch = (branch_k == 0) | (branch_q == branch_k)
    causal, itself = queries[:, None] >= keys, queries[:, None] == keys
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


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x₀, x_{d/2}), (x₁, x_{d/2+1}), … of [s, b, heads, d], as Llama's weights in transformers'
    format expect."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
