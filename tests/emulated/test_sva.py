"""sva: the CUDA kernels on the emulator against the contract of csrc/sva/sva.h in float64, through autograd.

The emulator runs some 0.2 M CUDA threads a second, so the grids are a few queries each.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmoe.reference import sva as reference

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NONE = torch.empty(0)


class Case(NamedTuple):
    """B, R, W, H, D and the windows m of the projected encoders."""

    batch: int
    rows: int
    columns: int
    heads: int
    width: int
    projected: tuple[int, ...] = ()
    masked: bool = False

    def __str__(self) -> str:
        mask = "masked" if self.masked else ""
        return f"{self.batch}x{self.rows}x{self.columns}h{self.heads}d{self.width}p{self.projected}{mask}"


class Arguments(NamedTuple):
    """The operator's, in order, but for eps."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    features: list[Tensor]
    positions: list[Tensor]
    absorbed: list[Tensor]
    constants: list[Tensor]
    masks: list[Tensor]


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    batch, rows, columns, heads, width = case[:5]
    grids = [(batch, m * rows, m * columns) for m in case.projected]
    masks = [NONE.bool() for _ in grids]
    if case.masked:
        masks = [torch.rand(*grid, generator=generator) < 0.5 for grid in grids]
        for mask, m in zip(masks, case.projected, strict=True):
            mask[0, :m, :m] = False  # a window without a valid key
    return Arguments(
        normal(batch, rows, columns, heads, width),
        [normal(*grid, heads * width) for grid in grids],
        [normal(*grid, heads * width) for grid in grids],
        [],
        [],
        [],
        [],
        masks,
    )


def windows(grid: Tensor, rows: int, columns: int) -> Tensor:
    """[B, m·R, m·W, …] → [B, R, W, m², …]."""
    batch, m = grid.shape[0], grid.shape[1] // rows
    split = grid.reshape(batch, rows, m, columns, m, *grid.shape[3:]).transpose(2, 3)
    return split.reshape(batch, rows, columns, m * m, *grid.shape[3:])


def exact(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """out and lse by the contract, in the dtype of the arguments."""
    q, keys, values, *_, masks = arguments
    _, rows, columns, heads, width = q.shape
    scores, kept = [], []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        k = windows(key, rows, columns).unflatten(-1, (heads, width))
        score = torch.einsum("brchd,brckhd->brchk", q, k) / width**0.5
        if masks[i].numel():
            valid = windows(masks[i], rows, columns)
            valid = valid | ~valid.any(-1, keepdim=True)
            score = score.masked_fill(~valid[:, :, :, None], float("-inf"))
        scores.append(score)
        kept.append(windows(value, rows, columns).unflatten(-1, (heads, width)))
    lse = torch.cat(scores, -1).logsumexp(-1)
    out = sum(
        torch.einsum("brchk,brckhd->brchd", (score - lse[..., None]).exp(), v)
        for score, v in zip(scores, kept, strict=True)
    )
    return out.flatten(-2), lse


def leaves(arguments: Arguments) -> Arguments:
    """In float64 and taking gradient."""
    return Arguments(
        arguments.q.double().requires_grad_(),
        *([tensor.double().requires_grad_() for tensor in group] for group in arguments[1:7]),
        arguments.masks,
    )


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, name: str, terms: int = 1) -> None:
    """The storage type's rounding of the result, half a unit in the last place, and fp32 arithmetic before it.

    fp32 sums of `terms` products err by less than terms units of the largest partial sum, which the largest entry of
    the result stands for; __expf adds a few units a score.
    """
    wanted = wanted.detach()
    arithmetic = (terms + 16) * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
    error = (got.double() - wanted).abs() - wanted.abs() * torch.finfo(dtype).eps / 2
    where = torch.unravel_index(error.argmax(), got.shape)
    allowed = arithmetic + torch.finfo(dtype).tiny
    assert error[where] <= allowed, f"{name}: {error.max():.2e} beyond rounding at {where}, allowed {allowed:.2e}"


def compare(emulated: Any, arguments: Arguments) -> None:
    """Forward and backward against float64."""
    dtype = arguments.q.dtype
    out, lse, _, _ = emulated.sva(*arguments, EPS)
    exactly = leaves(arguments)
    wanted_out, wanted_lse = exact(exactly)
    width = arguments.q.shape[-1]
    keys = sum(key.shape[1] * key.shape[2] for key in arguments.keys) // (out.shape[1] * out.shape[2])
    close(out, wanted_out, dtype, "out", keys + width)
    close(lse, wanted_lse, torch.float32, "lse", keys + width)

    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(wanted_out, [exactly.q, *exactly.keys, *exactly.values], grad_out.double())
    grad_q, grad_keys, grad_values, *_ = emulated.sva_backward(grad_out, [], [], *arguments, lse, EPS)
    names = ["q"] + [f"{name}[{i}]" for name in ("keys", "values") for i in range(len(grad_keys))]
    for name, got, want in zip(names, [grad_q, *grad_keys, *grad_values], wanted, strict=True):
        close(got, want, dtype, f"gradient of {name}", 2 * (keys + width))


CASES = [
    Case(1, 2, 3, 2, 64, (1,)),
    Case(2, 2, 1, 3, 32, (1, 2, 3)),
    Case(1, 1, 2, 4, 64, (1, 1, 1, 4)),
    Case(1, 1, 2, 4, 64, (2, 1, 4), masked=True),
    Case(1, 2, 1, 2, 80, (2, 1)),
    Case(1, 1, 2, 3, 128, (1, 2), masked=True),
    Case(1, 1, 1, 1, 96, (5, 6, 7)),
    Case(1, 1, 1, 2, 64, (8, 8), masked=True),
    Case(1, 2, 2, 2, 31, (1, 3), masked=True),
    Case(1, 1, 2, 1, 127, (2,)),
    Case(1, 2, 1, 5, 8, (1, 2, 1, 2, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(emulated, dtype, case):
    compare(emulated, draw(case, dtype))


def test_the_contract_is_the_reference(emulated):
    """The float64 function above is the released arithmetic where the grid is square."""
    arguments = leaves(draw(Case(2, 3, 3, 2, 8, (1, 2), masked=True), torch.float64))
    wanted = reference.sva(arguments.q, arguments.keys, arguments.values, arguments.masks)
    torch.testing.assert_close(exact(arguments)[0], wanted.to(torch.float64), rtol=0, atol=1e-12)
