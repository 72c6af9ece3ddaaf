"""A layer of the aggregator (norms, projections, attention, MLP): a training step, and the memory that it holds."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain_sva
from benchmarks.case import DTYPES, QUICK_SVA, SVA, Case, SvaShape, Workload
from benchmarks.measure import Side, draw
from mmoe.models.connectors.sva import Layer, Seen
from mmoe.recipe import model


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
    layer = Layer(model.SVA(grid=shape.side, width=shape.width, heads=shape.heads), shape.windows, shape.width).to(
        dtype
    )
    queries = draw(shape.batch, shape.side, shape.side, shape.width, dtype=dtype)
    sides = [m * shape.side for m in shape.windows]
    features = [draw(shape.batch, side, side, shape.width, dtype=dtype) for side in sides]
    context = draw(shape.batch, shape.width, dtype=dtype)
    inputs = [queries, *features, context, *layer.parameters()]

    def ours() -> Tensor:
        hats = [F.layer_norm(x, x.shape[-1:]) if m == 1 else None for x, m in zip(features, shape.windows, strict=True)]
        return layer(queries, Seen(features, hats, [None] * len(features), context))

    return Workload(
        Side(ours, inputs),
        {"released": Side(partial(plain_sva.layer, layer, queries, features, context), inputs)},
    )
