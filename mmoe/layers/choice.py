"""What a recipe's [precision] comes to on this machine, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from mmoe.errors import UserError
from mmoe.parallel import cpu_platform
from mmoe.recipe.model import Longcat
from mmoe.recipe.schema import Fp8, Precision, Recipe

FP8_CAPABILITY: dict[Fp8, tuple[tuple[int, int], tuple[int, int]]] = {
    "delayed": ((8, 9), (99, 0)),
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (10, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}
"""Compute capabilities, from and up to but without, of Transformer Engine 2.8: pytorch/fp8.py, check_fp8_support,
check_fp8_block_scaling_support (which also wants CUDA 12.9) and check_mxfp8_support."""


@dataclass(frozen=True)
class Choice:
    """What a recipe's [precision] comes to on this machine."""

    transformer_engine: bool
    """Linears, norms and grouped GEMM are Transformer Engine's."""
    apex_norms: bool
    fp8: Fp8
    why: str

    @property
    def emulates(self) -> bool:
        return self.fp8 != "none" and not self.transformer_engine


def capability() -> tuple[int, int] | None:
    """The GPU's compute capability; None on the CPU."""
    return torch.cuda.get_device_capability() if cpu_platform.device().type == "cuda" else None


def transformer_engine_missing() -> str:
    """Why Transformer Engine cannot be used; empty if it can. Its Python part imports only with the compiled one."""
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"transformer_engine.pytorch does not import: {error}"
    return ""


def apex_missing() -> str:
    """Why apex's fused norm cannot be used; empty if it can. What PyPI calls apex is another package."""
    for name in ("apex", "apex.optimizers", "apex.normalization", "fused_layer_norm_cuda"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    return ""


def choose(precision: Precision) -> Choice:
    """Decides for this machine.

    Raises:
        UserError: Transformer Engine is asked for where it cannot run, or an FP8 recipe that this machine has no
            arithmetic for.
    """
    device = capability()
    missing = "no CUDA device" if device is None else transformer_engine_missing()
    if precision.provider == "transformer_engine" and missing:
        where = 'precision.provider = "transformer_engine"'
        raise UserError(f"Transformer Engine cannot be used: {missing}", where, 'set it to "local" or "auto"')
    upstream = precision.provider != "local" and not missing
    why = f'provider = "{precision.provider}"'
    if precision.provider == "auto":
        why += f": {missing or 'CUDA and Transformer Engine are there'}"
    apex = precision.provider == "auto" and device is not None and not upstream and not apex_missing()
    if precision.fp8 != "none" and device is not None:
        refusal = fp8_refusal(precision.fp8, device) or ("" if upstream else missing or "the provider is our own")
        if refusal:
            fix = 'use another recipe or "none"' if upstream else 'use "none", or provider = "auto" with it installed'
            raise UserError(f"FP8 on CUDA: {refusal}", f'precision.fp8 = "{precision.fp8}"', fix)
    return Choice(upstream, apex, precision.fp8, why)


def fp8_refusal(recipe: Fp8, device: tuple[int, int]) -> str:
    """Why a GPU of this compute capability cannot run ``recipe``; empty if it can."""
    first, end = FP8_CAPABILITY[recipe]
    if not first <= device < end:
        below = f" and below {end[0]}.{end[1]}" if end[0] < 99 else ""
        return f"{recipe} needs compute capability {first[0]}.{first[1]}{below}, this GPU has {device[0]}.{device[1]}"
    if recipe == "blockwise" and tuple(map(int, (torch.version.cuda or "0.0").split("."))) < (12, 9):
        return f"blockwise needs CUDA 12.9, torch is built for {torch.version.cuda}"
    return ""


def megatron_settings(recipe: Recipe, choice: Choice) -> dict[str, Any]:
    """What makes Megatron's TransformerBlock enter Transformer Engine's FP8 around the layers.

    Raises:
        UserError: a size or a layout that Transformer Engine's FP8 cannot have.
    """
    if choice.fp8 == "none" or not choice.transformer_engine:
        return {}
    # 2.8: pytorch/utils.py, assert_dim_for_fp8_exec; pytorch/tensor/mxfp8_tensor.py, MXFP8Quantizer.is_quantizable.
    unit = 32 if choice.fp8 == "mxfp8" else 16
    for name, size in _gemm_sizes(recipe):
        if size % unit:
            what = f"Transformer Engine's {choice.fp8} takes multiples of {unit}, not {size}"
            raise UserError(what, name, 'change it, or set precision.fp8 = "none"')
    if recipe.parallel.recompute == "selective":
        what = "our selective recompute does not enter Transformer Engine's FP8 again"
        raise UserError(what, 'parallel.recompute = "selective"', 'use "full" or "none"')
    return {
        "fp8": "hybrid",
        "fp8_recipe": choice.fp8,
        "fp8_amax_history_len": recipe.precision.fp8_amax_history,
        "fp8_amax_compute_algo": "max",
    }


def _gemm_sizes(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Rows and columns of the GEMMs of one rank, with where they come from."""
    shape, moe, parallel = recipe.model.backbone, recipe.model.moe, recipe.parallel
    heads, local = "model.backbone.heads × head dimension", shape.heads // parallel.tensor
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    yield "data.sequence_length × train.micro_batch", recipe.data.sequence_length * recipe.train.micro_batch // shards
    yield "model.backbone.hidden_size", shape.hidden_size
    if isinstance(shape, Longcat):
        yield "model.backbone.q_lora_rank", shape.q_lora_rank
        yield "model.backbone.kv_lora_rank", shape.kv_lora_rank
        yield "model.backbone.kv_lora_rank + qk_rope_head_dim", shape.kv_lora_rank + shape.qk_rope_head_dim
        yield heads, local * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        yield heads, local * (shape.qk_nope_head_dim + shape.v_head_dim)
        yield heads, local * shape.v_head_dim
    else:
        yield heads, local * shape.head_dim
        yield "model.backbone.kv_heads × head_dim", shape.kv_heads // parallel.tensor * shape.head_dim
    yield "model.backbone.ffn_hidden_size", shape.ffn_hidden_size // parallel.tensor
    if moe:
        yield "model.moe.expert_hidden_size", moe.expert_hidden_size // parallel.expert_tensor
