"""The hidden z-loss over [T, d] hidden states."""

from functools import partial

import torch

from benchmarks import peers
from benchmarks.case import DTYPES, MOE, QUICK_MOE, Case, Floor, MoeShape, Workload
from benchmarks.measure import Side, draw
from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.reference import hidden_z_loss as reference

LAMBDA = 1e-7


def cases(quick: bool) -> list[Case]:
    return [
        Case("hidden_z_loss", shape.name, dtype, partial(build, shape, dtype))
        for shape in (QUICK_MOE if quick else MOE)
        for dtype in DTYPES
    ]


def build(shape: MoeShape, dtype: torch.dtype) -> Workload:
    z = draw(shape.tokens, shape.width, dtype=dtype)
    compiled = peers.compiled(reference.hidden_z_loss)
    return Workload(
        Side(lambda: hidden_z_loss(z, LAMBDA), [z]),
        {
            "eager": Side(lambda: reference.hidden_z_loss(z, LAMBDA), [z]),
            "compile": Side(lambda: compiled(z, LAMBDA), [z]),
        },
        Floor(forward=z.nbytes, backward=2 * z.nbytes),
    )
