"""The experts' rows back to their tokens. Megatron-Core's has no identity term."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import DTYPES, MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, draw, size_of
from mmoe.ops.permute_index import permute_index
from mmoe.ops.unpermute import unpermute
from mmoe.reference import unpermute as reference


def cases(quick: bool) -> list[Case]:
    return [
        Case("unpermute", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_MOE if quick else MOE)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    ids = shape.routing()
    index = permute_index(ids, shape.experts)
    x, rows = (draw(count, shape.width, dtype=dtype) for count in (shape.tokens, len(index.slot_of_row)))
    weights = torch.rand(ids.shape).requires_grad_()
    identity = torch.rand(shape.tokens).requires_grad_()
    inputs = rows, weights, x, identity
    dense, chosen = peers.dense_routing(ids, weights.detach(), shape.experts)
    scatter, order = peers.megatron().unpermute, index.slot_of_row.long() // shape.top_k
    compiled = peers.compiled(reference.unpermute)

    def ours() -> torch.Tensor:
        return unpermute(rows, index.row_of_slot, weights, x, identity, slot_of_row=index.slot_of_row)

    return Workload(
        Side(ours, inputs),
        {
            "eager": Side(lambda: reference.unpermute(rows, index.row_of_slot, weights, x, identity), inputs),
            "compile": Side(lambda: compiled(rows, index.row_of_slot, weights, x, identity), inputs),
            "Megatron-Core": Side(
                lambda: scatter(rows, order, x.shape, probs=dense, routing_map=chosen), (rows, dense)
            ),
        },
        floor(index.row_of_slot, index.slot_of_row, *inputs),
    )


def floor(row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, rows: torch.Tensor, *others: torch.Tensor) -> Floor:
    """Backward: all of the inputs and the gradient of the result come in, the gradients of all but the index go out."""
    weights, x, identity = others
    read = size_of(row_of_slot, rows, weights, x, identity)
    written = size_of(rows, weights, x, identity)
    return Floor(forward=read + x.nbytes, backward=read + x.nbytes + slot_of_row.nbytes + written)
