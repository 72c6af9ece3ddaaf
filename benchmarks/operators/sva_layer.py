"""A layer of the aggregator (norms, projections, attention, MLP): a training step, and the memory that it holds."""

from functools import partial

import torch

from benchmarks import plain_sva
from benchmarks.case import DTYPES, QUICK_SVA, SVA, Case, SvaShape, Workload
from benchmarks.measure import Side, draw
from mmoe.models.connectors.sva import Layer


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            "sva_layer",
            shape.name,
            dtype,
            partial(build, shape, dtype),
            ("step",),
            memory=dtype == torch.float32 or not quick,
        )
        for shape in (QUICK_SVA if quick else SVA)
        for dtype in DTYPES
    ]


def build(shape: SvaShape, dtype: torch.dtype) -> Workload:
    layer = Layer(shape.width, shape.heads, shape.windows).to(dtype)
    queries = draw(shape.batch, shape.side, shape.side, shape.width, dtype=dtype)
    sides = [m * shape.side for m in shape.windows]
    features = [draw(shape.batch, side, side, shape.width, dtype=dtype) for side in sides]
    context = draw(shape.batch, shape.width, dtype=dtype)
    inputs = [queries, *features, context, *layer.parameters()]
    return Workload(
        Side(lambda: layer(queries, features, context), inputs),
        {"released": Side(partial(plain_sva.layer, layer, queries, features, context), inputs)},
    )
