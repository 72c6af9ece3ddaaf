"""What the tests of the operators on a device draw: a sample for each way of calling one."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmoe.ops.grouped_linear import grouped_linear
from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.ops.permute import permute
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.ops.unpermute import unpermute
from mmoe.reference import grouped_linear as reference_grouped_linear
from mmoe.reference import hidden_z_loss as reference_hidden_z_loss
from mmoe.reference import permute as reference_permute
from mmoe.reference import permute_index as reference_permute_index
from mmoe.reference import sva as reference_sva
from mmoe.reference import unpermute as reference_unpermute

OPERATORS = SimpleNamespace(
    grouped_linear=grouped_linear, hidden_z_loss=hidden_z_loss, permute=permute, sva=sva, unpermute=unpermute
)
REFERENCES = SimpleNamespace(
    grouped_linear=reference_grouped_linear.grouped_linear,
    hidden_z_loss=reference_hidden_z_loss.hidden_z_loss,
    permute=reference_permute.permute,
    sva=reference_sva.sva,
    unpermute=reference_unpermute.unpermute,
)

ON_CUDA = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
DTYPES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    *(pytest.param("cuda", dtype, marks=ON_CUDA) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


Leaves = Sequence[Tensor]
Constants = Sequence[Tensor | None]


class Sample(NamedTuple):
    """``call(side, data, scalars, constants)`` returns outputs that carry gradient to data and scalars.

    ``side`` is OPERATORS or REFERENCES; the tensors are those given here on some device: ``data`` (float64) in the
    tested dtype, ``scalars`` (float64: routing weights) in float32, ``constants`` (indices, masks) as they are.
    """

    call: Callable[[Any, Leaves, Leaves, Constants], Leaves]
    data: Leaves
    scalars: Leaves = ()
    constants: Constants = ()


class Placed(NamedTuple):
    """A sample's tensors on a device."""

    data: list[Tensor]
    scalars: list[Tensor]
    constants: list[Tensor | None]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.data, *self.scalars]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slots(tokens: int, columns: int, top_k: int) -> Tensor:
    """Distinct experts for every token."""
    return torch.rand(tokens, columns, generator=torch.Generator().manual_seed(tokens)).argsort(1)[:, :top_k]


def z_loss(tokens: int, width: int, masked: bool) -> Sample:
    valid = torch.arange(tokens) % 3 != 1 if masked else None
    return Sample(
        lambda side, data, _, constants: [side.hidden_z_loss(data[0], 0.5, valid=constants[0])],
        [3 * normal(tokens, width)],
        constants=[valid],
    )


def there(ids: Tensor, experts: int, width: int, **options: int) -> Sample:
    return Sample(
        lambda side, data, _, constants: [side.permute(data[0], constants[0], experts, **options).rows],
        [normal(len(ids), width)],
        constants=[ids],
    )


def back(ids: Tensor, experts: int, width: int) -> Sample:
    index = reference_permute_index.permute_index(ids, experts)

    def call(side: Any, data: Leaves, scalars: Leaves, constants: Constants) -> list[Tensor]:
        (rows, x), (weights, identity) = data, scalars
        return [side.unpermute(rows, constants[0], weights, x, identity)]

    data = [normal(len(index.slot_of_row), width), normal(len(ids), width, seed=1)]
    return Sample(call, data, [normal(*ids.shape, seed=2), normal(len(ids), seed=3)], [index.row_of_slot])


def grouped(counts: Sequence[int]) -> Sample:
    """Widths of whole vectors, as CUDA's kernel wants them."""
    return Sample(
        lambda side, data, _, constants: [side.grouped_linear(*data, constants[0])],
        [normal(sum(counts), 32), normal(len(counts), 3, 8, 32, seed=1)],
        constants=[torch.tensor(counts).cumsum(0).to(torch.int32)],
    )


def aggregate(
    windows: Sequence[int], absorbed: Sequence[bool], head_width: int, masked: bool, batch: int = 2
) -> Sample:
    """L = 3, two heads; the masks leave whole windows of an encoder without a valid key."""
    side, heads = 3, 2
    width = heads * head_width
    tensors, masks = [normal(batch, side, side, heads, head_width)], []
    for i, (m, fold) in enumerate(zip(windows, absorbed, strict=True)):
        grid, seed = (batch, m * side, m * side, width), 10 * i
        tensors.append(normal(*grid, seed=seed + 1))
        if fold:
            tensors.append(normal(m * m, width, seed=seed + 2))
            for which in (3, 6):
                gain = 1 + 0.1 * normal(width, seed=seed + which)
                tensors += [gain, normal(width, seed=seed + which + 1)]
                tensors.append(normal(width, width, seed=seed + which + 2) * width**-0.5)
        else:
            tensors.append(normal(*grid, seed=seed + 2))
        rows = torch.arange(m * side)
        masks.append(((rows >= m) & (rows < 2 * m))[None, :, None].expand(grid[:3]) if masked else None)

    def call(of: Any, data: Leaves, _: Leaves, masks: Constants) -> list[Tensor]:
        q, *rest = data
        sources: list[Projected | Absorbed] = []
        for fold in absorbed:
            count = 8 if fold else 2
            sources.append(Absorbed(*rest[:count]) if fold else Projected(*rest[:count]))
            rest = rest[count:]
        return [of.sva(q, sources, masks)]

    return Sample(call, tensors, constants=masks)


MIXED = slots(13, 9, 4)
# Widths: below a vector, ragged, several vectors a lane with a tail.
SAMPLES = {
    **{
        f"hidden_z_loss {tokens} × {width}{' masked' if masked else ''}": z_loss(tokens, width, masked)
        for tokens, width, masked in [(9, 1, False), (9, 7, True), (9, 517, True), (1, 6144, False), (0, 8, False)]
    },
    **{
        f"{name}, {width} wide": make(ids, 6, width)
        for width in (1, 7, 24, 517)
        for name, make, ids in [("permute", there, MIXED), ("unpermute", back, MIXED)]
    },
    **{
        f"{kind} of {name}": make(ids, 6, 24)
        for kind, make in [("permute", there), ("unpermute", back)]
        for name, ids in {
            "no token": torch.zeros(0, 4, dtype=torch.int64),
            "one token": slots(1, 9, 4),
            "one expert": torch.full((7, 1), 2),
            "zero experts alone": 6 + slots(5, 3, 2),
        }.items()
    },
    "grouped_linear": grouped([5, 0, 300, 1]),
    "permute, aligned": there(MIXED, 6, 24, align=8),
    "permute, rows left over": there(MIXED, 6, 24, align=8, max_rows=150),
    **{
        f"sva {windows}, {width} wide{' masked' if masked else ''}": aggregate(
            windows, [False] * len(windows), width, masked
        )
        for windows, width, masked in [
            ((1,), 32, False),
            ((1, 1, 2), 40, True),
            ((4, 1), 64, True),
            ((8,), 128, False),
            ((2, 3), 7, True),
        ]
    },
    "sva without an image": aggregate((1, 2), (False, False), 32, True, batch=0),
    "sva absorbed": aggregate((1, 2), (False, True), 16, True),
    "sva absorbed alone": aggregate((4, 2), (True, True), 8, False),
}


def place(sample: Sample, device: str, dtype: torch.dtype) -> Placed:
    """The sample's values, rounded to ``dtype`` (and float32), as leaves on the device."""
    scalar = torch.promote_types(torch.float32, dtype)
    return Placed(
        [part.to(device, dtype, copy=True).requires_grad_() for part in sample.data],
        [part.to(device, scalar, copy=True).requires_grad_() for part in sample.scalars],
        [part if part is None else part.to(device) for part in sample.constants],
    )


def results(side: Any, sample: Sample, placed: Placed) -> list[Tensor]:
    """Outputs, and the gradients of all leaves for cotangents that every dtype here can hold."""
    out = sample.call(side, *placed)
    given = [normal(*part.shape, seed=99).bfloat16().half().to(part) for part in out]
    grads = torch.autograd.grad(out, placed.leaves, given)
    return [part.detach() for part in (*out, *grads)]
