"""The experts' products. The ceiling is one square product of as much arithmetic: "gemm"."""

from functools import partial

import torch
from torch.nn.functional import grouped_mm

from benchmarks.case import DTYPES, QUICK_MOE, SMALL, Case, MoeShape, Workload
from benchmarks.measure import Side, draw
from mmoe.ops.grouped_linear import grouped_linear
from mmoe.reference import grouped_linear as reference


def cases(quick: bool) -> list[Case]:
    return [
        Case("grouped_linear", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_MOE if quick else SMALL)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    """``shape``'s FFN slots through gate and up of experts a third as wide as the model."""
    ids = shape.routing()
    ends = ids.flatten().bincount(minlength=shape.experts)[: shape.experts].cumsum(0).to(torch.int32)
    outputs = 16 * (shape.width // 24)
    rows = draw(int(ends[-1]), shape.width, dtype=dtype)
    weight = draw(shape.experts, outputs, shape.width, dtype=dtype)
    side = max(1, round((len(rows) * outputs * shape.width) ** (1 / 3)))
    a, b = draw(side, side, dtype=dtype), draw(side, side, dtype=dtype)
    inputs = rows, weight
    return Workload(
        Side(lambda: grouped_linear(rows, weight, ends), inputs),
        {
            "eager": Side(lambda: reference.grouped_linear(rows, weight, ends), inputs),
            "grouped_mm": Side(lambda: grouped_mm(rows, weight.transpose(1, 2), offs=ends), inputs),
            "gemm": Side(lambda: a @ b, (a, b)),
        },
    )
