"""Windowed cross-attention of a grid of queries over several encoders' grids (Cambrian-1's SVA)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.ops.sva_absorbed import sva_absorbed
from mmoe.reference import sva as reference
from mmoe.reference.sva import Absorbed, Masks, Projected

__all__ = ["Absorbed", "Projected", "sva"]

MOST_ENCODERS, LARGEST_WINDOW = 16, 8  # csrc/sva/sva_limits.h
WIDEST_HEAD_ON_CUDA = 128  # csrc/sva/sva_heuristics.h


def sva(q: Tensor, sources: Sequence[Projected | Absorbed], masks: Masks | None = None) -> Tensor:
    """Every query attends to its own window of every encoder, through one softmax over all of them (arXiv 2406.16860).

    Query (r, c) of an L × L grid sees rows r·m_i … r·m_i + m_i − 1 and columns c·m_i … of encoder i, m_i = side of its
    grid / L. Scale 1/√D. The grids are read as they are, never re-arranged.

    An encoder is ``Projected(keys, values)``, best with one key a query, or ``Absorbed(features, position, …)``, best
    with several: W_k is absorbed into the query and W_v applied after the weighted sum, so that keys and values are
    never computed. Both are exact. Absorbed queries and sums exist for a few rows of queries at a time, in the backward
    too, which keeps nothing but q, the sources and the log of the softmax's sum.

    Args:
        q: [B, L, L, H, D], floating. B may be 0. On CUDA D ≤ 128. Under autocast q, keys and values are taken in its
            dtype, as torch's attention takes them.
        sources: one to sixteen encoders, m_i at most 8. Keys and values have the dtype of ``q``; what describes an
            absorbed encoder may have any floating dtype and is taken in that of ``q``; its eps is the same for all.
        masks: None, or for every encoder None or [B, m_i·L, m_i·L] bool, False on padding. Where an encoder has no
            valid key in a window, all of that window's keys of that encoder count as valid, as in the released code.

    Returns:
        [B, L, L, H·D], dtype of ``q``; softmax in at least fp32. Gradient to q and to every tensor of the sources.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q = q.to(dtype)
        sources = [Projected(*(part.to(dtype) for part in s)) if isinstance(s, Projected) else s for s in sources]
    _check(q, sources, masks)
    if kernel("sva", q) is None:
        return reference.sva(q, sources, masks)
    none = q.new_empty(0, dtype=torch.bool)
    given = [none if mask is None else mask for mask in masks or [None] * len(sources)]
    # The kernels take projected encoders before absorbed ones; a sum has no order.
    order = sorted(range(len(sources)), key=lambda i: isinstance(sources[i], Absorbed))
    chosen = [given[i] for i in order]
    projected = [source for source in sources if isinstance(source, Projected)]
    absorbed = [source for source in sources if isinstance(source, Absorbed)]
    keys, values = [source.keys for source in projected], [source.values for source in projected]
    if not absorbed:
        return torch.ops.mmoe.sva(q, keys, values, [], [], [], [], chosen, 0.0)[0]
    tensors = []
    for *parts, _ in absorbed:
        tensors += [q.new_empty(0) if part is None else part.to(q.dtype) for part in parts]
    return sva_absorbed(q, keys, values, tensors, chosen, absorbed[0].eps)[0]


def _check(q: Tensor, sources: Sequence[Projected | Absorbed], masks: Masks | None) -> None:
    check.ndim("q", q, 5)
    check.floating("q", q)
    batch, side, columns, heads, width = q.shape
    if q.device.type == "cuda" and width > WIDEST_HEAD_ON_CUDA:
        raise ValueError(f"q has heads of {width}, must be at most {WIDEST_HEAD_ON_CUDA} on CUDA")
    if side != columns or side < 1:
        raise ValueError(f"q has {side} × {columns} queries, must be a square grid")
    if not 1 <= len(sources) <= MOST_ENCODERS:
        raise ValueError(f"sources holds {len(sources)} encoders, must hold 1 to {MOST_ENCODERS}")
    for i, source in enumerate(sources):
        name = f"sources[{i}]"
        parts = source._asdict().items()
        check.one_device(q=q, **{f"{name}.{field}": part for field, part in parts if isinstance(part, Tensor)})
        if isinstance(source, Projected):
            _check_grid(f"{name}.keys", source.keys, batch, side, heads * width)
            check.dtype(f"{name}.keys", source.keys, q.dtype)
            check.shape(f"{name}.values", source.values, source.keys.shape)
            check.dtype(f"{name}.values", source.values, q.dtype)
            continue
        channels = source.features.shape[-1]
        _check_grid(f"{name}.features", source.features, batch, side, channels)
        check.floating(f"{name}.features", source.features)
        if source.position is not None:
            check.shape(f"{name}.position", source.position, ((source.features.shape[1] // side) ** 2, channels))
        for field in ("key_norm_weight", "key_norm_bias", "value_norm_weight", "value_norm_bias"):
            check.shape(f"{name}.{field}", getattr(source, field), (channels,))
        for field in ("key_weight", "value_weight"):
            check.shape(f"{name}.{field}", getattr(source, field), (heads * width, channels))
    if len({source.eps for source in sources if isinstance(source, Absorbed)}) > 1:
        raise ValueError("sources differ in eps, must have one for all absorbed encoders")
    _check_masks(masks, [source[0] for source in sources])


def _check_grid(name: str, grid: Tensor, batch: int, side: int, channels: int) -> None:
    check.ndim(name, grid, 4)
    rows, columns = grid.shape[1:3]
    if rows != columns or rows < side or rows % side or rows > LARGEST_WINDOW * side:
        raise ValueError(
            f"{name} is a grid of {rows} × {columns}, must be square with {side} to {LARGEST_WINDOW} · {side} a side, "
            f"a multiple of {side}"
        )
    check.shape(name, grid, (batch, rows, columns, channels))


def _check_masks(masks: Masks | None, grids: Sequence[Tensor]) -> None:
    if masks is None:
        return
    if len(masks) != len(grids):
        raise ValueError(f"masks holds {len(masks)} entries, must hold one per encoder, {len(grids)}")
    for i, (mask, grid) in enumerate(zip(masks, grids, strict=True)):
        if mask is not None:
            check.one_device(q=grid, **{f"masks[{i}]": mask})
            check.shape(f"masks[{i}]", mask, grid.shape[:3])
            check.boolean(f"masks[{i}]", mask)


def _fake(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    features: list[Tensor],
    positions: list[Tensor],
    absorbed: list[Tensor],
    constants: list[Tensor],
    masks: list[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    out = q.new_empty(*q.shape[:3], q.shape[3] * q.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=torch.promote_types(torch.float32, q.dtype))
    return out, lse, _like(absorbed), _like(constants)


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _fake_backward(
    grad_out: Tensor, grad_pooled: list[Tensor], grad_mass: list[Tensor], q: Tensor, *rest: Any
) -> tuple[Any, ...]:
    keys, values, features, _, absorbed, constants, *_ = rest
    grads = (_like(tensors) for tensors in (keys, values, features, absorbed, constants, absorbed, constants))
    return q.new_empty(q.shape), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, *lists, ctx.eps = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(q, lse, *(tensor for tensors in lists for tensor in tensors))


def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    _: Tensor | None,
    grad_pooled: list[Tensor | None],
    grad_mass: list[Tensor | None],
) -> tuple[Any, ...]:
    q, lse, *flat = ctx.saved_tensors
    lists = []
    for size in ctx.sizes:
        lists.append(flat[:size])
        flat = flat[size:]
    positions, masks = lists[3], lists[6]
    given = [_given(grad_out, q), [_given(g, q) for g in grad_pooled], [_given(g, lse) for g in grad_mass]]
    grads = torch.ops.mmoe.sva_backward(*given, q, *lists, lse, ctx.eps)
    of_q, of_keys, of_values, of_features, of_absorbed, of_constants, _, _ = grads
    of_positions = [
        _of_position(grad, position, q) if position.numel() else None
        for grad, position in zip(of_features, positions, strict=True)
    ]
    return of_q, of_keys, of_values, of_features, of_positions, of_absorbed, of_constants, [None] * len(masks), None


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    """A missing gradient is passed as an empty tensor."""
    return like.new_empty(0) if grad is None else grad


def _of_position(grad_features: Tensor, position: Tensor, q: Tensor) -> Tensor:
    batch, rows, columns = q.shape[:3]
    m = grad_features.shape[1] // rows
    cells = grad_features.view(batch, rows, m, columns, m, -1)
    sums = torch.promote_types(torch.float32, q.dtype)
    return cells.sum((0, 1, 3), dtype=sums).flatten(0, 1).to(position.dtype)


if load_library():
    torch.library.register_fake("mmoe::sva", _fake)
    torch.library.register_fake("mmoe::sva_backward", _fake_backward)
    torch.library.register_autograd("mmoe::sva", _backward, setup_context=_setup_context)
