"""What a benchmark is: one operator at one shape and dtype, with its peers and the bytes that it cannot avoid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmarks.measure import Side


class Floor(NamedTuple):
    """Bytes of a pass where each input is read once and each output is written once."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Workload:
    """A case with its tensors. Peers run on the same values."""

    ours: Side
    peers: Mapping[str, Side]
    floor: Floor | None = None


@dataclass(frozen=True)
class Case:
    """``build`` runs under ``torch.device(...)``, seeded; nothing of a case is in memory before and after it."""

    operator: str
    shape: str
    dtype: torch.dtype
    build: Callable[[], Workload] = field(repr=False)
    passes: tuple[str, ...] = ("forward", "backward")
    memory: bool = False
    """Whether extra memory is compared too (:mod:`benchmarks.memory`)."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class MoeShape:
    """T tokens of width d, k slots a token among N FFN experts and Z zero experts."""

    name: str
    tokens: int
    experts: int
    zero_experts: int
    top_k: int
    width: int
    scaling: float = 6.0

    def routing(self) -> torch.Tensor:
        """ids [T, k]: every token's slots, drawn evenly."""
        return torch.rand(self.tokens, self.experts + self.zero_experts).topk(self.top_k).indices


@dataclass(frozen=True)
class SvaShape:
    """B images, L × L queries, H heads of width D; encoder i shows every query a window of m_i × m_i keys."""

    name: str
    batch: int
    side: int
    heads: int
    head_width: int
    windows: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.heads * self.head_width


SMALL = [MoeShape(f"small MoE T {tokens}", tokens, 16, 8, 4, 512) for tokens in (1024, 8192)]
MOE = [*SMALL, *(MoeShape(f"LongCat-Flash T {tokens}", tokens, 512, 256, 12, 6144) for tokens in (1024, 8192))]
SVA = [SvaShape(f"Cambrian-1 8B B {batch}", batch, 24, 16, 64, (1, 1, 1, 4)) for batch in (1, 4)]
QUICK_MOE = [MoeShape("quick T 64", 64, 8, 4, 3, 32)]
QUICK_SVA = [SvaShape("quick B 2", 2, 4, 2, 16, (1, 1, 2))]
DTYPES = (torch.float32, torch.bfloat16)
