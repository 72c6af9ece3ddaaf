"""What the tests of permute and unpermute share: drawn cases, results in float64 and how far rounding may be off."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmoe.reference import unpermute as reference
from mmoe.reference.permute_index import permute_index

FP32 = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """Arguments of unpermute and a gradient of its result."""

    rows: Tensor
    row_of_slot: Tensor
    weights: Tensor
    x: Tensor
    identity: Tensor
    slot_of_row: Tensor
    grad_out: Tensor


def draw_ids(tokens: int, top_k: int, experts: int, zeros: int, seed: int = 0) -> Tensor:
    return torch.randint(experts + zeros, (tokens, top_k), generator=torch.Generator().manual_seed(seed))


def draw(ids: Tensor, experts: int, width: int, dtype: torch.dtype, seed: int = 0, **rows: Any) -> Case:
    generator = torch.Generator().manual_seed(seed)
    index = permute_index(ids, experts, **rows)
    tokens = len(ids)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scalar = torch.promote_types(torch.float32, dtype)
    return Case(
        normal(len(index.slot_of_row), width).to(dtype),
        index.row_of_slot,
        normal(*ids.shape).to(scalar),
        normal(tokens, width).to(dtype),
        normal(tokens).to(scalar),
        index.slot_of_row,
        normal(tokens, width).to(dtype),
    )


def within(got: Tensor, wanted: Tensor, magnitude: Tensor, roundings: float) -> None:
    """``got`` is ``wanted`` (float64) up to ``roundings`` of sums whose terms have the sum of magnitudes ``magnitude``.

    Each rounding is half a unit in the last place of the type summed in; one more is the storage type's.
    """
    dtype = got.dtype
    summed = 2.0**-53 if dtype == torch.float64 else FP32 / 2
    stored = torch.finfo(dtype).eps / 2
    allowed = roundings * summed * magnitude + stored * wanted.abs() + torch.finfo(dtype).tiny
    if dtype == torch.float64:  # ``wanted`` was rounded as often
        allowed *= 2
    assert got.shape == wanted.shape
    excess = (got.double() - wanted).abs() - allowed
    where = (excess == excess.max()).nonzero()[0].tolist() if excess.numel() else []
    assert (excess <= 0).all(), f"{got[tuple(where)]} for {wanted[tuple(where)]} at {where}"


def check_forward(got: Tensor, case: Case) -> None:
    """Σ_j w·row + identity·x: a product and an addition each."""
    exact = [case.rows.double(), case.row_of_slot, case.weights.double(), case.x.double(), case.identity.double()]
    magnitude = reference.unpermute(*(part.abs() if part.is_floating_point() else part for part in exact))
    within(got, reference.unpermute(*exact), magnitude, 2 * (case.weights.shape[1] + 1))


def check_backward(got: tuple[Tensor, Tensor, Tensor, Tensor], case: Case) -> None:
    """Products with one rounding, and dot products of d terms."""
    exact = [part.double() for part in (case.rows, case.weights, case.x, case.identity)]
    leaves = [part.requires_grad_() for part in exact]
    rows, weights, x, identity = leaves
    out = reference.unpermute(rows, case.row_of_slot, weights, x, identity)
    wanted = torch.autograd.grad(out, leaves, case.grad_out.double())
    leaves = [part.detach().abs().requires_grad_() for part in exact]
    rows, weights, x, identity = leaves
    out = reference.unpermute(rows, case.row_of_slot, weights, x, identity)
    sizes = torch.autograd.grad(out, leaves, case.grad_out.double().abs())
    width = case.x.shape[1]
    for one, other, size, roundings in zip(got, wanted, sizes, (1, 2 * width, 1, 2 * width), strict=True):
        within(one, other, size, roundings)


def shift(tensor: Tensor) -> Tensor:
    """The same values four bytes off a 16-byte grid."""
    step = max(1, 4 // tensor.element_size())
    return torch.cat([tensor.new_zeros(step), tensor.flatten()])[step:].view(tensor.shape)
