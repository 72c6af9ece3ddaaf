"""The router of zero-computation experts (LongCat-Flash, arXiv 2509.01322, section 2.1) in plain PyTorch."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]
Identity = Literal["scaled", "unscaled", "copy", "drop"]


class RouterOutput(NamedTuple):
    """What :func:`router` returns; ``ids`` and ``counts`` take no gradient."""

    ids: Tensor
    weights: Tensor
    identity: Tensor
    counts: Tensor
    group_probs: Tensor


def router(
    logits: Tensor,
    bias: Tensor,
    *,
    zero_experts: int,
    top_k: int,
    scaling: float = 1.0,
    score: Score = "softmax",
    renormalize: bool = False,
    balance_groups: int = 1,
    selection_groups: int = 1,
    selected_groups: int = 1,
    valid: Tensor | None = None,
    identity: Identity = "scaled",
) -> RouterOutput:
    """Choose experts by score + bias, weigh them by the score alone. Contract: :func:`mmoe.ops.router.router`."""
    slots = logits.shape[1]
    experts = slots - zero_experts
    if score == "softmax":
        scores = probs = logits.softmax(-1)
    else:
        scores = logits.sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)

    # torch.topk leaves the order of ties open; a stable sort gives them to the lowest index.
    choice = scores.detach() + bias
    order = choice.sort(dim=-1, descending=True, stable=True).indices
    if selection_groups > 1:
        groups = choice[:, :experts].unflatten(1, (selection_groups, -1))
        ranked = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :selected_groups]
        eligible = torch.ones_like(choice, dtype=torch.uint8)
        eligible[:, :experts] = (
            torch.zeros_like(ranked, dtype=torch.uint8)
            .scatter(1, best, 1)
            .repeat_interleave(experts // selection_groups, 1)
        )
        # Behind every eligible one, whatever it scores.
        order = order.gather(1, eligible.gather(1, order).sort(dim=-1, descending=True, stable=True).indices)
    ids = order[:, :top_k]
    chosen = scores.gather(1, ids)
    if renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    weights = chosen * scaling

    is_zero = ids >= experts
    if identity == "copy":
        identity_weight = is_zero.to(weights.dtype).sum(-1)
    elif identity == "drop":
        identity_weight = weights.new_zeros(weights.shape[0])
    else:
        source = weights if identity == "scaled" else chosen
        identity_weight = source.masked_fill(~is_zero, 0).sum(-1)

    counted = ids
    if valid is not None:
        identity_weight = identity_weight.masked_fill(~valid, 0)
        probs = probs.masked_fill(~valid[:, None], 0)
        counted = ids.masked_fill(~valid[:, None], slots)
    counts = torch.bincount(counted.flatten(), minlength=slots + 1)[:slots]
    mass = probs.sum(0)
    group_probs = torch.cat([mass[:experts].view(balance_groups, -1).sum(1), mass[experts:].sum(0, keepdim=True)])
    return RouterOutput(ids, weights, identity_weight, counts, group_probs)
