"""ConvNeXt as transformers' ``ConvNextModel`` stores it, and as timm does, which OpenCLIP's towers are in."""

from collections.abc import Mapping
from typing import Any

from mmoe.convert.families.encoder import IMAGENET_STATISTICS, Family, Names
from mmoe.errors import UserError
from mmoe.recipe.model import ConvNeXt

TIMM: Names = {
    "stem": "stem.0",
    "stem_norm": "stem.1",
    "stages.#.norm": "stages.{}.downsample.0",
    "stages.#.down": "stages.{}.downsample.1",
    "stages.#.blocks.#.depthwise": "stages.{}.blocks.{}.conv_dw",
    "stages.#.blocks.#.norm": "stages.{}.blocks.{}.norm",
    "stages.#.blocks.#.mlp_in": "stages.{}.blocks.{}.mlp.fc1",
    "stages.#.blocks.#.mlp_out": "stages.{}.blocks.{}.mlp.fc2",
    "stages.#.blocks.#.scale": "stages.{}.blocks.{}.gamma",
    "norm": "head.norm",
}
"""OpenCLIP has ``visual.trunk.`` in front."""
TRANSFORMERS: Names = {
    "stem": "embeddings.patch_embeddings",
    "stem_norm": "embeddings.layernorm",
    "stages.#.norm": "encoder.stages.{}.downsampling_layer.0",
    "stages.#.down": "encoder.stages.{}.downsampling_layer.1",
    "stages.#.blocks.#.depthwise": "encoder.stages.{}.layers.{}.dwconv",
    "stages.#.blocks.#.norm": "encoder.stages.{}.layers.{}.layernorm",
    "stages.#.blocks.#.mlp_in": "encoder.stages.{}.layers.{}.pwconv1",
    "stages.#.blocks.#.mlp_out": "encoder.stages.{}.layers.{}.pwconv2",
    "stages.#.blocks.#.scale": "encoder.stages.{}.layers.{}.layer_scale_parameter",
    "norm": "layernorm",
}


def _read(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    widths, scale = fields["hidden_sizes"], fields["layer_scale_init_value"]
    if not isinstance(widths, list | tuple) or fields.get("num_stages", len(widths)) != len(widths):
        what = f"num_stages is {fields.get('num_stages')!r}, hidden_sizes {widths!r}"
        raise UserError(what, where, "give one of hidden_sizes for every stage")
    if not isinstance(scale, int | float):
        raise UserError(f"layer_scale_init_value is {scale!r}", where, "give a number")
    depths = fields["depths"]
    return {
        "widths": list(widths),
        "depths": list(depths) if isinstance(depths, tuple) else depths,
        "layer_scale": scale > 0,
    }


CONVNEXT = Family(
    "ConvNextModel",
    "convnext",
    ConvNeXt,
    IMAGENET_STATISTICS,
    options={"pooling": ("norm",), "norm_eps": (1e-6,)},
    same={"image_size": "image_size", "patch_size": "patch_size", "layer_norm_eps": "pooled_norm_eps"},
    only={"num_channels": 3, "hidden_act": "gelu", "drop_path_rate": 0.0},
    defaults={
        "image_size": 224,
        "patch_size": 4,
        "hidden_sizes": [96, 192, 384, 768],
        "depths": [3, 3, 9, 3],
        "layer_norm_eps": 1e-12,
        "layer_scale_init_value": 1e-6,
    },
    names=lambda config: TRANSFORMERS,
    read=_read,
    write=lambda config: {
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "num_stages": len(config.widths),
        "layer_scale_init_value": 1e-6 if config.layer_scale else 0.0,
    },
)
