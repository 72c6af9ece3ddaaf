"""The trip of the rows: out to the experts (which do nothing here) and home again, weighted."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import DTYPES, MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, draw
from benchmarks.operators import permute as there
from benchmarks.operators import unpermute as back
from mmoe.ops.permute import permute
from mmoe.ops.unpermute import unpermute


def cases(quick: bool) -> list[Case]:
    return [
        Case("permute_unpermute", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_MOE if quick else MOE)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    x, ids, experts = draw(shape.tokens, shape.width, dtype=dtype), shape.routing(), shape.experts
    weights = torch.rand(ids.shape).requires_grad_()
    identity = torch.rand(shape.tokens).requires_grad_()
    dense, chosen = peers.dense_routing(ids, weights.detach(), experts)
    megatron = peers.megatron()

    def ours() -> torch.Tensor:
        sent = permute(x, ids, experts)
        return unpermute(sent.rows, sent.row_of_slot, weights, x, identity, slot_of_row=sent.slot_of_row)

    count = int((ids < experts).sum())

    def theirs() -> torch.Tensor:
        rows, _, order = megatron.permute(x, chosen, num_out_tokens=count)
        return megatron.unpermute(rows, order, x.shape, probs=dense, routing_map=chosen)

    sent = permute(x, ids, experts)
    out = there.floor(shape, count, x, ids)
    home = back.floor(sent.row_of_slot, sent.slot_of_row, sent.rows, weights, x, identity)
    return Workload(
        Side(ours, (x, weights, identity)),
        {"Megatron-Core": Side(theirs, (x, dense))},
        Floor(out.forward + home.forward, out.backward + home.backward),
    )
