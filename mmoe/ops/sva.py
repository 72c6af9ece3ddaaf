"""Windowed cross-attention of a grid of queries over several encoders' grids (Cambrian-1's SVA)."""

from collections.abc import Sequence

from torch import Tensor

from mmoe.ops import check
from mmoe.reference import sva as reference
from mmoe.reference.sva import Absorbed, Masks, Projected

__all__ = ["Absorbed", "Projected", "sva", "sva_absorbed"]


def sva(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Masks | None = None) -> Tensor:
    """Every query attends to its own window of every encoder, through one softmax over all of them (arXiv 2406.16860).

    Query (r, c) of an L × L grid sees rows r·m_i … r·m_i + m_i − 1 and columns c·m_i … of encoder i, m_i = side of its
    grid / L. Scale 1/√D. The grids are read as they are, never re-arranged by the caller.

    Args:
        q: [B, L, L, H, D], floating. B may be 0.
        keys: for every encoder [B, m_i·L, m_i·L, H·D], dtype of ``q``.
        values: as ``keys``.
        masks: None, or for every encoder None or [B, m_i·L, m_i·L] bool, False on padding. Where an encoder has no
            valid key in a window, all of that window's keys of that encoder count as valid, as in the released code.

    Returns:
        [B, L, L, H·D], dtype of ``q``; softmax in at least fp32. Gradient to q, keys and values.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    batch, side, heads, width = _check_query(q)
    if not keys:
        raise ValueError("keys is empty, must hold one tensor per encoder")
    if len(values) != len(keys):
        raise ValueError(f"values holds {len(values)} tensors, must hold {len(keys)} as keys does")
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        _check_grid(f"keys[{i}]", key, batch, side, heads * width)
        check.dtype(f"keys[{i}]", key, q.dtype)
        check.shape(f"values[{i}]", value, key.shape)
        check.dtype(f"values[{i}]", value, q.dtype)
    _check_masks(masks, keys)
    return reference.sva(q, keys, values, masks)


def sva_absorbed(q: Tensor, sources: Sequence[Projected | Absorbed], masks: Masks | None = None) -> Tensor:
    """:func:`sva` where an encoder may be given by its features and weights instead of its keys and values.

    Exact: W_k is absorbed into the query and W_v into the weighted sum, so that the keys and values of an encoder with
    many keys a query are never computed (for m = 4, 4.5 times fewer operations at Cambrian-1's sizes).

    Args:
        q: [B, L, L, H, D], floating.
        sources: for every encoder :class:`mmoe.reference.sva.Projected` or :class:`mmoe.reference.sva.Absorbed`.
        masks: as in :func:`sva`.

    Returns:
        [B, L, L, H·D], dtype of ``q``. Gradient to q and to every tensor of the sources.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    batch, side, heads, width = _check_query(q)
    if not sources:
        raise ValueError("sources is empty, must hold one entry per encoder")
    for i, source in enumerate(sources):
        name = f"sources[{i}]"
        if isinstance(source, Projected):
            _check_grid(f"{name}.keys", source.keys, batch, side, heads * width)
            check.shape(f"{name}.values", source.values, source.keys.shape)
            continue
        channels = source.features.shape[-1]
        _check_grid(f"{name}.features", source.features, batch, side, channels)
        if source.position is not None:
            check.shape(f"{name}.position", source.position, ((source.features.shape[1] // side) ** 2, channels))
        for field in ("key_norm_weight", "key_norm_bias", "value_norm_weight", "value_norm_bias"):
            check.shape(f"{name}.{field}", getattr(source, field), (channels,))
        for field in ("key_weight", "value_weight"):
            check.shape(f"{name}.{field}", getattr(source, field), (heads * width, channels))
    _check_masks(masks, [source[0] for source in sources])
    return reference.sva_absorbed(q, sources, masks)


def _check_query(q: Tensor) -> tuple[int, int, int, int]:
    check.ndim("q", q, 5)
    check.floating("q", q)
    batch, side, columns, heads, width = q.shape
    if side != columns or side < 1:
        raise ValueError(f"q has {side} × {columns} queries, must be a square grid")
    return batch, side, heads, width


def _check_grid(name: str, grid: Tensor, batch: int, side: int, channels: int) -> None:
    check.ndim(name, grid, 4)
    rows, columns = grid.shape[1:3]
    if rows != columns or rows < side or rows % side:
        raise ValueError(f"{name} is a grid of {rows} × {columns}, must be square with a multiple of {side} a side")
    check.shape(name, grid, (batch, rows, columns, channels))


def _check_masks(masks: Masks | None, grids: Sequence[Tensor]) -> None:
    if masks is None:
        return
    if len(masks) != len(grids):
        raise ValueError(f"masks holds {len(masks)} entries, must hold one per encoder, {len(grids)}")
    for i, (mask, grid) in enumerate(zip(masks, grids, strict=True)):
        if mask is not None:
            check.shape(f"masks[{i}]", mask, grid.shape[:3])
            check.boolean(f"masks[{i}]", mask)
