"""A small backbone on this process and batches for it."""

import dataclasses
from typing import TypeVar

import torch

from mmoe.layers.config import LongcatConfig, make_config
from mmoe.parallel import engine
from mmoe.recipe.model import Longcat, Model, MoE
from mmoe.recipe.schema import Data, Fp8, Optimizer, Parallel, Precision, Recipe, Train

BACKBONE = Longcat(
    vocab_size=64,
    hidden_size=32,
    layers=2,
    heads=4,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    ffn_hidden_size=48,
    init_std=0.2,
    residual_init_std=0.2,
)
MIXTURE = MoE(
    experts=4,
    zero_experts=2,
    top_k=3,
    expert_hidden_size=16,
    routed_scaling_factor=2.0,
    active_experts=1.5,
    balance_coefficient=0.1,
    balance_groups=2,
    bias_rate=0.1,
    router_init_std=0.5,
)
RECIPE = Recipe(
    name="small",
    model=Model(backbone=BACKBONE, moe=MIXTURE),
    data=Data(mixture="none", sequence_length=32),
    train=Train(steps=1, global_batch=2, micro_batch=2),
    optimizer=Optimizer(lr=1e-3),
)


def with_fp8(recipe: Fp8) -> Recipe:
    """RECIPE with FP8 GEMMs, whose delayed scales look back four steps."""
    return dataclasses.replace(RECIPE, precision=Precision(fp8=recipe, fp8_amax_history=4))


def config() -> LongcatConfig:
    """The configuration of RECIPE, with the process groups of one process ready."""
    engine.start(Parallel(), seed=0)
    return make_config(RECIPE)


Module = TypeVar("Module", bound=torch.nn.Module)


def initialised(module: Module) -> Module:
    """``module`` with every matrix drawn from N(0, 0.2²): only whole models initialise themselves."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def batch(tokens: torch.Tensor, **fields: torch.Tensor) -> dict:
    """A batch of plain sequences, int64 [b, s]; ``fields`` replace what stands here."""
    b, s = tokens.shape
    plain = {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(b, s),
        "position": torch.arange(s).expand(b, s),
        "document": torch.ones(b, s, dtype=torch.int32),
        "branch": torch.zeros(b, s, dtype=torch.int32),
        "images": {},
        "original_sizes": torch.zeros(0, 2, dtype=torch.int64),
    }
    return {**plain, **fields}
