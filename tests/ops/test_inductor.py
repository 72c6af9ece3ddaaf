"""Every operator inside of torch.compile's default backend gives the bits that it gives eagerly, forward and backward.

The arithmetic around the operators, which inductor fuses, is exact: powers of two, and single additions.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.ops.permute import permute
from mmoe.ops.router import router
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.ops.unpermute import unpermute

# Inductor's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def moe(logits: Tensor, x: Tensor) -> list[Tensor]:
    """Router, permute_index, permute and unpermute."""
    out = router(2 * logits, torch.zeros(9), zero_experts=3, top_k=4)
    sent = permute(x + 1, out.ids, 6, align=8, max_rows=120)
    return [unpermute(2 * sent.rows, sent.row_of_slot, out.weights, x, out.identity), 2 * out.group_probs]


def z_loss(z: Tensor) -> list[Tensor]:
    return [2 * hidden_z_loss(z + 1, 0.5)]


def projected(q: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    return [2 * sva(q + 1, [Projected(2 * keys, values)])]


def absorbed(q: Tensor, features: Tensor, *rest: Tensor) -> list[Tensor]:
    return [2 * sva(q + 1, [Absorbed(2 * features, *rest)])]


GRID = (1, 4, 4, 8)
RUNS = {
    "moe": (moe, draw((13, 9), (13, 24))),
    "hidden_z_loss": (z_loss, draw((5, 24))),
    "sva, projected": (projected, draw((1, 2, 2, 2, 4), GRID, GRID)),
    "sva, absorbed": (absorbed, draw((1, 2, 2, 2, 4), GRID, (4, 8), *2 * [(8,), (8,), (8, 8)])),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits(name: str) -> None:
    function, leaves = RUNS[name]
    eager, compiled = (results(run, leaves) for run in (function, torch.compile(function, fullgraph=True)))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def results(function: Callable[..., list[Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    return [*out, *torch.autograd.grad(out, leaves, [torch.full_like(part, 0.5) for part in out])]
