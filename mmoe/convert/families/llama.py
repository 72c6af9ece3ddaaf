"""A Llama-shaped language model as transformers' ``LlamaForCausalLM`` stores it."""

from typing import Any

from mmoe.convert.families.fields import only, rope_of
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError
from mmoe.recipe.load import typed
from mmoe.recipe.model import Llama


def table(backbone: Llama) -> Table:
    """Names of the language model; a tied output layer is the embedding."""
    tied = ("lm_head.weight",) if backbone.tied_embeddings else ()
    entries = [
        Entry("language.embedding.word_embeddings.weight", ("model.embed_tokens.weight",), tied=tied),
        Entry("language.decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not backbone.tied_embeddings:
        entries.append(Entry("language.output_layer.weight", ("lm_head.weight",)))
    for layer in range(backbone.layers):
        ours, theirs = f"language.decoder.layers.{layer}", f"model.layers.{layer}"
        attention = [(f"attention.{name}", f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        norms = [(name, name) for name in ("input_layernorm", "post_attention_layernorm")]
        same = [*attention, *norms, ("mlp.linear_fc2", "mlp.down_proj")]
        entries += [Entry(f"{ours}.{mine}.weight", (f"{theirs}.{other}.weight",)) for mine, other in same]
        gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        entries.append(Entry(f"{ours}.mlp.linear_fc1.weight", gate_up))
    return Table(entries)


def to_config(backbone: Llama, dtype: str) -> dict[str, Any]:
    """The fields of transformers' ``LlamaConfig``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.ffn_hidden_size,
        "num_hidden_layers": backbone.layers,
        "num_attention_heads": backbone.heads,
        "num_key_value_heads": backbone.kv_heads,
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": backbone.max_position,
        "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
        "rope_theta": backbone.rope_theta,
        "rms_norm_eps": backbone.norm_eps,
        "initializer_range": backbone.init_std,
        "tie_word_embeddings": backbone.tied_embeddings,
    }


def from_config(config: dict[str, Any], where: str) -> Llama:
    """The sizes in a ``config.json``.

    Raises:
        UserError: a missing field, or a variant that is not supported.
    """
    rope = rope_of(config, where)
    only(config, {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}, where)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        even = type(heads) is int and type(hidden) is int and heads > 0 and hidden % heads == 0
        fields = {
            "type": "llama",
            "vocab_size": config["vocab_size"],
            "hidden_size": hidden,
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or (hidden // heads if even else 0),
            "ffn_hidden_size": config["intermediate_size"],
            "max_position": config["max_position_embeddings"],
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4)),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "init_std": config.get("initializer_range", 0.02),
            "tied_embeddings": config.get("tie_word_embeddings", False),
        }
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}", where, "is it a whole export?") from None
    return typed(Llama, fields, where)
