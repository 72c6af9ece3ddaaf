"""The counting sort of slots by expert; no gradient. Its peers do not know that the answer is a counting sort."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, size_of
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute_index as reference


def cases(quick: bool) -> list[Case]:
    shapes = QUICK_MOE if quick else MOE
    return [Case("permute_index", shape.name, torch.int64, partial(build, shape), ("forward",)) for shape in shapes]


def build(shape: MoeShape) -> Workload:
    ids = shape.routing()
    compiled = peers.compiled(reference.permute_index)
    return Workload(
        Side(lambda: permute_index(ids, shape.experts)),
        {
            "eager": Side(lambda: reference.permute_index(ids, shape.experts)),
            "compile": Side(lambda: compiled(ids, shape.experts)),
        },
        Floor(forward=ids.nbytes + size_of(permute_index(ids, shape.experts)), backward=0),
    )
