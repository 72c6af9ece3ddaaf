"""Cambrian-1's Spatial Vision Aggregator in the released order of work (arXiv 2406.16860, its vision_sampler.py).

Every encoder's grid is re-arranged into windows; keys and values of all of them are computed, concatenated and handed
to one scaled_dot_product_attention with B·L² problems of a single query.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(grid: Tensor, side: int) -> Tensor:
    """[B, m·L, m·L, C] → [B·L², m², C], a copy."""
    batch, width, channels = grid.shape[0], grid.shape[1] // side, grid.shape[-1]
    split = grid.view(batch, side, width, side, width, channels)
    return split.permute(0, 1, 3, 2, 4, 5).contiguous().flatten(0, 2).flatten(1, 2)


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, L, L, H, D], keys and values [B·L², K, H·D], mask [B·L², K] → [B, L, L, H·D]."""
    queries = q.flatten(0, 2).unsqueeze(2)
    k, v = (part.unflatten(-1, q.shape[3:]).transpose(1, 2) for part in (keys, values))
    mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(*q.shape[:3], -1)


def layer(ours: Any, queries: Tensor, features: Sequence[Tensor], context: Tensor) -> Tensor:
    """The forward of :class:`mmoe.models.connectors.sva.Layer`, with its weights, as the release computes it."""
    side, joint = queries.shape[1], ours.gather
    about = ours.context(context[:, None, None].expand(*queries.shape[:3], -1))
    start = ours.query_in(torch.cat([queries, about], dim=-1))
    keys, values = [], []
    for source, grid in zip(joint.sources, features, strict=True):
        seen = windows(grid, side)
        seen = seen if source.position is None else seen + source.position
        keys.append(source.key(source.key_norm(seen)))
        values.append(source.value(source.value_norm(seen)))
    q = joint.query(joint.query_norm(start)).unflatten(-1, (joint.heads, -1))
    mixed = attention(q, torch.cat(keys, dim=1), torch.cat(values, dim=1))
    return queries + ours.mlp(ours.norm(start + joint.out(mixed)))
