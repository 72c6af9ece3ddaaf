"""Floating-point operations of a training step: the model's, not the implementation's.

A matrix of n weights costs a token 2n operations forward and 4n backward. Per token and ScMoE layer, with hidden size
D, H heads, latent ranks q and c, head widths n (nope), r (rope), v, dense width F, expert width f, N FFN and Z zero
experts, K FFN experts for the mean token (measured, not the target) and s tokens a sequence:

    2 MLA         D q + q H (n + r) + D (c + r) + c H (n + v) + H v D    weights each
    2 dense FFN   3 D F                                                  weights each
    router        D (N + Z)                                              weights
    experts       K · 3 D f                                              weights
    2 attentions  H (n + r + v) · (s + 1)/2                              products each: those a causal mask allows

and D V weights of the output layer. Not counted: norms, softmax, activations, rotary embedding, the embedding's
look-up, the optimizer, and whatever is computed twice or for nothing.
"""

from benchmarks.training import parts_of
from mmoe.recipe.model import Longcat, Model


def attention_weights(shape: Longcat) -> int:
    """Of one MLA."""
    heads, width = shape.heads, shape.hidden_size
    return (
        width * shape.q_lora_rank
        + shape.q_lora_rank * heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        + width * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        + shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        + heads * shape.v_head_dim * width
    )


def active_weights(model: Model, active_experts: float) -> float:
    """Weights that take part in a matrix product for the mean token; embeddings do not."""
    shape, moe = parts_of(model)
    width = shape.hidden_size
    layer = (
        2 * attention_weights(shape)
        + 2 * 3 * width * shape.ffn_hidden_size
        + width * (moe.experts + moe.zero_experts)
        + active_experts * 3 * width * moe.expert_hidden_size
    )
    return shape.layers * layer + width * shape.vocab_size


def per_token(model: Model, active_experts: float, sequence: int) -> float:
    """Operations of a training step (forward and backward) for one token."""
    shape, _ = parts_of(model)
    head = shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim
    products = shape.layers * 2 * shape.heads * head * (sequence + 1) / 2
    return 6 * (active_weights(model, active_experts) + products)
