"""sva: the CUDA kernels on the emulator against the contract of csrc/sva/sva.h in float64, through autograd.

The emulator is slow (docs/operators/emulator.md), so the grids are a few queries each.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.sva_core import Core
from sva_arguments import Case, draw, windows
from sva_bounds import bounds
from torch import Tensor

from mmoe.reference import sva as reference

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(arguments: Core, kept: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """out, pooled, mass and lse by the contract, in the dtype of the arguments but for x̂, which is rounded to kept."""
    q, keys, values, features, positions, absorbed, constants, masks = arguments
    _, rows, columns, heads, width = q.shape
    scores, mixed = [], []
    for key, value in zip(keys, values, strict=True):
        k = windows(key, rows, columns).unflatten(-1, (heads, width))
        scores.append(torch.einsum("brchd,brckhd->brchk", q, k))
        mixed.append(windows(value, rows, columns).unflatten(-1, (heads, width)))
    for feature, position, query, constant in zip(features, positions, absorbed, constants, strict=True):
        x = windows(feature, rows, columns)
        x = x + position if position.numel() else x
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
        if kept != torch.float32:
            normed = normed + (normed.to(kept).double() - normed).detach()
        mixed.append(normed)
        scores.append(torch.einsum("hbrce,brcke->brchk", query, normed) + constant.permute(1, 2, 3, 0)[..., None])
    for i, mask in enumerate(masks):
        if mask.numel():
            valid = windows(mask, rows, columns)
            valid = valid | ~valid.any(-1, keepdim=True)
            scores[i] = scores[i].masked_fill(~valid[:, :, :, None], float("-inf"))
    lse = torch.cat(scores, -1).div(width**0.5).logsumexp(-1)
    weights = [(score / width**0.5 - lse[..., None]).exp() for score in scores]
    out = torch.zeros_like(q)
    for weight, value in zip(weights, mixed[: len(keys)], strict=False):
        out = out + torch.einsum("brchk,brckhd->brchd", weight, value)
    rest = list(zip(weights[len(keys) :], mixed[len(keys) :], strict=True))
    pooled = [torch.einsum("brchk,brcke->hbrce", weight, normed) for weight, normed in rest]
    mass = [weight.sum(-1).permute(3, 0, 1, 2) for weight, _ in rest]
    return out.flatten(-2), pooled, mass, lse


def leaves(arguments: Core) -> Core:
    """In float64 and taking gradient."""
    return Core(
        arguments.q.double().requires_grad_(),
        *([tensor.double().requires_grad_() for tensor in group] for group in arguments[1:7]),
        arguments.masks,
    )


def check(name: str, got: Tensor, wanted: Tensor, off: Tensor) -> None:
    """``got`` is ``wanted`` up to an error of ``off``, an element each, and one rounding to its type."""
    wanted = wanted.detach()
    assert got.shape == wanted.shape == off.shape, name
    dtype = torch.finfo(got.dtype)
    excess = (got.double() - wanted).abs() - off - (wanted.abs() + off) * dtype.eps / 2 - dtype.tiny
    where = [index.tolist() for index in torch.where(excess > 0)]
    assert not (excess > 0).any(), f"{name}: beyond rounding, by up to {excess.max():.2e}, at {where}"


def gradients_of_outputs(case_outputs: tuple[Tensor, list[Tensor], list[Tensor]]) -> tuple:
    generator = torch.Generator().manual_seed(1)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    out, pooled, mass = case_outputs
    return like(out), [like(tensor) for tensor in pooled], [like(tensor) for tensor in mass]


def compare(emulated: Any, arguments: Core) -> None:
    """Forward and backward against float64."""
    out, lse, pooled, mass = emulated.sva(*arguments, EPS)
    # x̂ has a place, in the dtype of the features, where the kernels take them as vectors.
    vectors = all(feature.shape[-1] * feature.element_size() % 16 == 0 for feature in arguments.features)
    kept = arguments.q.dtype if vectors else torch.float32
    exactly = leaves(arguments)
    wanted_out, wanted_pooled, wanted_mass, wanted_lse = exact(exactly, kept)
    given = gradients_of_outputs((out, pooled, mass))
    grad_out, grad_pooled, grad_mass = given
    off = bounds(arguments, *given, EPS, kept)
    check("out", out, wanted_out, off.out)
    check("lse", lse, wanted_lse, off.lse)

    outputs = [wanted_out, *wanted_pooled, *wanted_mass]
    weights = [tensor.double() for tensor in (grad_out, *grad_pooled, *grad_mass)]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    wanted = torch.autograd.grad(loss, exactly.leaves(), materialize_grads=True)
    grad_q, *groups, again_pooled, again_mass = emulated.sva_backward(*given, *arguments, lse, EPS)
    names = ["q"] + [
        f"{name}[{i}]"
        for name, group in zip(("keys", "values", "features", "absorbed", "constants"), groups, strict=True)
        for i in range(len(group))
    ]
    gradients = [grad_q, *itertools.chain.from_iterable(groups)]
    for name, got, want, bound in zip(names, gradients, wanted, off.gradients, strict=True):
        if name.startswith(("keys", "values", "features")):
            got, want = (windows(grid, *arguments.q.shape[1:3]) for grid in (got, want))
        check(f"gradient of {name}", got, want, bound)
    for j in range(len(pooled)):
        check(f"pooled[{j}]", pooled[j], wanted_pooled[j], off.pooled[j])
        check(f"mass[{j}]", mass[j], wanted_mass[j], off.mass[j])
        check(f"pooled[{j}] of the backward", again_pooled[j], wanted_pooled[j], off.pooled[j])
        check(f"mass[{j}] of the backward", again_mass[j], wanted_mass[j], off.mass[j])


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
    Case(1, 1, 2, 2, 32, (), ((2, 64),)),
    Case(2, 1, 2, 3, 32, (), ((3, 40), (1, 264)), masked=True),
    Case(1, 1, 2, 4, 64, (1, 1, 1), ((4, 256),)),
    Case(1, 2, 1, 2, 64, (2, 1), ((2, 72), (4, 24)), masked=True),
    Case(1, 1, 1, 1, 32, (1,), ((8, 32),), masked=True),
    Case(1, 1, 2, 1, 32, (), ((2, 1064),)),  # more channels than a warp holds in registers
    Case(1, 1, 1, 5, 24, (3,), ((5, 33), (6, 7), (7, 5)), masked=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(emulated, dtype, case):
    compare(emulated, draw(case, dtype))


def test_what_does_not_fit_into_shared_memory(emulated):
    """x̂ of 64 keys of 904 channels in float32 is 231 KB: it is made again wherever it is needed."""
    compare(emulated, draw(Case(1, 1, 1, 1, 32, (), ((8, 904),)), torch.float32))


def test_what_fits_into_shared_memory_in_part(emulated):
    """x̂ does, but absorbed and grad_pooled of 64 heads, 240 KB, are read a second time."""
    compare(emulated, draw(Case(1, 1, 1, 64, 4, (), ((2, 480),)), torch.float32))


def test_the_contract_is_the_reference():
    """The float64 function above, between the projections that are folded away, is the released arithmetic."""
    heads, width, channels = 2, 8, 12
    drawn = draw(Case(2, 3, 3, heads, width, (1, 2), ((2, channels),), masked=True), torch.float64)
    generator = torch.Generator().manual_seed(2)
    norms = [torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(4)]
    weights = [torch.randn(heads * width, channels, generator=generator, dtype=torch.float64) for _ in range(2)]
    absorbed = reference.Absorbed(
        drawn.features[0], drawn.positions[0], norms[0], norms[1], weights[0], norms[2], norms[3], weights[1], EPS
    )
    projected = [reference.Projected(key, value) for key, value in zip(drawn.keys, drawn.values, strict=True)]
    wanted = reference.sva(drawn.q, [*projected, absorbed], drawn.masks)

    of_keys, of_values = (weight.unflatten(0, (heads, width)) for weight in weights)
    folded = drawn._replace(
        absorbed=[torch.einsum("brchd,hde->hbrce", drawn.q, of_keys * norms[0])],
        constants=[torch.einsum("brchd,hd->hbrc", drawn.q, of_keys @ norms[1])],
    )
    out, (pooled,), (mass,), _ = exact(folded, torch.float32)
    summed = pooled * norms[2] + mass[..., None] * norms[3]
    got = out + torch.einsum("hbrce,hde->brchd", summed, of_values).flatten(3)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


BOTH = Case(2, 2, 2, 2, 64, (1, 2), ((2, 64),), masked=True)


def run(emulated: Any, arguments: Core) -> list[Tensor]:
    """Every result of forward and backward."""
    out, lse, pooled, mass = emulated.sva(*arguments, EPS)
    grad_q, *groups = emulated.sva_backward(*gradients_of_outputs((out, pooled, mass)), *arguments, lse, EPS)
    return [out, lse, *pooled, *mass, grad_q, *itertools.chain.from_iterable(groups)]


def regroup(arguments: Core, change: Callable[[Tensor], Tensor]) -> Core:
    """With the grids that are read in place changed."""
    grids = ([change(grid) for grid in group] for group in (arguments.keys, arguments.values, arguments.features))
    keys, values, features = grids
    masks = [change(mask) for mask in arguments.masks]
    return arguments._replace(keys=keys, values=values, features=features, masks=masks)


def test_images_apart(emulated):
    """Grids whose images lie apart, as a slice of the rows of larger ones does, are read where they are."""
    arguments = draw(BOTH, torch.float32)

    def apart(grid: Tensor) -> Tensor:
        larger = torch.cat([torch.full_like(grid[:, :1], True), grid, torch.full_like(grid[:, :1], True)], 1)
        return larger[:, 1:-1]

    for got, wanted in zip(run(emulated, regroup(arguments, apart)), run(emulated, arguments), strict=True):
        assert torch.equal(got, wanted)


def test_off_the_vector_grid(emulated):
    """Views that start 4 bytes off take the scalar paths."""

    def shifted(grid: Tensor) -> Tensor:
        return torch.cat([grid.new_zeros(1), grid.flatten()])[1:].view(grid.shape)

    compare(emulated, regroup(draw(BOTH, torch.float32), shifted))


def test_no_images(emulated):
    arguments = draw(BOTH._replace(batch=1), torch.float32)
    empty = Core(
        arguments.q[:0],
        *([grid[:0] for grid in group] for group in (arguments.keys, arguments.values, arguments.features)),
        arguments.positions,
        *([tensor[:, :0] for tensor in group] for group in (arguments.absorbed, arguments.constants)),
        [mask[:0] for mask in arguments.masks],
    )
    assert [tuple(tensor.shape) for tensor in run(emulated, empty)[:4]] == [
        (0, 2, 2, 128),
        (0, 2, 2, 2),
        (2, 0, 2, 2, 64),
        (2, 0, 2, 2),
    ]


def test_gradients_that_are_missing(emulated):
    """Tensors without elements stand for zeros."""
    arguments = draw(BOTH, torch.float32)
    out, lse, pooled, mass = emulated.sva(*arguments, EPS)
    none = torch.empty(0)
    missing = emulated.sva_backward(none, [none], [none], *arguments, lse, EPS)
    zeros = [torch.zeros_like(out), [torch.zeros_like(pooled[0])], [torch.zeros_like(mass[0])]]
    given = emulated.sva_backward(*zeros, *arguments, lse, EPS)
    torch.testing.assert_close(missing, given, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["q", "keys", "values", "features", "absorbed"])
def test_nan_stays_in_its_window(emulated, which):
    arguments = draw(BOTH, torch.float32)._replace(masks=[torch.empty(0, dtype=torch.bool)] * 3)
    target = getattr(arguments, which)
    target = target if which == "q" else target[-1]
    if which == "absorbed":
        target[0, 1, 1, 1, 3] = float("nan")
    else:
        target[1, -1, -1].flatten()[3] = float("nan")
    out, lse, (pooled,), (mass,) = emulated.sva(*arguments, EPS)
    query = torch.zeros(2, 2, 2, dtype=torch.bool)
    query[1, 1, 1] = True
    if which == "values":
        assert lse.isfinite().all()
        assert torch.equal(out.isnan().any(-1), query)
    else:
        assert torch.equal(lse.isnan().any(-1), query)
        assert torch.equal(mass.isnan().any(0), query)
        assert torch.equal(pooled.isnan().any(-1).any(0), query)
    gradients = run(emulated, arguments)[4:]
    assert torch.equal(gradients[0].isnan().flatten(3).any(-1), query)
    for gradient, m in zip(gradients[1:6], (1, 2, 1, 2, 2), strict=True):
        assert not windows(gradient, 2, 2)[~query].isnan().any(), m


def test_what_is_masked_is_not_read(emulated):
    """NaN under a mask that leaves a window some keys changes nothing, and its gradient is 0."""
    arguments = draw(BOTH, torch.float32)
    for mask in arguments.masks:
        mask[:, ::2, ::2] = True  # no window without a key
    masks = arguments.masks
    wanted = run(emulated, arguments)
    for grids, part in ((arguments.keys, masks), (arguments.values, masks), (arguments.features, masks[2:])):
        for grid, mask in zip(grids, part, strict=False):
            if grid.shape[1] > 2:
                grid[~mask] = float("nan")
    for got, want in zip(run(emulated, arguments), wanted, strict=True):
        assert torch.equal(got, want)


def test_errors_name_the_argument(emulated):
    arguments = draw(Case(1, 1, 1, 1, 160, (1,)), torch.float32)
    with pytest.raises(RuntimeError, match="sva: q must have heads of at most 128 on CUDA"):
        emulated.sva(*arguments, EPS)
