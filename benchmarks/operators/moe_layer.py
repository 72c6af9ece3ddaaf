"""A whole layer of a small MoE, GEMMs included: classifier, router, permute, experts, unpermute."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks import peers
from benchmarks.case import QUICK_MOE, SMALL, Case, MoeShape, Workload
from benchmarks.measure import Side, draw
from mmoe.ops.grouped_linear import grouped_linear
from mmoe.ops.permute import permute
from mmoe.ops.router import router
from mmoe.ops.unpermute import unpermute


def cases(quick: bool) -> list[Case]:
    shapes = QUICK_MOE if quick else SMALL
    return [Case("moe_layer", shape.name, torch.float32, partial(build, shape)) for shape in shapes]


def build(shape: MoeShape) -> Workload:
    x = draw(shape.tokens, shape.width)
    moe = peers.transformers_moe(shape, expert_width=shape.width // 2)
    inputs = [x, *(parameter for parameter in moe.parameters() if parameter.requires_grad)]
    return Workload(Side(partial(layer, moe, shape, x), inputs), {"transformers": Side(lambda: moe(x), inputs)})


def layer(moe: Any, shape: MoeShape, x: Tensor) -> Tensor:
    """What ``LongcatFlashMoE`` computes, with its weights, out of mmoe's operators."""
    logits = linear(x.float(), moe.router.classifier.weight)
    bias = moe.router.e_score_correction_bias
    routed = router(logits, bias, zero_experts=shape.zero_experts, top_k=shape.top_k, scaling=shape.scaling)
    sent = permute(x, routed.ids, shape.experts)
    # transformers keeps weights for the zero experts too, and never reads them.
    ends, gate_up, down = sent.offsets[1:], moe.experts.gate_up_proj, moe.experts.down_proj
    gate, up = grouped_linear(sent.rows, gate_up[: shape.experts], ends).chunk(2, dim=-1)
    rows = grouped_linear(silu(gate) * up, down[: shape.experts], ends)
    return unpermute(rows, sent.row_of_slot, routed.weights, x, routed.identity, slot_of_row=sent.slot_of_row)
