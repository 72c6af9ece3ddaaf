"""Routing to FFN experts and zero-computation experts."""

from typing import Any

import torch
from torch import Tensor

from mmoe.ops import check, kernel, load_library
from mmoe.reference import router as reference
from mmoe.reference.router import Identity, RouterOutput, Score

__all__ = ["RouterOutput", "router"]

HALVES = (torch.bfloat16, torch.float16)
# What the CUDA kernels hold in the registers of a warp, a column each or a group each.
CUDA_LIMITS = {"N+Z": 2304, "top_k": 32, "selection_groups": 32}


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
    """Choose ``top_k`` of N FFN experts and Z zero experts a token, by score plus bias; weigh them by the score alone.

    LongCat-Flash, arXiv 2509.01322, section 2.1: s = softmax(logits); the slots are the top k of s + b; slot weight
    w = scaling · s (never b, not renormalised); a slot ≥ N is a zero expert, whose output is w · x.

    Args:
        logits: [T, N+Z] float32 (float64 for checks; bfloat16 and float16 are cast to float32 under autocast, and
            refused without it). T may be 0. Takes gradient. On CUDA N+Z ≤ 2304.
        bias: [N+Z], dtype of ``logits``: added for the choice only, takes no gradient.
        zero_experts: Z, the last columns.
        top_k: k, 1 … N+Z; on CUDA at most 32.
        scaling: factor on every weight (``routed_scaling_factor``).
        score: ``softmax`` over all columns, or ``sigmoid`` of each.
        renormalize: divide the k chosen scores by their sum (+ 1e-20) before scaling.
        balance_groups: D; group j holds the j-th of D equal runs of FFN experts, group D all zero experts.
        selection_groups: G > 1 limits the choice to groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): the FFN
            experts are G equal runs of at least two, a run's rank is the sum of its two best s + b, and those outside
            the ``selected_groups`` best (ties to the lowest) cannot be chosen. Zero experts always can. On CUDA G ≤ 32.
        selected_groups: 1 … G, enough to leave k experts.
        valid: [T] bool or None. A False token (padding) is routed, but is left out of ``counts`` and ``group_probs``,
            and its ``identity`` is 0.
        identity: weight of x for a token's zero slots: ``scaled`` Σ w (the released models), ``unscaled`` Σ w before
            scaling, ``copy`` their number, ``drop`` 0.

    Returns:
        ids [T, k] int64, by falling s + b, ties to the lowest index (NaN ranks first); weights [T, k], of every slot;
        identity [T]; counts [N+Z] int64, chosen slots per expert; group_probs [D+1], per group the sum over tokens of
        the probability mass (sigmoid scores divided by their sum). Floats have the dtype of ``logits``; weights,
        identity and group_probs carry gradient to it.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check.ndim("logits", logits, 2)
    bias = bias.detach()
    if torch.is_autocast_enabled(logits.device.type):
        logits, bias = (tensor.float() if tensor.dtype in HALVES else tensor for tensor in (logits, bias))
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits is {logits.dtype}, must be torch.float32 or torch.float64")
    check.one_device(logits=logits, bias=bias, valid=valid)
    tokens, slots = logits.shape
    check.shape("bias", bias, (slots,))
    check.dtype("bias", bias, logits.dtype)
    if not 0 <= zero_experts < slots:
        raise ValueError(
            f"router: zero_experts is {zero_experts}, must be in 0 … {slots - 1} for {slots} columns of logits"
        )
    experts = slots - zero_experts
    if not 1 <= top_k <= slots:
        raise ValueError(f"router: top_k is {top_k}, must be in 1 … {slots}")
    if balance_groups < 1 or experts % balance_groups:
        raise ValueError(f"router: balance_groups is {balance_groups}, must divide the {experts} FFN experts")
    _check_groups(experts, zero_experts, top_k, selection_groups, selected_groups)
    check.choice("score", score, ("softmax", "sigmoid"))
    check.choice("identity", identity, ("scaled", "unscaled", "copy", "drop"))
    if valid is not None:
        check.shape("valid", valid, (tokens,))
        check.boolean("valid", valid)
    if logits.device.type == "cuda":
        for name, value in (("N+Z", slots), ("top_k", top_k), ("selection_groups", selection_groups)):
            if value > CUDA_LIMITS[name]:
                raise ValueError(f"router: {name} is {value}, must be at most {CUDA_LIMITS[name]} on CUDA")
    compiled = kernel("router", logits)
    if compiled is None:
        return reference.router(
            logits,
            bias,
            zero_experts=zero_experts,
            top_k=top_k,
            scaling=scaling,
            score=score,
            renormalize=renormalize,
            balance_groups=balance_groups,
            selection_groups=selection_groups,
            selected_groups=selected_groups,
            valid=valid,
            identity=identity,
        )
    weights, identity_weight, group_probs, _, ids, counts = compiled(
        logits,
        bias,
        valid,
        zero_experts,
        top_k,
        scaling,
        score,
        renormalize,
        balance_groups,
        selection_groups,
        selected_groups,
        identity,
    )
    return RouterOutput(ids, weights, identity_weight, counts, group_probs)


def _check_groups(experts: int, zero_experts: int, top_k: int, selection_groups: int, selected_groups: int) -> None:
    if selection_groups < 1 or experts % selection_groups or experts // selection_groups < min(2, selection_groups):
        raise ValueError(
            f"router: selection_groups is {selection_groups}, must divide the {experts} FFN experts into groups of two "
            "or more"
        )
    if not 1 <= selected_groups <= selection_groups:
        raise ValueError(f"router: selected_groups is {selected_groups}, must be in 1 … {selection_groups}")
    eligible = selected_groups * (experts // selection_groups) + zero_experts
    if eligible < top_k:
        raise ValueError(f"router: selected_groups is {selected_groups}, leaves {eligible} experts to top_k {top_k}")


def _fake(
    logits: Tensor,
    bias: Tensor,
    valid: Tensor | None,
    zero_experts: int,
    top_k: int,
    scaling: float,
    score: str,
    renormalize: bool,
    balance_groups: int,
    selection_groups: int,
    selected_groups: int,
    identity: str,
) -> tuple[Tensor, ...]:
    tokens, slots = logits.shape
    return (
        logits.new_empty((tokens, top_k)),
        logits.new_empty(tokens),
        logits.new_empty(balance_groups + 1),
        logits.new_empty((tokens, 2)),
        logits.new_empty((tokens, top_k), dtype=torch.int64),
        logits.new_empty(slots, dtype=torch.int64),
    )


def _fake_backward(
    grad_weights: Tensor | None,
    grad_identity: Tensor | None,
    grad_group_probs: Tensor | None,
    logits: Tensor,
    valid: Tensor | None,
    ids: Tensor,
    stats: Tensor,
    zero_experts: int,
    scaling: float,
    score: str,
    renormalize: bool,
    balance_groups: int,
    identity: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, valid, zero_experts, _, scaling, score, renormalize, balance_groups, _, _, identity = inputs
    *_, stats, ids, counts = output
    ctx.mark_non_differentiable(ids, counts, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, valid, ids, stats)
    ctx.options = zero_experts, scaling, score, renormalize, balance_groups, identity


def _backward(
    ctx: Any,
    grad_weights: Tensor | None,
    grad_identity: Tensor | None,
    grad_group_probs: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    grads = grad_weights, grad_identity, grad_group_probs
    if all(grad is None for grad in grads):
        return (None,) * 12
    return torch.ops.mmoe.router_backward(*grads, *ctx.saved_tensors, *ctx.options), *(None,) * 11


if load_library():
    torch.library.register_fake("mmoe::router", _fake)
    torch.library.register_fake("mmoe::router_backward", _fake_backward)
    torch.library.register_autograd("mmoe::router", _backward, setup_context=_setup_context)
