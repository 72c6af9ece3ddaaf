"""What this machine can do at best, in the run that is judged by it: memory bandwidth and matrix products."""

import torch

from benchmarks.measure import Effort, alternate, repeat
from benchmarks.report import Row


class Triad:
    """a = b + s · c, float32, over arrays that no cache holds. Three arrays move a call, as STREAM counts them."""

    def __init__(self, device: torch.device, mebibytes: int) -> None:
        elements = mebibytes * 2**20 // 4
        self.b, self.c = torch.rand(elements, device=device), torch.rand(elements, device=device)
        self.a = torch.empty_like(self.b)
        self.bytes = 3 * self.a.nbytes
        self.size = f"3 × {mebibytes} MiB"

    def __call__(self) -> None:
        torch.add(self.b, self.c, alpha=3.0, out=self.a)

    def fresh(self) -> None:
        """The same into memory that the allocator hands out, as every operator writes."""
        torch.add(self.b, self.c, alpha=3.0)

    def copy(self) -> None:
        self.a.copy_(self.b)


def rows(triad: Triad, device: torch.device, effort: Effort, side: int) -> list[Row]:
    """Bandwidths in GB/s and products of side × side matrices in GFLOP/s."""
    kept, fresh = alternate(repeat(triad), repeat(triad.fresh), effort)
    copy, _ = alternate(repeat(triad.copy), repeat(triad), effort)
    out = [
        Row("ceiling.triad", triad.size, "float32", triad.bytes / kept.seconds / 1e9, unit="GB/s"),
        Row("ceiling.triad, fresh output", triad.size, "float32", triad.bytes / fresh.seconds / 1e9, unit="GB/s"),
        Row("ceiling.copy", triad.size, "float32", triad.bytes * 2 / 3 / copy.seconds / 1e9, unit="GB/s"),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product, _ = alternate(repeat(lambda a=a, b=b: a @ b), repeat(triad), effort)
        rate = 2 * side**3 / product.seconds / 1e9
        out.append(Row("ceiling.gemm", f"{side}³", str(dtype).removeprefix("torch."), rate, unit="GFLOP/s"))
    return out
