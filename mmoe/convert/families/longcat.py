"""LongCat-Flash as transformers' ``LongcatFlashForCausalLM`` stores it.

The experts lie in one of two layouts: a tensor for each expert, as in published checkpoints and after
``save_pretrained``, or ``fused``, transformers' parameters as they are. Both have gate and up projections for N+Z
experts, the last Z of which no computation reads: they are written as zeros and never read.
"""

from collections.abc import Iterable
from typing import Any

from mmoe.convert.families.fields import only, rope_of
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.recipe.load import typed
from mmoe.recipe.model import Longcat, MoE

ATTENTION = (
    "q_a_proj.weight",
    "q_a_layernorm.weight",
    "q_b_proj.weight",
    "kv_a_proj_with_mqa.weight",
    "kv_a_layernorm.weight",
    "kv_b_proj.weight",
    "o_proj.weight",
)
SELECTION_BIAS = "e_score_correction_bias"
MTP = "model.mtp."
"""Multi-token prediction: published with the checkpoints, read by those who serve them, left aside by transformers."""


def _mtp() -> list[Entry]:
    ours, theirs = "language.mtp", MTP
    layer = f"{theirs}layers.0"
    mlp = f"{layer}.transformer_layer.mlp"
    same = ("eh_proj", "input_layernorm", "post_attention_layernorm")
    return [
        Entry(f"{ours}.embed_tokens.weight", (f"{theirs}embed_tokens.weight",)),
        Entry(f"{ours}.final_layernorm.weight", (f"{theirs}norm.weight",)),
        *(Entry(f"{ours}.{name}.weight", (f"{layer}.{name}.weight",)) for name in same),
        *(Entry(f"{ours}.{name}.weight", (f"{layer}.{name}.m.weight",)) for name in ("enorm", "hnorm")),
        *(Entry(f"{ours}.attention.{name}", (f"{layer}.self_attn.{name}",)) for name in ATTENTION),
        Entry(f"{ours}.mlp.linear_fc1.weight", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")),
        Entry(f"{ours}.mlp.linear_fc2.weight", (f"{mlp}.down_proj.weight",)),
    ]


def table(backbone: Longcat, moe: MoE, *, fused: bool, mtp: bool = False) -> Table:
    """Names of the language model."""
    entries = [
        Entry("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Entry("language.decoder.final_layernorm.weight", ("model.norm.weight",)),
        Entry("language.output_layer.weight", ("lm_head.weight",)),
    ]
    if mtp:
        entries += _mtp()
    padding: dict[str, str] = {}
    for layer in range(backbone.layers):
        ours, theirs = f"language.decoder.layers.{layer}", f"model.layers.{layer}"
        for block in (0, 1):
            entries += [
                Entry(f"{ours}.attention.{block}.{name}", (f"{theirs}.self_attn.{block}.{name}",)) for name in ATTENTION
            ]
            entries += [
                Entry(f"{ours}.{norm}.{block}.weight", (f"{theirs}.{norm}.{block}.weight",))
                for norm in ("input_layernorm", "post_attention_layernorm")
            ]
            mlp = f"{theirs}.mlps.{block}"
            gate_up = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
            entries.append(Entry(f"{ours}.mlp.{block}.linear_fc1.weight", gate_up))
            entries.append(Entry(f"{ours}.mlp.{block}.linear_fc2.weight", (f"{mlp}.down_proj.weight",)))
        router = f"{theirs}.mlp.router"
        for mine, name in (("weight", "classifier.weight"), (SELECTION_BIAS, SELECTION_BIAS)):
            entries.append(Entry(f"{ours}.moe.router.{mine}", (f"{router}.{name}",), fp32=True))

        experts = f"{theirs}.mlp.experts"
        w1, w2 = f"{ours}.moe.experts.w1", f"{ours}.moe.experts.w2"
        if fused:
            entries.append(Entry(w1, (f"{experts}.gate_up_proj",), unused_rows=moe.zero_experts, halves=True))
            entries.append(Entry(w2, (f"{experts}.down_proj",)))
            continue
        halves = ("gate_proj.weight", "up_proj.weight")
        gate_up = tuple(f"{experts}.{e}.{h}" for e in range(moe.experts) for h in halves)
        entries.append(Entry(w1, gate_up, stacked=moe.experts, halves=True))
        entries.append(
            Entry(w2, tuple(f"{experts}.{e}.down_proj.weight" for e in range(moe.experts)), stacked=moe.experts)
        )
        zero = range(moe.experts, moe.experts + moe.zero_experts)
        padding |= {f"{experts}.{e}.{h}": f"{experts}.0.{h}" for e in zero for h in halves}
    return Table(entries, padding)


def no_parameters(names: Iterable[str]) -> set[str]:
    """Which tensors transformers does not count among the parameters: the selection bias is a buffer there, and it has
    no multi-token prediction."""
    return {name for name in names if name.endswith(f".{SELECTION_BIAS}") or MTP in name}


def check_expressible(moe: MoE) -> None:
    """Raises :class:`UserError` where transformers' model computes something else, whatever its configuration."""
    if moe.order != "shortcut":
        what = "transformers' LongCat-Flash has its experts on the shortcut"
        raise UserError(what, f"model.moe.order = {moe.order!r}", "only models trained with 'shortcut' can be exported")
    if moe.zero_experts and moe.identity != "scaled":
        what = f"transformers' LongCat-Flash scales what its zero experts give, this model has {moe.identity!r}"
        raise UserError(what, "model.moe.identity", "only models trained with 'scaled' can be exported")


def to_config(backbone: Longcat, moe: MoE, dtype: str) -> dict[str, Any]:
    """The fields of transformers' ``LongcatFlashConfig``, and those that vLLM reads besides."""
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        "dtype": dtype,
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.layers,
        "num_attention_heads": backbone.heads,
        "num_key_value_heads": backbone.heads,
        "q_lora_rank": backbone.q_lora_rank,
        "kv_lora_rank": backbone.kv_lora_rank,
        "qk_nope_head_dim": backbone.qk_nope_head_dim,
        "qk_rope_head_dim": backbone.qk_rope_head_dim,
        "qk_head_dim": backbone.qk_nope_head_dim + backbone.qk_rope_head_dim,
        "head_dim": backbone.qk_rope_head_dim,  # transformers builds the rotary frequencies from it
        "v_head_dim": backbone.v_head_dim,
        "ffn_hidden_size": backbone.ffn_hidden_size,
        "expert_ffn_hidden_size": moe.expert_hidden_size,
        "n_routed_experts": moe.experts,
        "zero_expert_num": moe.zero_experts,
        "zero_expert_type": "identity",
        "moe_topk": moe.top_k,
        "routed_scaling_factor": moe.routed_scaling_factor * moe.variance_factor,
        "router_bias": False,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_bias": False,
        "attention_method": "MLA",
        "hidden_act": "silu",
        "max_position_embeddings": backbone.max_position,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        "rope_theta": backbone.rope_theta,
        "rms_norm_eps": backbone.norm_eps,
        "initializer_range": backbone.init_std,
        "tie_word_embeddings": False,
    }


def from_config(config: dict[str, Any], where: str) -> tuple[Longcat, MoE]:
    """The sizes in a ``config.json``; ``active_experts`` is what uniform routing gives, since the file does not say.

    Raises:
        UserError: a missing field, or a variant that is not supported.
    """
    rope = rope_of(config, where)
    plain = {"attention_bias": False, "router_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
    only(config, {**plain, "zero_expert_type": "identity"}, where)
    try:
        backbone = {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "layers": config["num_layers"],
            "heads": config["num_attention_heads"],
            "q_lora_rank": config["q_lora_rank"],
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_nope_head_dim": config["qk_nope_head_dim"],
            "qk_rope_head_dim": config["qk_rope_head_dim"],
            "v_head_dim": config["v_head_dim"],
            "ffn_hidden_size": config["ffn_hidden_size"],
            "max_position": config["max_position_embeddings"],
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e7)),
            "norm_eps": config.get("rms_norm_eps", 1e-5),
            "init_std": config.get("initializer_range", 0.02),
        }
        experts, zeros, top_k = config["n_routed_experts"], config["zero_expert_num"] or 0, config["moe_topk"]
        if any(type(number) is not int or not 0 <= number < 2**31 for number in (experts, zeros, top_k)) or not experts:
            what = "n_routed_experts, zero_expert_num and moe_topk are not numbers of experts"
            raise UserError(what, where, "export the model again")
        moe = {
            "experts": experts,
            "zero_experts": zeros,
            "top_k": top_k,
            "expert_hidden_size": config["expert_ffn_hidden_size"],
            "routed_scaling_factor": config["routed_scaling_factor"],
            "active_experts": top_k * experts / (experts + zeros),
        }
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}", where, "is it a whole export?") from None
    return typed(Longcat, backbone, where), typed(MoE, moe, where)
