"""The attention of a grid of queries over all encoders' grids, keys and values given: next to no arithmetic."""

from functools import partial

import torch
from torch import Tensor

from benchmarks import peers, plain_sva
from benchmarks.case import DTYPES, QUICK_SVA, SVA, Case, Floor, SvaShape, Workload
from benchmarks.measure import Side, draw, size_of
from mmoe.ops.sva import Projected, sva
from mmoe.reference import sva as reference


def cases(quick: bool) -> list[Case]:
    return [
        Case("sva", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_SVA if quick else SVA)
        for dtype in DTYPES
    ]


def build(shape: SvaShape, dtype: torch.dtype) -> Workload:
    q = draw(shape.batch, shape.side, shape.side, shape.heads, shape.head_width, dtype=dtype)
    grids = [(shape.batch, m * shape.side, m * shape.side, shape.width) for m in shape.windows]
    sources = [Projected(draw(*grid, dtype=dtype), draw(*grid, dtype=dtype)) for grid in grids]
    inputs = [q, *(part for source in sources for part in source)]
    compiled = peers.compiled(reference.sva)

    def released() -> Tensor:
        keys, values = (
            torch.cat([plain_sva.windows(grid, shape.side) for grid in grids], dim=1)
            for grids in zip(*sources, strict=True)
        )
        return plain_sva.attention(q, keys, values)

    return Workload(
        Side(lambda: sva(q, sources), inputs),
        {
            "eager": Side(lambda: reference.sva(q, sources), inputs),
            "compile": Side(lambda: compiled(q, sources), inputs),
            "released": Side(released, inputs),
        },
        # Out and its gradient have the size of q.
        Floor(forward=size_of(inputs) + q.nbytes, backward=2 * size_of(inputs) + q.nbytes),
    )
