"""Tiny models: their recipes, random weights, and the composition of parts that an export has to equal."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.convert.families import longcat
from mmoe.models.connectors import build_connector
from mmoe.models.encoders import build_encoder
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.parallel import engine
from mmoe.recipe import model, schema

MODEL = model.Model(
    backbone=model.Longcat(
        vocab_size=300,
        hidden_size=32,
        layers=2,
        heads=2,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        ffn_hidden_size=24,
        max_position=128,
    ),
    moe=model.MoE(
        experts=4, zero_experts=2, top_k=3, expert_hidden_size=12, routed_scaling_factor=2.0, active_experts=1.5
    ),
    encoders=(
        model.ViT(name="patches", type="vit", image_size=32, patch_size=8, width=16, layers=1, heads=2),
        model.ConvNet(name="pixels", type="convnet", image_size=32, widths=(8, 8, 16)),
    ),
    connector=model.SVA(grid=2, width=16, heads=2),
)
RECIPE = schema.Recipe(
    name="tiny",
    model=MODEL,
    data=schema.Data(mixture="none", sequence_length=64),
    train=schema.Train(steps=1, global_batch=1, micro_batch=1),
    optimizer=schema.Optimizer(lr=1e-3),
)

LLAMA = model.Llama(
    type="llama",
    vocab_size=300,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position=128,
)
CLIP = model.ViT(
    name="clip",
    type="vit",
    image_size=16,
    patch_size=4,
    width=32,
    layers=2,
    heads=2,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    feature_layer=-2,
    final_norm=False,
    pooling="norm",
)


def scattered(recipe: schema.Recipe) -> MultimodalModel:
    """A model whose tensors are all random: biases, norms and whatever else begins at a constant too."""
    engine.start(schema.Parallel(), seed=0, alone=True)
    network = build(recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network


class Whole(torch.nn.Module):
    """The composition that the export has to equal, from our encoders and connector and transformers' LongCat."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = torch.nn.ModuleDict({e.name: build_encoder(e) for e in MODEL.encoders})
        parts = list(self.encoders.values())
        assert MODEL.connector is not None
        self.connector = build_connector(MODEL.connector, [p.channels for p in parts], [p.grid for p in parts], 32)
        fields = longcat.to_config(MODEL.backbone, MODEL.moe, "float32")
        config = LongcatFlashConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
        self.language_model = LongcatFlashForCausalLM(config)

    @torch.no_grad()
    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        embeddings = self.language_model.get_input_embeddings()(ids)
        rows = self.connector([encoder(pixels) for encoder in self.encoders.values()]).flatten(0, 1)
        embeddings[ids == 3] = rows
        return self.language_model(inputs_embeds=embeddings).logits


class Exported(NamedTuple):
    whole: Whole
    state: dict[str, Tensor]
    tokenizer: Path
    out: Path


def load(state: dict[str, Tensor], tokenizer: Path):
    """Stands in for the checkpoint."""
    return lambda checkpoint: (RECIPE, state, tokenizer)
