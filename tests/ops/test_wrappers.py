"""What the wrappers of all operators have in common: devices, dtypes without a kernel, autocast; and the checks of the
backward schemas, which autograd calls but anyone may."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmoe import ops
from mmoe.ops.grouped_linear import grouped_linear
from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.ops.permute import permute
from mmoe.ops.permute_fp8 import permute_fp8
from mmoe.ops.permute_index import permute_index
from mmoe.ops.router import router
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.ops.unpermute import unpermute
from mmoe.reference import hidden_z_loss as reference_z
from mmoe.reference import permute as reference_permute
from mmoe.reference import sva as reference_sva
from mmoe.reference import unpermute as reference_unpermute

WAYS = {"zero_experts": 2, "top_k": 2}
META = torch.device("meta")


def absorbed(channels: int = 5, width: int = 8) -> Absorbed:
    vectors = [torch.randn(channels) for _ in range(4)]
    return Absorbed(
        torch.randn(1, 6, 6, channels),
        torch.randn(4, channels),
        vectors[0],
        vectors[1],
        torch.randn(width, channels),
        vectors[2],
        vectors[3],
        torch.randn(width, channels),
    )


def projected() -> Projected:
    return Projected(torch.randn(1, 3, 3, 8), torch.randn(1, 3, 3, 8))


def combination(**change: torch.Tensor) -> torch.Tensor:
    arguments = {
        "rows": torch.randn(3, 4),
        "row_of_slot": torch.tensor([[0, 1], [2, -1]]),
        "weights": torch.rand(2, 2),
        "x": torch.randn(2, 4),
        "identity": torch.rand(2),
        "slot_of_row": torch.tensor([0, 1, 2]),
    }
    return unpermute(**(arguments | change))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: hidden_z_loss(torch.zeros(3, 4), 1.0, valid=torch.ones(3, dtype=torch.bool, device=META)), "valid"),
        (lambda: router(torch.zeros(3, 4), torch.zeros(4, device=META), **WAYS), "bias"),
        (
            lambda: router(
                torch.zeros(3, 4), torch.zeros(4), **WAYS, valid=torch.ones(3, dtype=torch.bool, device=META)
            ),
            "valid",
        ),
        (lambda: permute(torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64, device=META), 2), "ids"),
        (lambda: permute_fp8(torch.zeros(3, 128), torch.zeros(3, 2, dtype=torch.int64, device=META), 2), "ids"),
        *(
            (lambda name=name: combination(**{name: torch.zeros(2, 2, dtype=torch.int64, device=META)}), name)
            for name in ("row_of_slot", "weights", "x", "identity", "slot_of_row")
        ),
        (
            lambda: sva(
                torch.zeros(1, 3, 3, 2, 4), [projected()._replace(values=torch.zeros(1, 3, 3, 8, device=META))]
            ),
            r"sources\[0\]\.values",
        ),
        (
            lambda: sva(torch.zeros(1, 3, 3, 2, 4), [absorbed()._replace(key_weight=torch.zeros(8, 5, device=META))]),
            r"sources\[0\]\.key_weight",
        ),
        (
            lambda: sva(
                torch.zeros(1, 3, 3, 2, 4), [projected()], [torch.ones(1, 3, 3, dtype=torch.bool, device=META)]
            ),
            r"masks\[0\]",
        ),
    ],
)
def test_a_tensor_elsewhere_is_named(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is on meta, must be on cpu as "):
        call()


HALF = torch.float16
IDS = torch.tensor([[0, 2], [1, 0]])


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(HALF)


def halves() -> list[Projected]:
    return [Projected(half(1, 3, 3, 8), half(1, 3, 3, 8))]


def index() -> tuple[torch.Tensor, torch.Tensor]:
    sent = permute_index(IDS, 2)
    return sent.row_of_slot, sent.slot_of_row


COMBINED = (half(3, 4), index()[0], torch.rand(2, 2), half(2, 4), torch.rand(2))
WITHOUT_KERNEL = {
    "hidden_z_loss": (lambda: hidden_z_loss(half(2, 4), 1.0), lambda: reference_z.hidden_z_loss(half(2, 4), 1.0, None)),
    "permute": (lambda: permute(half(2, 4), IDS, 2).rows, lambda: reference_permute.gather(half(2, 4), *index())),
    "unpermute": (lambda: unpermute(*COMBINED), lambda: reference_unpermute.unpermute(*COMBINED)),
    "sva": (lambda: sva(half(1, 3, 3, 2, 4), halves()), lambda: reference_sva.sva(half(1, 3, 3, 2, 4), halves(), None)),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_a_dtype_without_a_kernel_runs_the_reference_and_says_so(name: str) -> None:
    ours, wanted = WITHOUT_KERNEL[name]
    ops._find_kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{name} runs as PyTorch reference for torch\.float16 on cpu"):
        out = ours()
    assert torch.equal(out, wanted())


def test_autocast_combines_in_the_wider_dtype() -> None:
    """Rows come from a GEMM, so in bf16; the tokens they return to may still be fp32."""
    rows = torch.randn(3, 4).bfloat16()
    with pytest.raises(TypeError, match=r"x is torch\.float32"):
        combination(rows=rows)
    x, weights, identity = torch.randn(2, 4), torch.rand(2, 2), torch.rand(2)
    change = {"x": x, "weights": weights, "identity": identity}
    with torch.autocast("cpu", torch.bfloat16):
        out = combination(rows=rows, **change)
    assert torch.equal(out, combination(rows=rows.float(), **change))


def test_autocast_attends_in_its_dtype() -> None:
    q, sources = torch.randn(1, 3, 3, 2, 4), [projected(), absorbed()]
    half = [type(source)(*(p.bfloat16() if isinstance(p, torch.Tensor) else p for p in source)) for source in sources]
    with torch.autocast("cpu", torch.bfloat16):
        out = sva(q, sources)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sva(q.bfloat16(), half))


def test_autocast_multiplies_in_its_dtype() -> None:
    rows, weight, ends = torch.randn(4, 8), torch.randn(2, 6, 8), torch.tensor([1, 4], dtype=torch.int32)
    wanted = grouped_linear(rows.bfloat16(), weight.bfloat16(), ends)
    for given in (rows, rows.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            out = grouped_linear(given, weight, ends)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, wanted)


def test_autocast_inside_of_compile() -> None:
    q, source, rows = torch.randn(1, 3, 3, 2, 4), projected(), torch.randn(3, 4).bfloat16()
    x, weights, identity = torch.randn(2, 4), torch.rand(2, 2), torch.rand(2)

    def both(q: torch.Tensor, keys: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = sva(q, [Projected(keys, source.values)])
        return mixed, combination(rows=rows, x=x, weights=weights, identity=identity)

    with torch.autocast("cpu", torch.bfloat16):
        wanted = both(q, source.keys, x)
        got = torch.compile(both, backend="aot_eager", fullgraph=True)(q, source.keys, x)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_autocast_leaves_the_rest_as_it_is() -> None:
    """Copies have no arithmetic, and hidden_z_loss sums in fp32 whatever it reads."""
    x, ids = torch.randn(4, 8), torch.tensor([[0, 1], [1, 2], [2, 2], [0, 0]])
    for tensor in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            sent, loss = permute(tensor, ids, 2), hidden_z_loss(tensor, 1.0)
        assert sent.rows.dtype == tensor.dtype
        assert torch.equal(sent.rows, permute(tensor, ids, 2).rows)
        assert torch.equal(loss, hidden_z_loss(tensor, 1.0))


ROUTED = {
    "grad_weights": torch.ones(3, 2),
    "grad_identity": torch.ones(3),
    "grad_group_probs": torch.ones(2),
    "logits": torch.zeros(3, 4),
    "valid": None,
    "ids": torch.zeros(3, 2, dtype=torch.int64),
    "stats": torch.ones(3, 2),
}
Z_LOSS = {"grad_loss": torch.ones(()), "z": torch.ones(3, 4), "lse": torch.ones(3), "count": torch.ones(())}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("grad_weights", torch.ones(3, 1)),
        ("grad_weights", torch.ones(3, 2).double()),
        ("grad_identity", torch.ones(2)),
        ("grad_group_probs", torch.ones(3)),
        ("ids", torch.zeros(2, 2, dtype=torch.int64)),
        ("ids", torch.zeros(3, 2, dtype=torch.int32)),
        ("stats", torch.ones(3, 1)),
        ("valid", torch.ones(3)),
    ],
)
def test_the_routers_backward_names_the_argument(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=f"router: {name} "):
        torch.ops.mmoe.router_backward(*(ROUTED | {name: wrong}).values(), 2, 1.0, "softmax", False, 1, "scaled")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("grad_loss", torch.ones(2)),
        ("lse", torch.ones(2)),
        ("lse", torch.ones(3).bfloat16()),
        ("count", torch.ones((), dtype=torch.int64)),
        ("z", torch.ones(3)),
    ],
)
def test_the_hidden_z_losss_backward_names_the_argument(name: str, wrong: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=f"hidden_z_loss: {name} "):
        torch.ops.mmoe.hidden_z_loss_backward(*(Z_LOSS | {name: wrong}).values(), 1.0)
