"""DINOv2, with and without registers, and DINOv3's ViTs as transformers stores them."""

from collections.abc import Mapping
from typing import Any

from mmoe.convert.families.encoder import (
    IMAGENET_STATISTICS,
    LEARNED,
    VIT_DEFAULTS,
    VIT_FIELDS,
    Family,
    Names,
    activation,
    block_names,
    drops_border,
    flag,
    hidden_act,
)
from mmoe.errors import UserError
from mmoe.recipe.model import ViT


def _dino_names(config: ViT) -> Names:
    outer = {
        "patches": "embeddings.patch_embeddings.projection",
        "position": "embeddings.position_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "norm": "layernorm",
    }
    gated = config.activation == "swiglu"
    inner = {
        "attention_norm": "norm1",
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "attention_out": "attention.output.dense",
        "attention_scale": "layer_scale1.lambda1",
        "mlp_norm": "norm2",
        "mlp_in": "mlp.weights_in" if gated else "mlp.fc1",
        "mlp_out": "mlp.weights_out" if gated else "mlp.fc2",
        "mlp_scale": "layer_scale2.lambda1",
    }
    return block_names("encoder.layer.{}", outer, inner)


def _dino_mlp_width(width: int, ratio: int, gated: bool) -> int:
    """Of transformers' Dinov2MLP, or of its Dinov2SwiGLUFFN: two thirds, up to a multiple of 8."""
    plain = int(width * ratio)
    return (int(plain * 2 / 3) + 7) // 8 * 8 if gated else plain


def _dino_read(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    gated, bias, ratio = flag(fields, "use_swiglu_ffn", where), fields["qkv_bias"], fields["mlp_ratio"]
    width = fields["hidden_size"]
    if type(ratio) is not int or type(width) is not int or not 0 < ratio * width < 2**31:
        raise UserError(f"mlp_ratio is {ratio!r} of hidden_size {width!r}", where, "give whole numbers above 0")
    return {
        "activation": "swiglu" if gated else activation(fields, where),
        "drop_border": drops_border(fields, where),
        "mlp_width": _dino_mlp_width(width, ratio, gated),
        "query_value_bias": bias,
        "key_bias": bias,
        **({"mask_token": fields["use_mask_token"]} if "use_mask_token" in fields else {}),
    }


def _dino_write(config: ViT) -> dict[str, Any]:
    gated, mlp_width = config.activation == "swiglu", config.mlp_width or 4 * config.width
    near = mlp_width * (3 if gated else 2) // (2 * config.width)
    ratios = [r for r in range(near - 1, near + 2) if r > 0 and _dino_mlp_width(config.width, r, gated) == mlp_width]
    if not ratios:
        what = f"mlp_width = {mlp_width} is of no whole mlp_ratio of width = {config.width}"
        raise UserError(what, f"model.encoders, {config.name}", "transformers' DINOv2 has no such MLP")
    if config.key_bias != config.query_value_bias:
        what = "transformers' DINOv2 has a bias on query, key and value or on none"
        raise UserError(what, f"model.encoders, {config.name}", "make key_bias and query_value_bias alike")
    return {
        "hidden_act": hidden_act(config),
        "mlp_ratio": ratios[0],
        "use_swiglu_ffn": gated,
        "qkv_bias": config.key_bias,
    }


DINOV2 = Family(
    "Dinov2Model",
    "dinov2",
    ViT,
    IMAGENET_STATISTICS,
    options={
        **LEARNED,
        "activation": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
        "class_token": (True,),
        "registers": (0,),
        "mask_token": (True, False),
        "pre_norm": (False,),
        "layer_scale": (True,),
        "patch_bias": (True,),
        "final_norm": (True, False),
        "pooling": ("none", "norm"),
    },
    same=VIT_FIELDS,
    only={
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    },
    defaults={
        **VIT_DEFAULTS,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "mlp_ratio": 4,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
    },
    names=_dino_names,
    read=_dino_read,
    write=lambda config: {**_dino_write(config), "use_mask_token": config.mask_token},
    dims={"class_token": 3, "position": 3},
)

DINOV2_REGISTERS = Family(
    "Dinov2WithRegistersModel",
    "dinov2_with_registers",
    ViT,
    IMAGENET_STATISTICS,
    options={**DINOV2.options, "registers": range(1, 1 << 16), "mask_token": (True,)},
    same={**VIT_FIELDS, "num_register_tokens": "registers"},
    only=DINOV2.only,
    defaults={
        **{key: value for key, value in DINOV2.defaults.items() if key != "use_mask_token"},
        "patch_size": 16,
        "num_register_tokens": 4,
    },
    names=_dino_names,
    read=_dino_read,
    write=_dino_write,
    dims={"class_token": 3, "position": 3, "registers": 3},
)


def _dinov3_names(config: ViT) -> Names:
    outer = {
        "patches": "embeddings.patch_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "norm": "norm",
    }
    inner = {
        "attention_norm": "norm1",
        "query": "attention.q_proj",
        "key": "attention.k_proj",
        "value": "attention.v_proj",
        "attention_out": "attention.o_proj",
        "attention_scale": "layer_scale1.lambda1",
        "mlp_norm": "norm2",
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj") if config.activation == "swiglu" else "mlp.up_proj",
        "mlp_out": "mlp.down_proj",
        "mlp_scale": "layer_scale2.lambda1",
    }
    return block_names("layer.{}", outer, inner)


def _dinov3_read(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    gated, bias = flag(fields, "use_gated_mlp", where), fields["query_bias"]
    if gated and fields["hidden_act"] != "silu":
        what = f"hidden_act is {fields['hidden_act']!r}"
        raise UserError(what, where, "only 'silu' is supported in a gated MLP")
    if fields["value_bias"] != bias:
        what = f"value_bias is {fields['value_bias']!r}"
        raise UserError(what, where, f"only the same as query_bias, {bias!r}, is supported")
    return {
        "activation": "swiglu" if gated else activation(fields, where),
        "drop_border": drops_border(fields, where),
        "query_value_bias": bias,
    }


def _dinov3_write(config: ViT) -> dict[str, Any]:
    gated = config.activation == "swiglu"
    return {
        "intermediate_size": config.mlp_width or 4 * config.width,
        "hidden_act": "silu" if gated else hidden_act(config),
        "use_gated_mlp": gated,
        "query_bias": config.query_value_bias,
        "value_bias": config.query_value_bias,
    }


DINOV3 = Family(
    "DINOv3ViTModel",
    "dinov3_vit",
    ViT,
    IMAGENET_STATISTICS,
    options={
        **{key: value for key, value in DINOV2_REGISTERS.options.items() if key != "rope_theta"},
        "position": ("rope",),
    },
    same={
        **VIT_FIELDS,
        "intermediate_size": "mlp_width",
        "num_register_tokens": "registers",
        "rope_theta": "rope_theta",
        "key_bias": "key_bias",
    },
    # Shift, jitter and rescaling of the patches' centres are augmentation while DINOv3 itself is trained.
    only={
        "num_channels": 3,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "proj_bias": True,
        "mlp_bias": True,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
    },
    defaults={
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_register_tokens": 0,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "hidden_act": "gelu",
        "use_gated_mlp": False,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
    },
    names=_dinov3_names,
    read=_dinov3_read,
    write=_dinov3_write,
    dims={"class_token": 3, "registers": 3, "mask_token": 3},
)
