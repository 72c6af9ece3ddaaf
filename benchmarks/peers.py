"""The same work as others do it: compiled by torch, in transformers' LongCat-Flash, in Megatron-Core."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import MoeShape


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile for one shape, as a training step of fixed shapes would have it."""
    return torch.compile(function, dynamic=False)


def megatron() -> Any:
    """``megatron.core.transformer.moe.moe_utils``."""
    # It makes Megatron-Core importable without CUDA.
    importlib.import_module("mmoe.parallel.engine")
    from megatron.core.transformer.moe import moe_utils

    return moe_utils


def transformers_moe(shape: MoeShape, expert_width: int) -> Any:
    """``LongcatFlashMoE``: the classifier, the router and the loop over experts, with small random weights."""
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=shape.width,
        expert_ffn_hidden_size=expert_width,
        n_routed_experts=shape.experts,
        zero_expert_num=shape.zero_experts,
        moe_topk=shape.top_k,
        routed_scaling_factor=shape.scaling,
    )
    made = LongcatFlashMoE(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def transformers_routing(shape: MoeShape, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """[T, N+Z] logits → [T, k] weights: what ``LongcatFlashTopkRouter.forward`` does after its classifier."""
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

    config = LongcatFlashConfig(
        hidden_size=1,
        n_routed_experts=shape.experts,
        zero_expert_num=shape.zero_experts,
        moe_topk=shape.top_k,
        routed_scaling_factor=shape.scaling,
    )
    router: Any = LongcatFlashTopkRouter(config)
    router.e_score_correction_bias = bias

    def route(logits: Tensor) -> Tensor:
        scores = logits.softmax(dim=-1)
        ids = router.get_topk_indices(scores)
        return scores.gather(1, ids) * router.routed_scaling_factor

    return route


def dense_routing(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Megatron-Core's form of a routing: weights and a map [T, N]; zero experts' slots are left out."""
    tokens = len(ids)
    columns = ids.clamp(max=experts)
    dense = torch.zeros(tokens, experts + 1).scatter(1, columns, weights)[:, :experts].contiguous()
    chosen = torch.zeros(tokens, experts + 1, dtype=torch.bool).scatter(1, columns, True)[:, :experts].contiguous()
    return dense.requires_grad_(), chosen
