"""How far each element of sva's results may be off after fp32 arithmetic: errors to the first order, carried along.

A sum is off by as many units (half of one in the last place of fp32) of the sum of its magnitudes as a term passes
roundings. What a score is off by, a weight is off by relatively. Where x̂ is kept in the storage type, its own error
matters only next to where two of its values meet.
"""

from typing import NamedTuple

import torch
from ops.sva_core import Core
from sva_arguments import windows
from torch import Tensor

UNIT = torch.finfo(torch.float32).eps / 2


def roundings(terms: int) -> int:
    """Of one term of a warp's sum: in its lane, which takes 8 at a time in turn with 31 others, then over the lanes."""
    return 8 * -(-terms // 256) + 6


class Bounds(NamedTuple):
    """Errors, not counting the rounding of a result to its type; those of grids are [B, R, W, m², …]."""

    out: Tensor
    lse: Tensor
    pooled: list[Tensor]
    mass: list[Tensor]
    gradients: list[Tensor]
    """In the order of :meth:`Core.leaves`."""


class Keys(NamedTuple):
    """Of one encoder, [B, R, W, H, K]: scores and gradients of weights, each with its error."""

    scores: Tensor
    scores_off: Tensor
    slopes: Tensor
    slopes_off: Tensor


class Normed:
    """x̂ [B, R, W, K, C] of an absorbed encoder, rounded to ``kept``, and what is known of its error."""

    def __init__(
        self, features: Tensor, position: Tensor, shape: tuple[int, int], eps: float, kept: torch.dtype
    ) -> None:
        x = windows(features.double(), *shape)
        if position.numel():
            x = x + position.double()
        self.channels = x.shape[-1]
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        self.deviation = (variance + eps).rsqrt()
        mean_off = (roundings(self.channels) + 1) * UNIT * x.abs().mean(-1, keepdim=True) + 2 * UNIT * x.abs()
        squares_off = (roundings(self.channels) + 3) * UNIT * variance + 2 * ((x - mean).abs() * mean_off).mean(
            -1, keepdim=True
        )
        self.deviation_off = squares_off / (2 * (variance + eps)) + 4 * UNIT  # relatively
        precise = (x - mean) * self.deviation
        off = self.deviation * mean_off + precise.abs() * (self.deviation_off + 2 * UNIT)
        self.value, self.off, self.rounding = precise, off, torch.zeros_like(off)
        if kept != torch.float32:
            self.value, low, high = (part.to(kept).double() for part in (precise, precise - off, precise + off))
            self.off = torch.maximum(high - self.value, self.value - low)
            self.rounding = self.value - precise

    def mixed_off(self, weights: Tensor) -> Tensor:
        """Of Σ_k weights · x̂ [H, B, R, W, C], as far as x̂ is to blame; weights [B, R, W, H, K]."""
        return torch.einsum("brchk,brcke->hbrce", weights.abs(), self.off)

    def dots(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """row · x̂ [B, R, W, H, K] of a row [H, B, R, W, C], and its error."""

        def product(row: Tensor, x: Tensor) -> Tensor:
            return torch.einsum("hbrce,brcke->brchk", row, x)

        off = product(row.abs(), self.off + roundings(self.channels) * UNIT * self.value.abs())
        return product(row, self.value), off


class Weights(NamedTuple):
    """Of one encoder's keys, [B, R, W, H, K]: softmax weights and gradients of scores, each with its error."""

    values: Tensor
    values_off: Tensor
    slopes: Tensor
    slopes_off: Tensor


def weigh(
    encoders: list[Keys], masks: list[Tensor], shape: tuple[int, int], scale: float
) -> tuple[Tensor, list[Weights]]:
    """The error of lse [B, R, W, H], and every encoder's :class:`Weights`."""
    kept = []
    for encoder, mask in zip(encoders, masks, strict=True):
        if mask.numel():
            valid = windows(mask, *shape)
            valid = valid | ~valid.any(-1, keepdim=True)
            encoder = encoder._replace(scores=encoder.scores.masked_fill(~valid[:, :, :, None], float("-inf")))
        kept.append(encoder)
    scores, scores_off, slopes, slopes_off = (torch.cat(parts, -1) for parts in zip(*kept, strict=True))
    # exp, the running maximum's factors, the sums over keys and, for x̂, over heads.
    terms = (4 * scores.shape[-1] + scores.shape[-2] + 16) * UNIT
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    lse_off = (weights * scores_off).sum(-1) + terms + 2 * UNIT * lse.abs()
    exponents_off = scores_off + lse_off[..., None] + 2 * UNIT * (scores.abs() + lse.abs()[..., None])
    # 0 · inf where masked.
    weights_off = (weights * (exponents_off.expm1() + terms)).nan_to_num(0.0)
    delta = (weights * slopes).sum(-1, keepdim=True)
    delta_off = (weights_off * slopes.abs() + weights * slopes_off).sum(-1, keepdim=True)
    grads = scale * weights * (slopes - delta)
    # The kernel sums slopes and delta apart.
    grads_off = scale * (weights_off * (slopes.abs() + delta.abs()) + weights * (slopes_off + delta_off))
    sizes = [encoder.scores.shape[-1] for encoder in encoders]
    parts = (part.split(sizes, -1) for part in (weights, weights_off, grads, grads_off))
    return lse_off, [Weights(*part) for part in zip(*parts, strict=True)]


def features_off(x: Normed, weights: Weights, absorbed: Tensor, grad_pooled: Tensor) -> Tensor:
    """Of features' gradient [B, R, W, K, C]: LayerNorm's backward of Σ_h weights · grad_pooled + slopes · absorbed.

    Its two means come from the sums of the rows and from their products with x̂.
    """

    def spread(weights: Tensor, row: Tensor) -> Tensor:
        return torch.einsum("brchk,hbrce->brcke", weights, row)

    def over_heads(part: Tensor) -> Tensor:
        return part.sum(3)[..., None] / x.channels

    def sums(row: Tensor) -> Tensor:
        return row.sum(-1).permute(1, 2, 3, 0)[..., None]

    rows = [(weights.values, weights.values_off, grad_pooled), (weights.slopes, weights.slopes_off, absorbed)]
    grad, grad_off = torch.zeros(()), torch.zeros(())
    mean, mean_off, product, product_off = (torch.zeros(()) for _ in range(4))
    for weight, off, row in rows:
        dots, dots_off = x.dots(row)
        grad, grad_off = grad + spread(weight, row), grad_off + spread(off, row.abs())
        mean = mean + over_heads(weight * sums(row))
        mean_off = mean_off + over_heads((off + roundings(x.channels) * UNIT * weight.abs()) * sums(row.abs()))
        product = product + over_heads(weight * dots)
        product_off = product_off + over_heads(off * dots.abs() + weight.abs() * dots_off)
    size = x.value.abs()
    inner = grad_off + mean_off + size * product_off + (x.off + x.rounding.abs()) * product.abs()
    # The function that is compared with takes x̂ as it was before it was rounded here.
    inner = inner + size * (grad * x.rounding).mean(-1, keepdim=True).abs()
    inner = inner + (4 * UNIT + x.deviation_off) * (grad.abs() + mean.abs() + size * product.abs())
    return x.deviation * inner


def bounds(
    arguments: Core,
    grad_out: Tensor,
    grad_pooled: list[Tensor],
    grad_mass: list[Tensor],
    eps: float,
    kept: torch.dtype,
) -> Bounds:
    """The errors of a call and of its backward for these gradients; x̂ is kept in ``kept``."""
    q, keys, values, features, positions, absorbed, constants, masks = arguments
    shape, (heads, width) = (q.shape[1], q.shape[2]), q.shape[3:]
    scale = width**-0.5
    q, grad_out = q.double(), grad_out.double().unflatten(-1, (heads, width))
    keys = [windows(key.double(), *shape).unflatten(-1, (heads, width)) for key in keys]
    values = [windows(value.double(), *shape).unflatten(-1, (heads, width)) for value in values]
    normed = [Normed(*pair, shape, eps, kept) for pair in zip(features, positions, strict=True)]
    absorbed, grad_pooled = ([row.double() for row in rows] for rows in (absorbed, grad_pooled))

    def product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.einsum("brchd,brckhd->brchk", one.abs(), other.abs())
        return torch.einsum("brchd,brckhd->brchk", one, other), (roundings(width) + 1) * UNIT * size

    pairs = zip(keys, values, strict=True)
    encoders = [Keys(*product(scale * q, key), *product(grad_out, value)) for key, value in pairs]
    for x, row, constant, pooled, mass in zip(normed, absorbed, constants, grad_pooled, grad_mass, strict=True):
        (dots, dots_off), (slopes, slopes_off) = x.dots(row), x.dots(pooled)
        added, mass = (part.double().permute(1, 2, 3, 0)[..., None] for part in (constant, mass))
        scores_off = scale * (dots_off + 2 * UNIT * (dots.abs() + added.abs()))
        slopes_off = slopes_off + UNIT * (slopes.abs() + mass.abs())
        encoders.append(Keys(scale * (dots + added), scores_off, slopes + mass, slopes_off))
    lse_off, weights = weigh(encoders, masks, shape, scale)

    of_keys, of_features = weights[: len(keys)], weights[len(keys) :]

    def summed(off: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("brchk,brckhd->brchd", off, rows.abs())

    def mixed(values: Tensor, off: Tensor, x: Normed) -> Tensor:
        return torch.einsum("brchk,brcke->hbrce", off, x.value.abs()) + x.mixed_off(values)

    def per_key(off: Tensor, row: Tensor) -> Tensor:
        return torch.einsum("brchk,brchd->brckhd", off, row.abs()).flatten(-2)

    def by_head(part: Tensor) -> Tensor:
        return part.sum(-1).permute(3, 0, 1, 2)

    nothing = torch.zeros_like(q)
    pairs = list(zip(of_features, normed, strict=True))
    return Bounds(
        sum((summed(one.values_off, value) for one, value in zip(of_keys, values, strict=True)), nothing).flatten(-2),
        lse_off,
        [mixed(one.values, one.values_off, x) for one, x in pairs],
        [by_head(one.values_off) for one in of_features],
        [
            sum((summed(one.slopes_off, key) for one, key in zip(of_keys, keys, strict=True)), nothing),
            *(per_key(one.slopes_off, q) for one in of_keys),
            *(per_key(one.values_off, grad_out) for one in of_keys),
            *(features_off(x, one, *rows) for (one, x), *rows in zip(pairs, absorbed, grad_pooled, strict=True)),
            *(mixed(one.slopes, one.slopes_off, x) for one, x in pairs),
            *(by_head(one.slopes_off) for one in of_features),
        ],
    )
