"""Drawn arguments of sva."""

from typing import NamedTuple

import torch
from ops.sva_core import Core
from torch import Tensor


class Case(NamedTuple):
    """B, R, W, H, D, the windows m of the projected encoders, (m, C) of the absorbed ones."""

    batch: int
    rows: int
    columns: int
    heads: int
    width: int
    projected: tuple[int, ...] = ()
    absorbed: tuple[tuple[int, int], ...] = ()
    masked: bool = False

    def __str__(self) -> str:
        mask = "masked" if self.masked else ""
        sizes = f"{self.batch}x{self.rows}x{self.columns}h{self.heads}d{self.width}"
        return f"{sizes}p{self.projected}a{self.absorbed}{mask}".replace(" ", "")


def draw(case: Case, dtype: torch.dtype) -> Core:
    """Normal values in ``dtype``; where masked, half of the cells and one whole window of each encoder."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.promote_types(torch.float32, dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    batch, rows, columns, heads, width = case[:5]
    sides = [*case.projected, *(m for m, _ in case.absorbed)]
    grids = [(batch, m * rows, m * columns) for m in sides]
    masks = [torch.empty(0, dtype=torch.bool) for _ in grids]
    if case.masked:
        masks = [torch.rand(*grid, generator=generator) < 0.5 for grid in grids]
        for mask, m in zip(masks, sides, strict=True):
            mask[0, :m, :m] = False  # a window without a valid key
    projected, absorbed = grids[: len(case.projected)], grids[len(case.projected) :]
    channels = [c for _, c in case.absorbed]
    query = (heads, batch, rows, columns)
    return Core(
        normal(batch, rows, columns, heads, width),
        [normal(*grid, heads * width) for grid in projected],
        [normal(*grid, heads * width) for grid in projected],
        [2 * normal(*grid, c) + 1 for grid, c in zip(absorbed, channels, strict=True)],
        [normal(m * m, c) if m > 1 else normal(0) for m, c in case.absorbed],
        # Scores of size one, like those of the keys.
        [normal(*query, c, scale=(width / c) ** 0.5) for c in channels],
        [normal(*query).to(exponent) for _ in channels],
        masks,
    )


def windows(grid: Tensor, rows: int, columns: int) -> Tensor:
    """[B, m·R, m·W, …] → [B, R, W, m², …]."""
    batch, m = grid.shape[0], grid.shape[1] // rows
    split = grid.reshape(batch, rows, m, columns, m, *grid.shape[3:]).transpose(2, 3)
    return split.reshape(batch, rows, columns, m * m, *grid.shape[3:])
