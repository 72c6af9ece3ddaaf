"""CLIP and SigLIP as transformers' ``CLIPVisionModel`` and ``SiglipVisionModel`` store them; OpenCLIP's own names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmoe.checkpoint.tensors import Rows, Tensors, View, lazy
from mmoe.convert.families.encoder import (
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

CLIP_STATISTICS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP_STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _clip_names(config: ViT) -> Names:
    outer = {
        "patches": "embeddings.patch_embedding",
        "position": "embeddings.position_embedding.weight",
        "class_token": "embeddings.class_embedding",
        "pre_norm": "pre_layrnorm",
        "norm": "post_layernorm",
        "pool.probe": "head.probe",
        "pool.qkv.weight": "head.attention.in_proj_weight",
        "pool.qkv.bias": "head.attention.in_proj_bias",
        "pool.attention_out": "head.attention.out_proj",
        "pool.norm": "head.layernorm",
        "pool.mlp_in": "head.mlp.fc1",
        "pool.mlp_out": "head.mlp.fc2",
    }
    inner = {
        "attention_norm": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_out": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    }
    return block_names("encoder.layers.{}", outer, inner)


def _clip_read(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"activation": activation(fields, where), "drop_border": drops_border(fields, where)}


def _siglip_read(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {**_clip_read(fields, where), "pooling": "attention" if flag(fields, "vision_use_head", where) else "none"}


CLIP = Family(
    "CLIPVisionModel",
    "clip_vision_model",
    ViT,
    CLIP_STATISTICS,
    options={
        **LEARNED,
        "activation": ("quick_gelu", "gelu", "gelu_tanh"),
        "class_token": (True,),
        "registers": (0,),
        "mask_token": (False,),
        "pre_norm": (True,),
        "layer_scale": (False,),
        "patch_bias": (False,),
        "query_value_bias": (True,),
        "key_bias": (True,),
        "final_norm": (False, True),
        "pooling": ("norm", "none"),
    },
    same={**VIT_FIELDS, "intermediate_size": "mlp_width"},
    only={"num_channels": 3, "attention_dropout": 0.0},
    defaults={
        **VIT_DEFAULTS,
        "patch_size": 32,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    names=_clip_names,
    read=_clip_read,
    write=lambda config: {"hidden_act": hidden_act(config), "intermediate_size": config.mlp_width or 4 * config.width},
    dims={"class_token": 1},
)

SIGLIP = Family(
    "SiglipVisionModel",
    "siglip_vision_model",
    ViT,
    SIGLIP_STATISTICS,
    options={
        **CLIP.options,
        "activation": ("gelu_tanh", "gelu", "quick_gelu"),
        "class_token": (False,),
        "pre_norm": (False,),
        "patch_bias": (True,),
        "final_norm": (True, False),
        "pooling": ("attention", "norm", "none"),
    },
    same=CLIP.same,
    only=CLIP.only,
    defaults={
        **CLIP.defaults,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True,
    },
    names=_clip_names,
    read=_siglip_read,
    write=lambda config: {**CLIP.write(config), "vision_use_head": config.pooling == "attention"},
    dims={"pool.probe": 3},
)

OPEN_CLIP = {
    "conv1": "embeddings.patch_embedding",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""OpenCLIP's modules and tensors, those of a block without the block → transformers'."""
THREE = ("q_proj", "k_proj", "v_proj")
_THEIR_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def from_open_clip(tensors: Mapping[str, Tensor], where: str) -> Tensors:
    """The tower of an OpenCLIP or OpenAI CLIP ViT, its tensors without ``visual.`` → those of ``CLIPVisionModel``.

    The projection into the space of the texts, ``proj``, is no part of that model and left aside.

    Raises:
        UserError: a tensor that such a tower has not, or that is no query, key and value in one.
    """
    source = lazy(tensors)
    named: dict[str, Rows] = {}
    for name, spec in source.specs.items():
        found = _THEIR_BLOCK.fullmatch(name)
        block, inner = (f"encoder.layers.{found[1]}.", found[2]) if found else ("", name)
        module, _, leaf = inner.rpartition(".")
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            if not spec.shape or spec.shape[0] % 3:
                what = f"tensor {name} is {list(spec.shape)}"
                raise UserError(what, where, "query, key and value are three equal parts of it")
            leaf, rows = inner.removeprefix("attn.in_proj_"), spec.shape[0] // 3
            named |= {f"{block}self_attn.{part}.{leaf}": Rows(name, i * rows, rows) for i, part in enumerate(THREE)}
        elif inner in OPEN_CLIP:
            named[f"{block}{OPEN_CLIP[inner]}"] = Rows(name)
        elif module in OPEN_CLIP:
            named[f"{block}{OPEN_CLIP[module]}.{leaf}"] = Rows(name)
        elif name != "proj":
            raise UserError(f"has unread tensor {name}", where, "only the ViTs of OpenCLIP that CLIP has are read")
    return View(source, named)


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_open_clip`."""
    modules = {ours: theirs for theirs, ours in OPEN_CLIP.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _BLOCK.fullmatch(name)
        block, inner = (f"transformer.resblocks.{found[1]}.", found[2]) if found else ("", name)
        module, _, leaf = inner.rpartition(".")
        if module == "self_attn.q_proj":
            rows = [tensors[name.replace("q_proj", part)] for part in THREE]
            named[f"{block}attn.in_proj_{leaf}"] = torch.cat(rows)
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            named[f"{block}{modules[inner] if inner in modules else f'{modules[module]}.{leaf}'}"] = tensor
    return named
