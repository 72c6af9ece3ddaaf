"""The language model of a recipe as transformers stores it, whichever it is."""

from typing import Any

from mmoe.convert.families import llama, longcat
from mmoe.convert.families.fields import check_same, token_ids
from mmoe.convert.mapping import Table
from mmoe.errors import UserError
from mmoe.recipe.model import Llama, Longcat, Model, MoE

FREE = {"vocab_size", "max_position", "init_std", "embedding_init_std", "residual_init_std", "hidden_z_coefficient"}
"""Fields of a backbone that no weight's shape hangs on, or that are looked at by themselves."""
FREE_EXPERTS = {"routed_scaling_factor", "variance_factor", "active_experts", "router_init_std"}
FREE_EXPERTS |= {"bias_rate", "bias_rate_min", "bias_integral_gain", "bias_integral_limit", "bias_derivative_gain"}
FREE_EXPERTS |= {"balance_coefficient", "balance_groups"}
NAMES = {"kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings"}
NAMES |= {"heads": "num_attention_heads", "experts": "n_routed_experts", "zero_experts": "zero_expert_num"}
NAMES |= {"top_k": "moe_topk", "expert_hidden_size": "expert_ffn_hidden_size"}
"""Theirs of our fields, where they are others."""


def table(model: Model, *, fused: bool = False) -> Table:
    """Names of the language model; ``fused`` as in :func:`mmoe.convert.families.longcat.table`."""
    if isinstance(model.backbone, Llama):
        return llama.table(model.backbone)
    return longcat.table(model.backbone, _experts(model), fused=fused, mtp=model.mtp is not None)


def check_expressible(model: Model) -> None:
    """Raises :class:`UserError` where transformers' model computes something else, whatever its configuration."""
    if isinstance(model.backbone, Longcat):
        longcat.check_expressible(_experts(model))


def to_config(model: Model, dtype: str) -> dict[str, Any]:
    """Its ``config.json``."""
    ids = token_ids(model.special)
    if isinstance(model.backbone, Llama):
        return llama.to_config(model.backbone, dtype) | ids
    ahead = {"num_nextn_predict_layers": 1} if model.mtp else {}
    return longcat.to_config(model.backbone, _experts(model), dtype) | ids | ahead


def from_config(config: Any, where: str) -> tuple[Longcat | Llama, MoE | None]:
    """The sizes in a ``config.json``.

    Raises:
        UserError: another kind of model, a missing field, or a variant that is not supported.
    """
    kind = config.get("model_type") if isinstance(config, dict) else config
    if isinstance(config, dict) and kind == "llama":
        return llama.from_config(config, where), None
    if not isinstance(config, dict) or kind != "longcat_flash":
        raise UserError(f"model_type is {kind!r}", where, "language models that are read: longcat_flash, llama")
    return longcat.from_config(config, where)


def check_same_model(theirs: Model, ours: Model, where: str) -> None:
    """Raises :class:`UserError` where the recipe's language model, ``ours``, is not the one that a configuration tells
    of, by the field on both sides. It may have more rows for tokens, and be made for other lengths."""
    layers = (
        {"layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size"}
        if isinstance(theirs.backbone, Llama)
        else {"layers": "num_layers"}
    )
    check_same(theirs.backbone, ours.backbone, "model.backbone", where, free=FREE, names=NAMES | layers)
    if theirs.backbone.vocab_size > ours.backbone.vocab_size:
        what = f"vocab_size is {theirs.backbone.vocab_size}, model.backbone.vocab_size is {ours.backbone.vocab_size}"
        raise UserError(f"{what} by the recipe", where, "raise it in the recipe, or --set it")
    if ours.moe is None or theirs.moe is None:
        return
    check_same(theirs.moe, ours.moe, "model.moe", where, free=FREE_EXPERTS, names=NAMES)
    there, here = (moe.routed_scaling_factor * moe.variance_factor for moe in (theirs.moe, ours.moe))
    if there != here:
        ours_is = "model.moe.routed_scaling_factor · variance_factor is"
        what = f"routed_scaling_factor is {there}, {ours_is} {here} by the recipe"
        raise UserError(what, where, "change it in the recipe, or --set it")


def _experts(model: Model) -> MoE:
    assert model.moe is not None
    return model.moe
