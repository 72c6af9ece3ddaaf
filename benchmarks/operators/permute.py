"""Tokens into expert order, the sort of the slots included on every side."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import DTYPES, MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, draw, size_of
from mmoe.ops.permute import permute
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute as reference


def cases(quick: bool) -> list[Case]:
    return [
        Case("permute", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_MOE if quick else MOE)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    x, ids, experts = draw(shape.tokens, shape.width, dtype=dtype), shape.routing(), shape.experts
    rows = int((ids < experts).sum())
    _, chosen = peers.dense_routing(ids, torch.ones(ids.shape), experts)
    gather = peers.megatron().permute
    compiled = peers.compiled(reference.permute)
    return Workload(
        Side(lambda: permute(x, ids, experts).rows, [x]),
        {
            "eager": Side(lambda: reference.permute(x, ids, experts).rows, [x]),
            "compile": Side(lambda: compiled(x, ids, experts).rows, [x]),
            "Megatron-Core": Side(lambda: gather(x, chosen, num_out_tokens=rows)[0], [x]),
        },
        floor(shape, rows, x, ids),
    )


def floor(shape: MoeShape, rows: int, x: torch.Tensor, ids: torch.Tensor) -> Floor:
    moved = x.nbytes + rows * shape.width * x.element_size()
    index = size_of(permute_index(ids, shape.experts))
    return Floor(forward=moved + ids.nbytes + index, backward=moved + 4 * ids.numel())
