"""SVA with absorbed encoders, put together from the core kernel and products over a few rows of queries at a time.

With x̂ the normalised features, q·k = (γ_k ⊙ W_kᵀq)·x̂ + q·W_kβ_k and Σ a·v = W_v(γ_v ⊙ Σ a·x̂ + β_v Σ a). The absorbed
queries and the sums Σ a·x̂ take H·C numbers a query, as much as its whole window for m = 4: they exist for one chunk of
queries only, on a CPU in the cache, and are computed once more in the backward.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIELDS = 8
"""Tensors of an absorbed encoder: the fields of :class:`mmoe.reference.sva.Absorbed` but eps; no position is empty."""
CHUNK_NUMBERS = {"cpu": 2 << 20, "cuda": 128 << 20}
"""How many numbers the absorbed queries and the sums of a chunk may be by device, twice that in the backward.

On a CPU they stay in the cache: 8 MiB in fp32, 48 queries of Cambrian-1 8B. On CUDA a chunk has to occupy the device:
256 MiB in bf16, 4096 queries (7 images), fifteen for each of the 264 blocks that an H100 has room for.
"""


class _Encoder(NamedTuple):
    """An absorbed encoder with the LayerNorms' weights in the projections [H, D, C] and their biases projected."""

    features: Tensor
    position: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor


class _Chunk(NamedTuple):
    images: slice
    rows: slice

    def of(self, grid: Tensor, side: int) -> Tensor:
        """The part of a grid [B, m·side, …] that the chunk's queries see; an empty tensor stays empty."""
        if grid.numel() == 0:
            return grid
        m = grid.shape[1] // side
        return grid[self.images, self.rows.start * m : self.rows.stop * m]


def _encoders(q: Tensor, absorbed: list[Tensor]) -> list[_Encoder]:
    heads = q.shape[3:]
    made = []
    for i in range(0, len(absorbed), FIELDS):
        features, position, key_gain, key_shift, key, value_gain, value_shift, value = absorbed[i : i + FIELDS]
        projections = (key * key_gain, key @ key_shift, value * value_gain, value @ value_shift)
        made.append(_Encoder(features, position, *(part.unflatten(0, heads) for part in projections)))
    return made


def _chunks(q: Tensor, encoders: list[_Encoder]) -> Iterator[_Chunk]:
    """Several images, or several rows of one; of about the same number."""
    batch, rows, columns, heads, _ = q.shape
    row = 2 * columns * heads * sum(encoder.features.shape[-1] for encoder in encoders)
    fitting = max(1, CHUNK_NUMBERS[q.device.type] // row)
    if fitting >= rows:
        for images in _slices(batch, fitting // rows):
            yield _Chunk(images, slice(0, rows))
        return
    for image in range(batch):
        for some in _slices(rows, fitting):
            yield _Chunk(slice(image, image + 1), some)


def _slices(size: int, most: int) -> Iterator[slice]:
    count = -(-size // most)
    for i in range(count):
        yield slice(size * i // count, size * (i + 1) // count)


class _Gathered:
    """A tensor [B, side, …] put together from its chunks. The only chunk is taken as it is, without a copy."""

    def __init__(self, q: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.q, self.shape, self.dtype = q, tuple(shape), dtype
        self.whole: Tensor | None = None

    def put(self, chunk: _Chunk, part: Tensor) -> None:
        if part.shape == self.shape and part.dtype == self.dtype and part.is_contiguous():
            self.whole = part
            return
        if self.whole is None:
            self.whole = self.q.new_empty(self.shape, dtype=self.dtype)
        chunk.of(self.whole, self.q.shape[1]).copy_(part)

    def tensor(self) -> Tensor:
        """All of it; empty where there was no chunk."""
        return self.q.new_empty(self.shape, dtype=self.dtype) if self.whole is None else self.whole


class _Inputs(NamedTuple):
    """What the core operator takes for one chunk, and its queries by head [H, n, D]."""

    arguments: tuple[Any, ...]
    by_head: Tensor


def _inputs(
    chunk: _Chunk, q: Tensor, keys: list[Tensor], values: list[Tensor], encoders: list[_Encoder], masks: list[Tensor]
) -> _Inputs:
    side = q.shape[1]
    part = chunk.of(q, side)
    by_head = part.flatten(0, 2).transpose(0, 1)
    shape = (q.shape[3], *part.shape[:3])
    sums = torch.promote_types(torch.float32, q.dtype)
    arguments = (
        part,
        [chunk.of(grid, side) for grid in keys],
        [chunk.of(grid, side) for grid in values],
        [chunk.of(encoder.features, side) for encoder in encoders],
        [encoder.position for encoder in encoders],
        [torch.bmm(by_head, encoder.key).view(*shape, -1) for encoder in encoders],
        [torch.bmm(by_head.to(sums), encoder.key_bias.to(sums).unsqueeze(2)).view(shape) for encoder in encoders],
        [chunk.of(mask, side) for mask in masks],
    )
    return _Inputs(arguments, by_head)


@torch.library.custom_op("mmoe::sva_absorbed", mutates_args=())
def sva_absorbed(
    q: Tensor, keys: list[Tensor], values: list[Tensor], absorbed: list[Tensor], masks: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """The output [B, L, L, H·D] and the log of the softmax's sum [B, L, L, H]; everything in the dtype of ``q``.

    ``absorbed`` holds :data:`FIELDS` tensors an encoder; masks are one per encoder, projected before absorbed, empty
    for none.
    """
    with torch.autocast(q.device.type, enabled=False):
        encoders = _encoders(q, absorbed)
        sums = torch.promote_types(torch.float32, q.dtype)
        out, lse = _Gathered(q, q.shape, q.dtype), _Gathered(q, q.shape[:4], sums)
        for chunk in _chunks(q, encoders):
            arguments, by_head = _inputs(chunk, q, keys, values, encoders, masks)
            mixed, chunk_lse, pooled, mass = torch.ops.mmoe.sva(*arguments, eps)
            total = mixed.view(-1, *q.shape[3:]).transpose(0, 1).to(sums)
            for encoder, summed, share in zip(encoders, pooled, mass, strict=True):
                total += torch.bmm(summed.flatten(1, 3), encoder.value.transpose(1, 2))
                total += share.view(*by_head.shape[:2], 1) * encoder.value_bias.unsqueeze(1)
            out.put(chunk, total.transpose(0, 1).unflatten(0, chunk_lse.shape[:3]))
            lse.put(chunk, chunk_lse)
        return out.tensor().flatten(3), lse.tensor()


class _WeightGradients:
    """Gradients of one encoder's position and folded projections, added up over the chunks in fp32 at least."""

    def __init__(self, encoder: _Encoder) -> None:
        sums = torch.promote_types(torch.float32, encoder.key.dtype)
        self.position, self.key, self.key_bias, self.value, self.value_bias = (
            torch.zeros_like(tensor, dtype=sums) for tensor in encoder[1:]
        )

    def add(self, encoder: _Encoder, gradients: tuple[Tensor, ...], by_head: Tensor, out_by_head: Tensor) -> None:
        """``gradients`` of features, absorbed and constants, then pooled and mass, for the queries ``by_head``."""
        features, absorbed, constants, pooled, mass = gradients
        sums = self.key.dtype
        _add_product(self.key, by_head.transpose(1, 2), absorbed.flatten(1, 3))
        _add_product(self.value, out_by_head.transpose(1, 2), pooled.flatten(1, 3))
        self.key_bias += torch.bmm(constants.flatten(1).unsqueeze(1), by_head.to(sums)).squeeze(1)
        self.value_bias += torch.bmm(mass.flatten(1).unsqueeze(1), out_by_head.to(sums)).squeeze(1)
        if self.position.numel() > 0:
            batch, rows, columns = mass.shape[1:]
            m = features.shape[1] // rows
            cells = features.view(batch, rows, m, columns, m, -1)
            # By columns, because a sum in another dtype copies what it reads on a CPU.
            for some in cells.split(8, dim=3):
                self.position += some.sum((0, 1, 3), dtype=sums).flatten(0, 1)

    def unfold(self, absorbed: list[Tensor]) -> list[Tensor]:
        """Those of the seven tensors after ``features``, in their dtype."""
        _, position, key_gain, key_shift, key, value_gain, value_shift, value = absorbed
        made = [self.position]
        for grad, grad_bias, gain, shift, weight in (
            (self.key, self.key_bias, key_gain, key_shift, key),
            (self.value, self.value_bias, value_gain, value_shift, value),
        ):
            grad, grad_bias = grad.flatten(0, 1), grad_bias.flatten()
            made += [(grad * weight).sum(0), (grad_bias[:, None] * weight).sum(0)]
            made.append(grad.mul_(gain).addr_(grad_bias, shift.to(grad.dtype)))
        return [grad.to(position.dtype) for grad in made]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
        return
    # A few heads at a time: the product, and what adding it to another dtype takes on a CPU, are three times its size.
    for some, *factors in zip(*(tensor.split(4) for tensor in (total, left, right)), strict=True):
        some += torch.bmm(*factors)


class _Gradients:
    """What the backward returns, filled chunk by chunk; ``grids``: of keys, values and features."""

    def __init__(self, q: Tensor, keys: list[Tensor], values: list[Tensor], encoders: list[_Encoder]) -> None:
        self.q = _Gathered(q, q.shape, q.dtype)
        features = [encoder.features for encoder in encoders]
        self.grids = [_Gathered(q, grid.shape, q.dtype) for grid in (*keys, *values, *features)]
        self.weights = [_WeightGradients(encoder) for encoder in encoders]


def _add_chunk(
    gradients: _Gradients,
    chunk: _Chunk,
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    encoders: list[_Encoder],
    masks: list[Tensor],
    lse: Tensor,
    eps: float,
) -> None:
    sums, side = torch.promote_types(torch.float32, q.dtype), q.shape[1]
    arguments, by_head = _inputs(chunk, q, keys, values, encoders, masks)
    grad = chunk.of(grad_out, side)
    out_by_head = grad.reshape(-1, *q.shape[3:]).transpose(0, 1)
    shape = (q.shape[3], *grad.shape[:3])
    grad_pooled = [torch.bmm(out_by_head, encoder.value).view(*shape, -1) for encoder in encoders]
    grad_mass = [
        torch.bmm(out_by_head.to(sums), encoder.value_bias.to(sums).unsqueeze(2)).view(shape) for encoder in encoders
    ]
    of_q, of_keys, of_values, of_features, *rest = torch.ops.mmoe.sva_backward(
        grad, grad_pooled, grad_mass, *arguments, chunk.of(lse, side), eps
    )
    del arguments, grad_pooled
    total = of_q.flatten(0, 2).transpose(0, 1).to(sums)
    of_encoders = zip(of_features, *rest, strict=True)
    for encoder, weights, parts in zip(encoders, gradients.weights, of_encoders, strict=True):
        _, of_absorbed, of_constants, _, _ = parts
        total += torch.bmm(of_absorbed.flatten(1, 3), encoder.key.transpose(1, 2))
        total += of_constants.flatten(1).unsqueeze(2) * encoder.key_bias.unsqueeze(1)
        weights.add(encoder, parts, by_head, out_by_head)
    gradients.q.put(chunk, total.transpose(0, 1).unflatten(0, of_q.shape[:3]))
    for whole, part in zip(gradients.grids, (*of_keys, *of_values, *of_features), strict=True):
        whole.put(chunk, part)


@torch.library.custom_op("mmoe::sva_absorbed_backward", mutates_args=())
def sva_absorbed_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    absorbed: list[Tensor],
    masks: list[Tensor],
    lse: Tensor,
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of q, keys, values and of the tensors of ``absorbed``."""
    with torch.autocast(q.device.type, enabled=False):
        encoders = _encoders(q, absorbed)
        gradients = _Gradients(q, keys, values, encoders)
        for chunk in _chunks(q, encoders):
            _add_chunk(gradients, chunk, grad_out, q, keys, values, encoders, masks, lse, eps)
        del encoders  # as large as what unfolding their gradients takes
        grids = [grid.tensor() for grid in gradients.grids]
        of_absorbed = []
        for i, weights in enumerate(gradients.weights):
            of_absorbed += [grids[2 * len(keys) + i], *weights.unfold(absorbed[i * FIELDS : (i + 1) * FIELDS])]
        return gradients.q.tensor(), grids[: len(keys)], grids[len(keys) : 2 * len(keys)], of_absorbed


@sva_absorbed.register_fake
def _fake(
    q: Tensor, keys: list[Tensor], values: list[Tensor], absorbed: list[Tensor], masks: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    sums = torch.promote_types(torch.float32, q.dtype)
    return q.new_empty(*q.shape[:3], q.shape[3] * q.shape[4]), q.new_empty(q.shape[:4], dtype=sums)


@sva_absorbed_backward.register_fake
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    absorbed: list[Tensor],
    masks: list[Tensor],
    lse: Tensor,
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    of_keys, of_values, of_absorbed = ([part.new_empty(part.shape) for part in p] for p in (keys, values, absorbed))
    return q.new_empty(q.shape), of_keys, of_values, of_absorbed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, absorbed, masks, ctx.eps = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.projected, ctx.fields = len(keys), len(absorbed)
    ctx.save_for_backward(q, lse, *keys, *values, *absorbed, *masks)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, lse, *rest = ctx.saved_tensors
    keys, values, rest = rest[: ctx.projected], rest[ctx.projected : 2 * ctx.projected], rest[2 * ctx.projected :]
    absorbed, masks = rest[: ctx.fields], rest[ctx.fields :]
    grads = sva_absorbed_backward(grad_out, q, keys, values, absorbed, masks, lse, ctx.eps)
    return *grads, [None] * len(masks), None


sva_absorbed.register_autograd(_backward, setup_context=_setup_context)
