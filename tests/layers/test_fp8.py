"""The FP8 recipes against exact arithmetic: each GEMM's error is bounded by the formats, each block has its own scale.

Bound of one GEMM c = Σ_k a_k b_k. Rounding to nearest with m stored mantissa bits moves a number by at most half the
spacing 2^(e-m) of its binade [2^e, 2^(e+1)), so by u|x|, u = 2^-(m+1); a subnormal by η, half of the smallest number:

    E4M3  u = 2^-4, η = 2^-10          E5M2  u = 2^-3, η = 2^-17

of the scaled number x · s, so |x̂ − x| ≤ E(x) = u|x| + η / s. s = largest ÷ amax, or at least half of that where it is
rounded down to a power of two. Then

    |ĉ − c| ≤ Σ E(a)|b| + |a|E(b) + E(a)E(b)  +  (K + 8) 2^-24 Σ (|a| + E(a)) (|b| + E(b))

with fp32 sums and scales in the last term; a bf16 result adds 2^-8 (|c| + all that).
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from torch import Tensor

from mmoe.layers import fp8
from mmoe.models import multimodal
from mmoe.parallel import engine
from mmoe.recipe.schema import Fp8, Parallel

RECIPES: tuple[Fp8, ...] = ("delayed", "tensorwise", "blockwise", "mxfp8")
BLOCK = {"blockwise": 128, "mxfp8": 32}
U = {"input": 2**-4, "weight": 2**-4, "grad": 2**-3}
ETA = {"input": 2**-10, "weight": 2**-10, "grad": 2**-17}
LARGEST = {"input": 448, "weight": 448, "grad": 57344}
T, K, N = 150, 200, 136
ENDS = torch.tensor([0, 70, 149, 150], dtype=torch.int32)
"""Experts with no rows, with a piece of a block, with more than one of mxfp8's, with one row."""


def heavy_tailed(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes over five decades, so that blocks differ and some values are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randn(shape, generator=generator)
    return (sign * 10 ** (-5 * torch.rand(shape, generator=generator))).to(dtype)


def block_amax(x: Tensor, role: fp8.Role, recipe: Fp8, contraction: int) -> Tensor:
    """Like x [M, K]: the amax of each value's block, one block after another."""
    amax = torch.empty_like(x)
    if recipe not in BLOCK:
        return amax.fill_(x.abs().max() if x.numel() else 0.0)
    size = BLOCK[recipe]
    high, wide = (1, size) if contraction == -1 else (size, 1)
    if recipe == "blockwise" and role == "weight":
        high = wide = size
    for top in range(0, x.size(0), high):
        for left in range(0, x.size(1), wide):
            place = (slice(top, top + high), slice(left, left + wide))
            amax[place] = x[place].abs().max()
    return amax


def spread(x: Tensor, role: fp8.Role, recipe: Fp8, contraction: int) -> Tensor:
    """E(x) of the docstring, fp64."""
    halved = 2 if recipe in BLOCK else 1
    return U[role] * x.abs() + halved * ETA[role] / LARGEST[role] * block_amax(x, role, recipe, contraction)


def check(got: Tensor, a: Tensor, b: Tensor, spread_a: Tensor, spread_b: Tensor) -> None:
    """``got`` against a · b in fp64: inside the bound, and far enough from exact to have been quantised."""
    exact = a @ b
    bound = spread_a @ b.abs() + a.abs() @ spread_b + spread_a @ spread_b
    bound += (a.size(1) + 8) * 2**-24 * (a.abs() + spread_a) @ (b.abs() + spread_b)
    if got.dtype is torch.bfloat16:
        bound += 2**-8 * (exact.abs() + bound)
    ratio = (got.double() - exact).abs() / bound.clamp(min=1e-300)
    if not ratio.numel():
        return
    worst = int(ratio.argmax())
    assert ratio.max() <= 1, f"{float(ratio.max()):.3f} of the bound at {divmod(worst, ratio.size(1))}"
    assert ratio.mean() > 0.001


def settled(recipe: Fp8, run: Callable[[Any], Tensor], experts: int | None = None) -> Any:
    """A scaling whose delayed scales come from the very tensors that ``run`` uses."""
    scaling = fp8.make_scaling(recipe, 2, experts)
    if recipe == "delayed":
        engine.start(Parallel(), 0)
        run(scaling)
        fp8.end_step([scaling], taken=True)
    return scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_gemms_stay_inside_the_formats_bound(recipe: Fp8, dtype: torch.dtype) -> None:
    x = heavy_tailed(T, K, seed=1, dtype=dtype).requires_grad_()
    w = heavy_tailed(N, K, seed=2, dtype=dtype).requires_grad_()
    dy = heavy_tailed(T, N, seed=3, dtype=dtype)

    def run(scaling: Any) -> Tensor:
        y = fp8.linear(x, w, scaling, "mlp")
        x.grad = w.grad = None
        y.backward(dy)
        return y

    y = run(settled(recipe, run))
    x64, w64, dy64 = x.detach().double(), w.detach().double(), dy.double()

    def e(value: Tensor, role: fp8.Role, contraction: int) -> Tensor:
        return spread(value, role, recipe, contraction)

    assert x.grad is not None
    assert w.grad is not None
    check(y.detach(), x64, w64.t(), e(x64, "input", -1), e(w64, "weight", -1).t())
    check(x.grad, dy64, w64, e(dy64, "grad", -1), e(w64, "weight", 0))
    check(w.grad, dy64.t(), x64, e(dy64, "grad", 0).t(), e(x64, "input", 0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_expert_is_bounded_by_its_own_scales(recipe: Fp8) -> None:
    """A grouped GEMM whose experts see magnitudes 1000 times apart."""
    n = len(ENDS)
    expert = torch.searchsorted(ENDS, torch.arange(T), right=True)
    apart = 1000.0 ** -torch.arange(n)
    x = (heavy_tailed(T, K, seed=1) * apart[expert][:, None]).requires_grad_()
    w = (heavy_tailed(n, N, K, seed=2) * apart[:, None, None]).requires_grad_()
    dy = heavy_tailed(T, N, seed=3) * apart[expert][:, None]

    def run(scaling: Any) -> Tensor:
        y = fp8.grouped_linear(x, w, ENDS, scaling, "experts")
        x.grad = w.grad = None
        y.backward(dy)
        return y

    y = run(settled(recipe, run, n))
    assert x.grad is not None
    assert w.grad is not None
    for index, (begin, end) in enumerate(zip([0, *ENDS.tolist()], ENDS.tolist(), strict=False)):
        rows = slice(begin, end)
        x64, w64, dy64 = x.detach()[rows].double(), w.detach()[index].double(), dy[rows].double()
        e = {
            name: spread(value, role, recipe, along)
            for name, value, role, along in (
                ("x", x64, "input", -1),
                ("w", w64, "weight", -1),
                ("dy", dy64, "grad", -1),
                ("w0", w64, "weight", 0),
                ("dy0", dy64, "grad", 0),
                ("x0", x64, "input", 0),
            )
        }
        check(y.detach()[rows], x64, w64.t(), e["x"], e["w"].t())
        check(x.grad[rows], dy64, w64, e["dy"], e["w0"])
        if begin == end:
            assert (w.grad[index] == 0).all()
        else:
            check(w.grad[index], dy64.t(), x64, e["dy0"].t(), e["x0"])


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize(("role", "contraction"), [("input", -1), ("weight", -1), ("weight", -2), ("grad", 0)])
def test_a_block_shares_one_power_of_two(recipe: Fp8, role: fp8.Role, contraction: int) -> None:
    """1/s = 2^⌈log₂(amax ÷ largest)⌉: the largest value neither saturates nor leaves a bit unused."""
    x = heavy_tailed(T, K, seed=5)
    got = fp8.make_scaling(recipe, 1).operand(x, role, contraction, None, False)
    amax = block_amax(x, role, recipe, -1 if contraction == -1 else 0)
    mantissa, exponent = torch.frexp(amax / LARGEST[role])
    inverse = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    assert torch.equal(got.inverse.expand_as(x), inverse)
    assert torch.equal(got.values.float(), (x / inverse).to(fp8.FORMAT[role]).float())
    assert got.values.float().abs().max() > LARGEST[role] / 2 * (1 - 2**-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_no_block_reaches_into_the_next_experts_rows(recipe: Fp8) -> None:
    x = heavy_tailed(T, K, seed=6)
    scaling = fp8.make_scaling(recipe, 1)
    together = scaling.operand(x, "grad", 0, ENDS, False).dequantised()
    parts = [x[begin:end] for begin, end in zip([0, *ENDS.tolist()], ENDS.tolist(), strict=False)]
    alone = [scaling.operand(part, "grad", 0, None, False).dequantised() for part in parts]
    assert torch.equal(together, torch.cat(alone))


def test_an_outlier_costs_its_block_and_no_other() -> None:
    x = torch.full((1, 256), 1e-3)
    x[0, 0] = 1e4
    for recipe, kept in {"tensorwise": 0, "blockwise": 128, "mxfp8": 224}.items():
        got = fp8.make_scaling(recipe, 1).operand(x, "input", -1, None, False).dequantised()  # type: ignore[arg-type]
        assert int((got[0, 1:] > 0).sum()) == kept, recipe


@pytest.mark.parametrize("shape", [(16, 16, 16), (7, 33, 5), (1, 1, 1), (192, 32, 64), (0, 32, 16), (16, 0, 16)])
def test_the_scaled_matmul_is_the_product_of_the_dequantised(shape: tuple[int, int, int]) -> None:
    """torch._scaled_mm of E5M2 · E4M3, plain and transposed, within the rounding of K fp32 additions and two scales."""
    rows, inner, columns = shape
    a = fp8.Scaled.of(heavy_tailed(rows, inner, seed=1), torch.tensor(3.0), "grad")
    b = fp8.Scaled.of(heavy_tailed(columns, inner, seed=2), torch.tensor(0.7), "input").transposed
    a_flipped = fp8.Scaled.of(heavy_tailed(inner, rows, seed=3), torch.tensor(3.0), "grad").transposed
    for left in (a, a_flipped):
        got = fp8.multiply(left, b, None)
        exact = left.dequantised().double() @ b.dequantised().double()
        bound = (inner + 4) * 2**-24 * (left.dequantised().double().abs() @ b.dequantised().double().abs())
        assert got.shape == (rows, columns)
        assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_one_token_and_nan(recipe: Fp8) -> None:
    w = heavy_tailed(N, K, seed=2).requires_grad_()
    for count in (0, 1):
        x = heavy_tailed(count, K, seed=1).requires_grad_()
        w.grad = None
        y = fp8.linear(x, w, fp8.make_scaling(recipe, 1), "mlp")
        y.sum().backward()
        assert y.shape == (count, N)
        assert w.grad is not None
        assert bool((w.grad != 0).any()) == bool(count)
    x = heavy_tailed(2, K, seed=1)
    x[1, 3] = math.nan
    assert fp8.linear(x, w, fp8.make_scaling(recipe, 1), "mlp")[1].isnan().all()


@pytest.mark.parametrize("role", fp8.ROLES)
def test_what_a_scale_is_too_large_for_saturates(role: fp8.Role) -> None:
    """torch's own cast of E5M2 overflows to infinity."""
    got = fp8.Scaled.of(torch.tensor([1e9, -1e9, 0.5]), torch.tensor(2.0), role)
    assert got.dequantised().tolist() == [LARGEST[role] / 2, -LARGEST[role] / 2, 0.5]


def test_delayed_scales_follow_the_largest_of_the_last_steps() -> None:
    """Each largest value is 448 over a power of two, so that scales and their reciprocals are exact, and any order of
    multiplying by them gives the same."""
    engine.start(Parallel(), 0)
    scaling = fp8.DelayedScaling(2)
    w = torch.full((4, 4), 1.75)

    def step(amax: float, taken: bool = True) -> float:
        fp8.linear(torch.full((1, 4), amax), w, scaling, "mlp")
        fp8.end_step([scaling], taken)
        return float(scaling.scale[0])

    assert float(scaling.scale[0]) == 1.0
    assert step(14.0) == 448 / 14
    assert step(3.5) == 448 / 14
    assert step(1.75, taken=False) == 448 / 14
    assert step(1.75) == 448 / 3.5
    assert scaling.history[:, 0].tolist() == [3.5, 1.75]
    assert float(scaling.scale[2]) == 1.0, "no gradient was seen"
    with torch.no_grad():
        assert step(1e6) == 448 / 1.75
    # Twice what the history knows saturates.
    assert fp8.linear(torch.full((1, 4), 3.5), w, scaling, "mlp").unique().tolist() == [4 * 1.75 * 1.75]


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_what_is_quantised_in_the_model(recipe: Fp8) -> None:
    """All GEMMs of five linears in each of two MLAs, two in each of two MLPs, two of the experts; nothing else is."""
    engine.start(Parallel(), 0)
    network = multimodal.build(small.with_fp8(recipe))
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    with fp8.counting() as counts:
        network(small.batch(tokens)).sum().backward()
    layers = small.BACKBONE.layers
    kinds = {"attention": 10, "mlp": 4, "experts": 2} if recipe != "none" else {}
    expected = {(kind, gemm): layers * count for kind, count in kinds.items() for gemm in ("forward", "dgrad", "wgrad")}
    assert counts == expected
    with fp8.counting() as counts, torch.no_grad():
        network(small.batch(tokens))
    assert counts == {key: count for key, count in expected.items() if key[1] == "forward"}
