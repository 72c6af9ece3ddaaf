"""Routing to FFN experts and zero-computation experts."""

from torch import Tensor

from mmoe.ops import check
from mmoe.reference import router as reference
from mmoe.reference.router import Identity, RouterOutput, Score

__all__ = ["RouterOutput", "router"]


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
    valid: Tensor | None = None,
    identity: Identity = "scaled",
) -> RouterOutput:
    """Choose ``top_k`` of N FFN experts and Z zero experts a token, by score plus bias; weigh them by the score alone.

    LongCat-Flash, arXiv 2509.01322, section 2.1: s = softmax(logits); the slots are the top k of s + b; slot weight
    w = scaling · s (never b, not renormalised); a slot ≥ N is a zero expert, whose output is w · x.

    Args:
        logits: [T, N+Z] float32 (float64 for checks). T may be 0. Takes gradient.
        bias: [N+Z], dtype of ``logits``: added for the choice only, takes no gradient.
        zero_experts: Z, the last columns.
        top_k: k, 1 … N+Z.
        scaling: factor on every weight (``routed_scaling_factor``).
        score: ``softmax`` over all columns, or ``sigmoid`` of each.
        renormalize: divide the k chosen scores by their sum before scaling.
        balance_groups: D; group j holds the j-th of D equal runs of FFN experts, group D all zero experts.
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
    check.floating("logits", logits)
    tokens, slots = logits.shape
    check.shape("bias", bias, (slots,))
    check.dtype("bias", bias, logits.dtype)
    if not 0 <= zero_experts < slots:
        raise ValueError(
            f"router: zero_experts is {zero_experts}, must be in 0 … {slots - 1} for {slots} columns of logits"
        )
    if not 1 <= top_k <= slots:
        raise ValueError(f"router: top_k is {top_k}, must be in 1 … {slots}")
    if balance_groups < 1 or (slots - zero_experts) % balance_groups:
        raise ValueError(
            f"router: balance_groups is {balance_groups}, must divide the {slots - zero_experts} FFN experts"
        )
    check.choice("score", score, ("softmax", "sigmoid"))
    check.choice("identity", identity, ("scaled", "unscaled", "copy", "drop"))
    if valid is not None:
        check.shape("valid", valid, (tokens,))
        check.boolean("valid", valid)
    return reference.router(
        logits,
        bias,
        zero_experts=zero_experts,
        top_k=top_k,
        scaling=scaling,
        score=score,
        renormalize=renormalize,
        balance_groups=balance_groups,
        valid=valid,
        identity=identity,
    )
