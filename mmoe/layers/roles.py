"""What a parameter does in the model, and what follows from that: its first weights' spread and its learning rate.

A recipe with a ``[transfer]`` table was tuned at a narrow proxy of width ``base_width`` and is trained s times as wide,
s = hidden_size / base_width. LongCat-Flash (arXiv 2509.01322, on hyper-parameter transfer) takes the "Adam LR Full
Align" rules for the standard parameterisation from arXiv 2407.05872:

    embedding              σ² and η as in the proxy
    hidden, unembedding    σ² / s, η / s

Everything that maps from the hidden size, or from a width that grows with it, counts as hidden there: attention, dense
FFN, experts and the router, which the report does not name; its inputs are s times as many, its outputs are not, as in
the unembedding. Norm weights are vector-like in arXiv 2407.05872 and keep η, as embeddings do. The vision encoders and
the connector have widths of their own, which this scale says nothing about.
"""

import math
from typing import Literal

from mmoe.recipe.schema import Recipe

Role = Literal[
    "embedding", "unembedding", "hidden", "residual", "router", "expert_in", "expert_out", "vector", "vision"
]

_BY_MODULE: dict[str, Role] = {
    "word_embeddings": "embedding",
    "embed_tokens": "embedding",
    "output_layer": "unembedding",
    "eh_proj": "hidden",
    "q_proj": "hidden",
    "k_proj": "hidden",
    "v_proj": "hidden",
    "q_a_proj": "hidden",
    "q_b_proj": "hidden",
    "kv_a_proj_with_mqa": "hidden",
    "kv_b_proj": "hidden",
    "o_proj": "residual",
    "linear_fc1": "hidden",
    "linear_fc2": "residual",
    "router": "router",
    "w1": "expert_in",
    "w2": "expert_out",
    "q_a_layernorm": "vector",
    "kv_a_layernorm": "vector",
    "input_layernorm": "vector",
    "post_attention_layernorm": "vector",
    "final_layernorm": "vector",
    # Scales of FP8, which no draw must touch.
    "fp8": "vector",
    "enorm": "vector",
    "hnorm": "vector",
}


def role_of(parameter_name: str) -> Role:
    """The role of a parameter by its name in ``MultimodalModel``, for example ``language.output_layer.weight``.

    Raises:
        KeyError: a name of the language model that no role is known for.
    """
    if not parameter_name.startswith("language."):
        return "vision"
    for part in reversed(parameter_name.split(".")):
        if part in _BY_MODULE:
            return _BY_MODULE[part]
    raise KeyError(f"{parameter_name} has no role")


def width_factor(recipe: Recipe) -> float:
    """s: the hidden size over the proxy's; 1 without a ``[transfer]`` table."""
    return recipe.model.backbone.hidden_size / recipe.transfer.base_width if recipe.transfer else 1.0


def init_std(role: Role, recipe: Recipe) -> float:
    """Standard deviation of a parameter's normal first weights.

    Raises:
        KeyError: ``vector`` (norm weights start at one) and ``vision`` (its modules choose their own).
    """
    backbone = recipe.model.backbone
    if role == "router":
        assert recipe.model.moe is not None
        return recipe.model.moe.router_init_std / math.sqrt(width_factor(recipe))
    base = {
        "embedding": backbone.embedding_init_std,
        "unembedding": backbone.init_std,
        "hidden": backbone.init_std,
        "residual": backbone.residual_init_std,
        "expert_in": backbone.init_std,
        "expert_out": backbone.residual_init_std,
    }[role]
    return base if role == "embedding" else base / math.sqrt(width_factor(recipe))


def lr_multiplier(role: Role, recipe: Recipe) -> float:
    """The factor on the schedule's learning rate."""
    return 1.0 if role in ("embedding", "vector", "vision") else 1 / width_factor(recipe)
