"""The Spatial Vision Aggregator's attention (Cambrian-1, arXiv 2406.16860, section 3) in plain PyTorch.

L × L queries; query (r, c) sees, of every encoder i with a grid of m_i·L × m_i·L, the m_i × m_i window at (r, c).
Shapes: B images, L queries a side, H heads, D head width, K = Σ m_i² keys a query, C = H·D.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Masks = Sequence[Tensor | None]


class Projected(NamedTuple):
    """An encoder whose keys and values are given: two tensors [B, m·L, m·L, H·D]."""

    keys: Tensor
    values: Tensor


class Absorbed(NamedTuple):
    """An encoder given by its features; the projections are absorbed into query and output.

    features [B, m·L, m·L, C]; position [m², C], row-major within the window, or None; LayerNorm weights and biases [C]
    and projections [H·D, C], for keys and values apart: k = key_weight · LayerNorm_k(features + position), v likewise.
    """

    features: Tensor
    position: Tensor | None
    key_norm_weight: Tensor
    key_norm_bias: Tensor
    key_weight: Tensor
    value_norm_weight: Tensor
    value_norm_bias: Tensor
    value_weight: Tensor
    eps: float = 1e-5


def windows(grid: Tensor, side: int) -> Tensor:
    """[B, m·L, m·L, …] → [B, L, L, m², …]: the window of every query, row-major."""
    batch, m = grid.shape[0], grid.shape[1] // side
    split = grid.reshape(batch, side, m, side, m, *grid.shape[3:])
    return split.transpose(2, 3).reshape(batch, side, side, m * m, *grid.shape[3:])


def _valid(masks: Masks, sizes: Sequence[int], q: Tensor) -> Tensor | None:
    """Validity of the keys [B, L, L, K]; an encoder's window without a valid key is fully valid, as released."""
    if all(mask is None for mask in masks):
        return None
    batch, side = q.shape[:2]
    parts = []
    for mask, keys in zip(masks, sizes, strict=True):
        if mask is None:
            parts.append(torch.ones(batch, side, side, keys, dtype=torch.bool, device=q.device))
        else:
            part = windows(mask, side)
            parts.append(part | ~part.any(-1, keepdim=True))
    return torch.cat(parts, dim=-1)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """scores [B, L, L, H, K] → probabilities over the keys of all encoders together, in at least fp32."""
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, :, None, :], float("-inf"))
    return scores.to(torch.promote_types(torch.float32, scores.dtype)).softmax(-1)


def sva(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Masks | None = None) -> Tensor:
    """One masked softmax over the windows of all encoders. Contract: :func:`mmoe.ops.sva.sva`."""
    batch, side, _, heads, width = q.shape
    k = torch.cat([windows(part, side) for part in keys], dim=3).unflatten(-1, (heads, width))
    v = torch.cat([windows(part, side) for part in values], dim=3).unflatten(-1, (heads, width))
    valid = _valid(masks, [(part.shape[1] // side) ** 2 for part in keys], q) if masks is not None else None
    # A handful of keys a query: a product and a sum beat thousands of one-row matrix products.
    scores = (q.unsqueeze(3) * k).sum(-1).transpose(3, 4) * width**-0.5
    attention = _softmax(scores, valid).to(q.dtype)
    out = (attention.transpose(3, 4).unsqueeze(-1) * v).sum(3)
    return out.reshape(batch, side, side, heads * width)


def sva_absorbed(q: Tensor, sources: Sequence[Projected | Absorbed], masks: Masks | None = None) -> Tensor:
    """:func:`sva` without an absorbed encoder's keys and values. Contract: :func:`mmoe.ops.sva.sva_absorbed`.

    With x̂ the normalised features before weight γ and bias β: q·k = (γ_k ⊙ W_kᵀq)·x̂ + q·W_kβ_k, and
    Σ a·v = W_v(γ_v ⊙ Σ a·x̂ + β_v Σ a). The constant q·W_kβ_k stays, because the softmax spans the encoders.
    """
    batch, side, _, heads, width = q.shape
    scores, stored, sizes = [], [], []
    for source in sources:
        if isinstance(source, Projected):
            k = windows(source.keys, side).unflatten(-1, (heads, width))
            stored.append(windows(source.values, side).unflatten(-1, (heads, width)))
            scores.append(torch.einsum("brchd,brckhd->brchk", q, k))
        else:
            x = windows(source.features, side)
            x = x if source.position is None else x + source.position
            normed = F.layer_norm(x, x.shape[-1:], eps=source.eps)
            key_weight = source.key_weight.unflatten(0, (heads, width))
            absorbed = torch.einsum("brchd,hde->brche", q, key_weight * source.key_norm_weight)
            constant = torch.einsum("brchd,hd->brch", q, key_weight @ source.key_norm_bias)
            stored.append(normed)
            scores.append(torch.einsum("brche,brcke->brchk", absorbed, normed) + constant.unsqueeze(-1))
        sizes.append(stored[-1].shape[3])
    valid = _valid(masks, sizes, q) if masks is not None else None
    attention = _softmax(torch.cat(scores, -1) * width**-0.5, valid).to(q.dtype)

    out = q.new_zeros(())
    for source, kept, part in zip(sources, stored, attention.split(sizes, -1), strict=True):
        if isinstance(source, Projected):
            out = out + torch.einsum("brchk,brckhd->brchd", part, kept)
        else:
            pooled = torch.einsum("brchk,brcke->brche", part, kept) * source.value_norm_weight
            pooled = pooled + part.sum(-1, keepdim=True) * source.value_norm_bias
            out = out + torch.einsum("brche,hde->brchd", pooled, source.value_weight.unflatten(0, (heads, width)))
    return out.reshape(batch, side, side, heads * width)
