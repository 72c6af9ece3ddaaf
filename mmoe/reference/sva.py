"""The Spatial Vision Aggregator's attention (Cambrian-1, arXiv 2406.16860, section 3) in plain PyTorch.

L × L queries; query (r, c) sees, of every encoder i with a grid of m_i·L × m_i·L, the m_i × m_i window at (r, c).
Shapes: B images, L queries a side, H heads, D head width, K = Σ m_i² keys a query. The order of work is the released
code's: windows, position, LayerNorms, projections, one masked softmax.
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
    """An encoder given by its features and what makes keys and values of them.

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


def sva(q: Tensor, sources: Sequence[Projected | Absorbed], masks: Masks | None = None) -> Tensor:
    """One masked softmax over the windows of all encoders. Contract: :func:`mmoe.ops.sva.sva`."""
    side, (heads, width) = q.shape[1], q.shape[3:]
    keys, values, valid = [], [], []
    for source, mask in zip(sources, [None] * len(sources) if masks is None else masks, strict=True):
        keep = _valid(mask, side)
        key, value = _windows_of(source, keep, side, q.dtype)
        keys.append(key)
        values.append(value)
        valid.append(keep)
    k = torch.cat(keys, dim=3).unflatten(-1, (heads, width))
    v = torch.cat(values, dim=3).unflatten(-1, (heads, width))
    # A handful of keys a query: a product and a sum beat thousands of one-row matrix products.
    scores = (q.unsqueeze(3) * k).sum(-1).transpose(3, 4) * width**-0.5
    if any(keep is not None for keep in valid):
        every = [
            k.new_ones(key.shape[:4], dtype=torch.bool) if keep is None else keep
            for key, keep in zip(keys, valid, strict=True)
        ]
        scores = scores.masked_fill(~torch.cat(every, dim=3)[:, :, :, None], float("-inf"))
    attention = scores.to(torch.promote_types(torch.float32, scores.dtype)).softmax(-1).to(q.dtype)
    return (attention.transpose(3, 4).unsqueeze(-1) * v).sum(3).flatten(3)


def _valid(mask: Tensor | None, side: int) -> Tensor | None:
    """Which keys of an encoder take part, [B, L, L, m²]; a window without a valid key is fully valid, as released."""
    if mask is None:
        return None
    part = windows(mask, side)
    return part | ~part.any(-1, keepdim=True)


def _windows_of(
    source: Projected | Absorbed, keep: Tensor | None, side: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, L, L, m², H·D] of every query's window."""

    def window(grid: Tensor) -> Tensor:
        cells = windows(grid, side)
        # Padding takes no part whatever it holds: a probability of 0 would let NaN through.
        return cells if keep is None else cells.masked_fill(~keep.unsqueeze(-1), 0)

    if isinstance(source, Projected):
        return window(source.keys), window(source.values)
    x = window(source.features.to(dtype))
    x = x if source.position is None else x + source.position.to(dtype)
    key, value = (
        F.linear(F.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), source.eps), projection.to(dtype))
        for weight, bias, projection in (
            (source.key_norm_weight, source.key_norm_bias, source.key_weight),
            (source.value_norm_weight, source.value_norm_bias, source.value_weight),
        )
    )
    return key, value
