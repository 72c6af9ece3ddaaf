"""What the identity term adds to unpermute: the same kernel without x, which is what permute's backward calls.

Where x comes from memory, its bytes alone are 1 ÷ (R/T + 1) of what the sum moves without it: 11% at LongCat-Flash's
eight rows a token, 27% at the small MoE's 2.7.
"""

from functools import partial

import torch

from benchmarks.case import DTYPES, MOE, QUICK_MOE, Case, MoeShape, Workload
from benchmarks.measure import Side
from mmoe.ops.permute_index import permute_index
from mmoe.ops.unpermute import unpermute


def cases(quick: bool) -> list[Case]:
    return [
        Case("identity_path", shape.name, dtype, partial(build, shape, dtype), ("forward",))
        for shape in (QUICK_MOE if quick else MOE)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    ids = shape.routing()
    index = permute_index(ids, shape.experts)
    # No leaf takes gradient, so that neither side builds a graph.
    x, rows = (torch.randn(count, shape.width).to(dtype) for count in (shape.tokens, len(index.slot_of_row)))
    weights, identity = torch.ones(ids.shape), torch.rand(shape.tokens)
    without = torch.ops.mmoe.permute_backward.default
    return Workload(
        Side(lambda: unpermute(rows, index.row_of_slot, weights, x, identity)),
        {"without identity": Side(lambda: without(rows, index.row_of_slot))},
    )
