"""The compiled operator of SVA (csrc/sva/sva.h) against its contract in float64: values, gradients, layouts."""

import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import threads
from ops.sva_core import Core
from torch import Tensor

import mmoe.ops.sva  # noqa: F401 - registers fake kernels and gradients
from mmoe.reference import sva as reference


def core(batch, side, heads, width, projected, absorbed, dtype=torch.float64, masked=False, seed=0) -> Core:
    """Random arguments for windows ``projected`` (m) and ``absorbed`` (m, C)."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.promote_types(torch.float32, dtype)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    def mask(m):
        if not masked:
            return torch.empty(0, dtype=torch.bool)
        return torch.rand(batch, m * side, m * side, generator=generator) > 0.6

    by_head = (heads, batch, side, side)
    return Core(
        draw(batch, side, side, heads, width),
        [draw(batch, m * side, m * side, heads * width) for m in projected],
        [draw(batch, m * side, m * side, heads * width) for m in projected],
        [draw(batch, m * side, m * side, channels) for m, channels in absorbed],
        [draw(m * m, channels) if m > 1 else draw(0) for m, channels in absorbed],
        [draw(*by_head, channels) * (width / channels) ** 0.5 for _, channels in absorbed],
        [draw(*by_head, dtype=sums) for _ in absorbed],
        [mask(m) for m in (*projected, *(m for m, _ in absorbed))],
    )


class Exact(NamedTuple):
    out: Tensor
    lse: Tensor
    pooled: list[Tensor]
    mass: list[Tensor]
    scores: Tensor
    attention: Tensor
    normed: list[Tensor]
    deviations: list[Tensor]


def exact_core(given: Core, eps: float) -> Exact:
    """The contract of csrc/sva/sva.h in plain PyTorch."""
    side, heads, width = given.q.shape[1], *given.q.shape[3:]
    keys, values = ([reference.windows(x, side).unflatten(-1, (heads, width)) for x in xs] for xs in given[1:3])
    scores = [torch.einsum("brchd,brckhd->brchk", given.q, k) for k in keys]
    normed, deviations = [], []
    for x, position, absorbed, constants in zip(*given[3:7], strict=True):
        x = reference.windows(x, side)
        x = x + position if position.numel() else x
        normed.append(F.layer_norm(x, x.shape[-1:], eps=eps))
        deviations.append(((x - x.mean(-1, keepdim=True)).square().mean(-1) + eps).sqrt())
        product = torch.einsum("hbrcx,brckx->brchk", absorbed, normed[-1])
        scores.append(product + constants.permute(1, 2, 3, 0).unsqueeze(-1))
    sizes = [part.shape[-1] for part in scores]
    valid = []
    for mask, size in zip(given.masks, sizes, strict=True):
        part = reference.windows(mask, side) if mask.numel() else torch.ones(*given.q.shape[:3], size).bool()
        valid.append(part | ~part.any(-1, keepdim=True))
    joint = (torch.cat(scores, -1) * width**-0.5).masked_fill(~torch.cat(valid, -1)[:, :, :, None], -math.inf)
    attention = joint.softmax(-1)
    parts = attention.split(sizes, -1)
    out = 0 * given.q
    for part, value in zip(parts, values, strict=False):
        out = out + torch.einsum("brchk,brckhd->brchd", part, value)
    of_absorbed = parts[len(keys) :]
    pooled = [torch.einsum("brchk,brckx->hbrcx", a, x) for a, x in zip(of_absorbed, normed, strict=True)]
    mass = [a.sum(-1).permute(3, 0, 1, 2) for a in of_absorbed]
    return Exact(out.flatten(3), joint.logsumexp(-1), pooled, mass, joint, attention, normed, deviations)


def largest(*tensors: Tensor) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)


def assert_near(got: Tensor, wanted: Tensor, units: float, cancelled: float = 0.0) -> None:
    """Within ``units`` roundings of the arithmetic, relative to the largest element or to what cancelled on the way.

    To it adds the rounding of the result to its own type, half a unit.
    """
    arithmetic = torch.finfo(torch.promote_types(torch.float32, got.dtype)).eps
    error = units * arithmetic * max(largest(wanted), cancelled) + torch.finfo(got.dtype).eps / 2 * largest(wanted)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=error)


def compare(given: Core, missing: bool = False) -> None:
    """All results and gradients of the kernel against float64 on the same values.

    A score is a sum of products, off by a few units in the last place of the largest |score|: that is the relative
    error of a probability, and every result is a sum of products with probabilities. A score's gradient is a·(da −
    Σ a·da), whose two terms may cancel: its error is relative to the largest |da|.
    """
    eps = 1e-5
    out, lse, pooled, mass = torch.ops.mmoe.sva(*given, eps)
    exact = given.exact()
    leaves = [leaf.requires_grad_() for leaf in exact.leaves()]
    wanted = exact_core(exact, eps)
    units = 8 * (1 + largest(wanted.scores[wanted.scores.isfinite()]))
    for got, want in zip(
        [out, lse, *pooled, *mass], [wanted.out, wanted.lse, *wanted.pooled, *wanted.mass], strict=True
    ):
        assert_near(got, want.detach(), units)

    results, exact_results = [out, *pooled, *mass], [wanted.out, *wanted.pooled, *wanted.mass]
    grads = [torch.randn_like(result) for result in results]
    if missing:  # all but that of one result
        kept = 0 if given.keys else 1
        grads = [grad if i == kept else torch.zeros_like(grad) for i, grad in enumerate(grads)]
    *wanted_grads, slope = torch.autograd.grad(
        exact_results,
        [*leaves, wanted.attention],
        [grad.double() for grad in grads],
        allow_unused=True,
        materialize_grads=True,
    )
    passed = [grad if grad.any() else grad[:0] for grad in grads]
    count = len(pooled)
    *got_grads, pooled_again, mass_again = torch.ops.mmoe.sva_backward(
        passed[0], passed[1 : 1 + count], passed[1 + count :], *given, lse, eps
    )
    heads, width = given.q.shape[3:]
    ds = largest(slope) * width**-0.5
    of_x = heads * ds * largest(*given.absorbed) + heads * largest(*grads[1 : 1 + count])  # a gradient of x^
    cancelled = [ds * largest(*given.keys)]
    cancelled += [ds * largest(given.q)] * len(given.keys) + [0.0] * len(given.keys)
    cancelled += [of_x * largest(1 / deviation) for deviation in wanted.deviations]
    cancelled += [ds * largest(x) for x in wanted.normed] + [ds] * count
    flat = [got_grads[0], *(grad for part in got_grads[1:] for grad in part)]
    for got, want, size in zip(flat, wanted_grads, cancelled, strict=True):
        assert_near(got, want, units, size)
    for got, want in zip([*pooled_again, *mass_again], exact_results[1:], strict=True):
        assert_near(got, want.detach(), units)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 2),
    side=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 3, 8, 16, 17]),
    width=st.sampled_from([1, 3, 7, 20, 32, 64, 80, 96, 128]),
    projected=st.lists(st.integers(1, 8), max_size=3),
    absorbed=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([5, 31, 64, 100, 130])), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    masked=st.booleans(),
    missing=st.booleans(),
)
def test_core_against_float64(batch, side, heads, width, projected, absorbed, dtype, masked, missing):
    if not projected and not absorbed:
        projected = [1]
    compare(core(batch, side, heads, width, projected, absorbed, dtype, masked), missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_core_at_the_sizes_of_cambrian(dtype, masked):
    compare(core(1, 2, 16, 64, [1, 1, 1], [(4, 1024)], dtype, masked))


def test_gradients_larger_than_the_caches():
    """They are written past them; the window of 64 keys makes 19 MB of 12 × 12 queries."""
    compare(core(1, 12, 8, 64, [8], [], torch.float32, masked=True))


def test_one_channel_normalises_to_nothing():
    given = core(1, 2, 2, 3, [1], [(2, 1)], torch.float32)
    out, lse, pooled, mass = torch.ops.mmoe.sva(*given, 1e-5)
    assert not pooled[0].any()
    grads = torch.ops.mmoe.sva_backward(out, pooled, mass, *given, lse, 1e-5)
    assert all(grad.isfinite().all() for grad in torch.utils._pytree.tree_leaves(grads))


def test_masks_of_unpadded_rectangles():
    """A landscape picture padded to a square: top and bottom rows of every grid are False, some windows entirely."""
    given = core(2, 4, 3, 20, [1, 2], [(3, 31)], torch.float32)
    rectangles = []
    for m in (1, 2, 3):
        mask = torch.ones(2, 4 * m, 4 * m, dtype=torch.bool)
        mask[0, : 4 * m // 3] = mask[0, -(4 * m // 3) :] = False
        mask[1, :, : 4 * m // 5] = False
        rectangles.append(mask)
    compare(given._replace(masks=rectangles))


def test_slices_are_read_in_place():
    """Rows of larger grids, every argument a view, against contiguous copies of them: bit for bit."""
    whole = core(2, 3, 2, 20, [2], [(2, 31)], torch.float32)
    rows = Core(
        whole.q[:, 1:],
        *([part[:, 2:] for part in parts] for parts in whole[1:4]),
        whole.positions,
        *([part[:, :, 1:] for part in parts] for parts in whole[5:7]),
        whole.masks,
    )
    one, other = torch.ops.mmoe.sva(*rows, 1e-5), torch.ops.mmoe.sva(*rows.map(Tensor.contiguous), 1e-5)
    flat = [torch.utils._pytree.tree_leaves(result) for result in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    turned = rows.map(lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1))
    again = torch.utils._pytree.tree_leaves(torch.ops.mmoe.sva(*turned, 1e-5))
    assert all(torch.equal(a, b) for a, b in zip(flat[0], again, strict=True))


def test_off_the_vector_grid():
    given = core(1, 2, 2, 20, [2], [(2, 31)], torch.float32)
    compare(given.map(lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)))


def test_any_number_of_threads_gives_the_same_bits():
    given = core(2, 5, 4, 32, [1, 2], [(3, 64)], torch.float32)

    def run():
        out, lse, pooled, mass = torch.ops.mmoe.sva(*given, 1e-5)
        grads = torch.ops.mmoe.sva_backward(out, pooled, mass, *given, lse, 1e-5)
        return torch.utils._pytree.tree_leaves((out, lse, pooled, mass, grads))

    threads.check_bits(run)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, root):
    """Whatever this machine has beyond it is lowered to ``isa``; the comparisons with float64 hold on each."""
    script = """
import sys
from typing import NamedTuple
sys.path.insert(0, "tests")
import torch
from ops import test_sva_core as test
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for width, channels in ((64, 128), (7, 31)):
        test.compare(test.core(1, 2, 5, width, [1, 2], [(3, channels)], dtype, masked=True))
"""
    environment = os.environ | {"MMOE_SIMD": isa}
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(1, 2, 2, 8)}, "q must be"),
        ({"keys": []}, "values must be as many"),
        ({"keys": [torch.zeros(1, 2, 2, 7)]}, r"keys\[0\] must be"),
        ({"values": [torch.zeros(1, 2, 2, 8).double()]}, r"values\[0\]"),
        ({"features": [torch.zeros(1, 18, 18, 5)]}, r"features\[0\] must be"),
        ({"positions": [torch.zeros(3, 5)]}, r"positions\[0\] must be"),
        ({"absorbed": [torch.zeros(1, 2, 2, 2, 5)]}, r"absorbed\[0\] must be"),
        ({"constants": []}, "constants must be as many"),
        ({"masks": [torch.zeros(0)]}, "masks must be one per encoder"),
        ({"masks": [torch.zeros(0), torch.zeros(1, 4, 4)]}, r"masks\[1\]"),
    ],
)
def test_the_compiled_operator_names_the_argument(change, named):
    with pytest.raises(RuntimeError, match=f"sva: {named}"):
        torch.ops.mmoe.sva(*core(1, 2, 2, 4, [1], [(2, 5)], torch.float32)._replace(**change), 1e-5)


def test_opcheck():
    given = core(1, 2, 2, 4, [1], [(2, 5)], torch.float32, masked=True)
    for leaf in given.leaves():
        leaf.requires_grad_()
    results = torch.library.opcheck(torch.ops.mmoe.sva.default, (*given, 1e-5))
    assert set(results.values()) == {"SUCCESS"}
