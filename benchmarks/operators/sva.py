"""The attention of a grid of queries over all encoders' grids.

With keys and values given it is next to no arithmetic, and judged by its bytes. "absorbed" gives the encoder of several
keys a query by its features and weights: products dominate, and eager has to make the keys and values first.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers, plain_sva
from benchmarks.case import DTYPES, QUICK_SVA, SVA, Case, Floor, SvaShape, Workload
from benchmarks.measure import Side, draw, size_of
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.reference import sva as reference


def cases(quick: bool) -> list[Case]:
    return [
        Case("sva", shape.name + name, dtype, partial(make, shape, dtype))
        for shape in (QUICK_SVA if quick else SVA)
        for name, make in (("", build), (" absorbed", build_absorbed))
        for dtype in DTYPES
    ]


def drawn(shape: SvaShape, windows: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Projected]]:
    """The queries, and keys and values for these windows."""
    q = draw(shape.batch, shape.side, shape.side, shape.heads, shape.head_width, dtype=dtype)
    grids = [(shape.batch, m * shape.side, m * shape.side, shape.width) for m in windows]
    return q, [Projected(draw(*grid, dtype=dtype), draw(*grid, dtype=dtype)) for grid in grids]


def sides(q: Tensor, sources: Sequence[Projected | Absorbed]) -> tuple[Side, dict[str, Side]]:
    inputs = [q, *(part for source in sources for part in source if isinstance(part, Tensor))]
    compiled = peers.compiled(reference.sva)
    return Side(lambda: sva(q, sources), inputs), {
        "eager": Side(lambda: reference.sva(q, sources), inputs),
        "compile": Side(lambda: compiled(q, sources), inputs),
    }


def build(shape: SvaShape, dtype: torch.dtype) -> Workload:
    q, sources = drawn(shape, shape.windows, dtype)
    ours, others = sides(q, sources)

    def released() -> Tensor:
        keys, values = (
            torch.cat([plain_sva.windows(grid, shape.side) for grid in grids], dim=1)
            for grids in zip(*sources, strict=True)
        )
        return plain_sva.attention(q, keys, values)

    # Out and its gradient have the size of q.
    given = size_of(ours.inputs)
    floor = Floor(forward=given + q.nbytes, backward=2 * given + q.nbytes)
    return Workload(ours, others | {"released": Side(released, ours.inputs)}, floor)


def build_absorbed(shape: SvaShape, dtype: torch.dtype) -> Workload:
    q, sources = drawn(shape, [m for m in shape.windows if m == 1], dtype)
    return Workload(*sides(q, [*sources, *(absorbed(shape, m, dtype) for m in shape.windows if m > 1)]))


def absorbed(shape: SvaShape, m: int, dtype: torch.dtype) -> Absorbed:
    width = shape.width
    features = draw(shape.batch, m * shape.side, m * shape.side, width, dtype=dtype)
    position = draw(m * m, width, dtype=dtype, scale=0.02)

    def vector() -> Tensor:
        return draw(width, dtype=dtype)

    def matrix() -> Tensor:
        return draw(width, width, dtype=dtype, scale=width**-0.5)

    return Absorbed(features, position, vector(), vector(), matrix(), vector(), vector(), matrix())
