"""A recipe as the configuration that Megatron-Core's modules and ours read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import silu

from mmoe.layers.choice import Choice, choose, megatron_settings
from mmoe.parallel.engine import TransformerConfig, version_settings
from mmoe.recipe.model import MTP, AnyBackbone, Llama, Longcat, MoE
from mmoe.recipe.schema import Precision, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LanguageConfig(TransformerConfig):
    """Megatron's configuration plus the recipe's own tables, which our layers read."""

    backbone: AnyBackbone = field(default=None)  # type: ignore[assignment]
    mtp: MTP | None = None
    recompute: str = "none"
    overlap_moe: bool = True
    precision: Precision = field(default_factory=Precision)
    choice: Choice = field(default=None)  # type: ignore[assignment]


@dataclass
class LongcatConfig(LanguageConfig):
    backbone: Longcat = field(default=None)  # type: ignore[assignment]
    moe: MoE = field(default=None)  # type: ignore[assignment]


@dataclass
class LlamaConfig(LanguageConfig):
    backbone: Llama = field(default=None)  # type: ignore[assignment]


def make_config(recipe: Recipe) -> LongcatConfig | LlamaConfig:
    """What the layers of ``recipe``'s backbone read, for this machine.

    Raises:
        UserError: a precision that this machine, or this size, cannot have.
    """
    backbone, moe = recipe.model.backbone, recipe.model.moe
    common = _common(recipe)
    if isinstance(backbone, Llama):
        return LlamaConfig(
            backbone=backbone, num_query_groups=backbone.kv_heads, kv_channels=backbone.head_dim, **common
        )
    assert moe is not None
    return LongcatConfig(
        backbone=backbone,
        moe=moe,
        num_moe_experts=moe.experts,
        moe_ffn_hidden_size=moe.expert_hidden_size,
        moe_router_topk=moe.top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        **common,
    )


def _common(recipe: Recipe) -> dict[str, Any]:
    backbone, parallel = recipe.model.backbone, recipe.parallel
    dtype = DTYPES[recipe.precision.dtype]
    choice = choose(recipe.precision)
    stages = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

    return dict(
        mtp=recipe.model.mtp,
        recompute=parallel.recompute,
        overlap_moe=parallel.overlap_moe,
        precision=recipe.precision,
        choice=choice,
        num_layers=backbone.layers,
        hidden_size=backbone.hidden_size,
        num_attention_heads=backbone.heads,
        ffn_hidden_size=backbone.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=stages,
        # Batched sends of two stages to one peer arrive in the wrong order on gloo, in silence.
        overlap_p2p_comm=stages is not None,
        batch_p2p_comm=stages is None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=backbone.norm_eps,
        # mmoe.layers.initialise gives the weights their first values.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        # Losses are summed over tokens and divided once by the global number: layouts then agree to rounding.
        calculate_per_token_loss=True,
        **(full if parallel.recompute == "full" else {}),
        **version_settings(),
        **megatron_settings(recipe, choice),
    )
