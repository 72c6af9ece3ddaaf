"""SVA: the reference against a loop and against the released order of work, the operator against both."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.ops import sva_absorbed as chunked
from mmoe.ops.sva import Absorbed, Projected, sva
from mmoe.reference import sva as reference

B, L, H, D, C = 2, 3, 2, 4, 5
SIDES = [L, 2 * L]  # m = 1 and m = 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def project(source: Absorbed) -> Projected:
    """Position, two LayerNorms, two projections."""
    x, side = source.features, source.features.shape[1]
    if source.position is not None:
        m = side // L
        x = x + source.position.view(m, m, C).repeat(L, L, 1)
    keys = F.layer_norm(x, (C,), source.key_norm_weight, source.key_norm_bias, source.eps) @ source.key_weight.T
    values = F.layer_norm(x, (C,), source.value_norm_weight, source.value_norm_bias, source.eps) @ source.value_weight.T
    return Projected(keys, values)


def sources(batch: int = B, dtype: torch.dtype = torch.float64) -> list[Absorbed]:
    made = []
    for i, side in enumerate(SIDES):
        s = 10 * i
        tensors = (
            randn(batch, side, side, C, seed=s),
            randn((side // L) ** 2, C, seed=s + 1) if side > L else None,
            1 + 0.1 * randn(C, seed=s + 2),
            randn(C, seed=s + 3),
            randn(H * D, C, seed=s + 4),
            1 + 0.1 * randn(C, seed=s + 5),
            randn(C, seed=s + 6),
            randn(H * D, C, seed=s + 7),
        )
        made.append(Absorbed(*(None if tensor is None else tensor.to(dtype) for tensor in tensors)))
    return made


def projected(batch: int = B) -> list[Projected]:
    return [project(source) for source in sources(batch)]


def masks(batch: int = B) -> list[Tensor | None]:
    """Encoder 0 unmasked; encoder 1 with one partly valid window and, in image 1, one without any valid key."""
    mask = torch.ones(B, 2 * L, 2 * L, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = False
    mask[1, 4:, 4:] = False
    return [None, mask[:batch]]


def tensors_of(given: list) -> list[Tensor]:
    return [part for source in given for part in source if isinstance(part, Tensor)]


def loop(q: Tensor, given: list[Projected], masks: list[Tensor | None] | None = None) -> Tensor:
    """The definition, one query at a time."""
    out = torch.zeros(q.shape[0], L, L, H * D, dtype=q.dtype)
    for b in range(q.shape[0]):
        for r in range(L):
            for c in range(L):
                ks, vs = [], []
                for i, (key, value) in enumerate(given):
                    m = key.shape[1] // L
                    places = [(r * m + y, c * m + x) for y in range(m) for x in range(m)]
                    mask = masks[i] if masks is not None else None
                    kept = places if mask is None else [place for place in places if mask[b][place]]
                    for place in kept or places:
                        ks.append(key[b][place].view(H, D))
                        vs.append(value[b][place].view(H, D))
                for h in range(H):
                    scores = torch.stack([q[b, r, c, h] @ k[h] for k in ks]) / math.sqrt(D)
                    mixed = sum(p * v[h] for p, v in zip(scores.softmax(0), vs, strict=True))
                    out[b, r, c, h * D : (h + 1) * D] = mixed
    return out


def released(q: Tensor, given: list[Absorbed], masks: list[Tensor | None] | None = None) -> Tensor:
    """The order of work of cambrian/model: windows become the batch, then one attention of one query over all keys."""
    batch = q.shape[0]
    keys, values, keep = [], [], []
    for i, source in enumerate(given):
        side = source.features.shape[1]
        m = side // L

        def rearranged(x, m=m):
            x = x.view(batch, L, m, L, m, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
            return x.flatten(0, 2).flatten(1, 2)

        x = rearranged(source.features)
        if source.position is not None:
            x = x + source.position[None]
        key = F.layer_norm(x, (C,), source.key_norm_weight, source.key_norm_bias, source.eps)
        value = F.layer_norm(x, (C,), source.value_norm_weight, source.value_norm_bias, source.eps)
        keys.append(F.linear(key, source.key_weight))
        values.append(F.linear(value, source.value_weight))
        mask = masks[i] if masks is not None else None
        valid = torch.ones(batch * L * L, m * m, dtype=torch.bool) if mask is None else rearranged(mask).flatten(1)
        valid[~valid.any(1)] = True
        keep.append(valid)

    def by_head(x):
        return x.view(x.shape[0], -1, H, D).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        by_head(q.reshape(batch * L * L, 1, H * D)),
        by_head(torch.cat(keys, 1)),
        by_head(torch.cat(values, 1)),
        attn_mask=torch.cat(keep, 1)[:, None, None],
    )
    return out.transpose(1, 2).reshape(batch, L, L, H * D)


FUNCTIONS = pytest.mark.parametrize("function", [sva, reference.sva], ids=["operator", "reference"])
MIXTURES = {"projected": [True, True], "absorbed": [False, False], "mixed": [True, False], "turned": [False, True]}


def mixture(name: str, batch: int = B) -> list[Projected | Absorbed]:
    pairs = zip(MIXTURES[name], sources(batch), strict=True)
    return [project(source) if is_projected else source for is_projected, source in pairs]


@pytest.mark.parametrize("masked", [False, True])
@FUNCTIONS
def test_against_a_loop(function, masked):
    q, given, chosen = randn(B, L, L, H, D), projected(), masks() if masked else None
    assert (function(q, given, chosen) - loop(q, given, chosen)).abs().max() < 1e-14


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixed", MIXTURES)
@FUNCTIONS
def test_against_the_released_order_of_work(function, mixed, masked):
    q, chosen = randn(B, L, L, H, D), masks() if masked else None
    assert (function(q, mixture(mixed), chosen) - released(q, sources(), chosen)).abs().max() < 1e-13


@FUNCTIONS
def test_masks_change_their_windows_alone(function):
    q, given = randn(B, L, L, H, D), projected()
    differs = (function(q, given, masks()) != function(q, given)).any(-1)
    assert differs.nonzero().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixed", MIXTURES)
@FUNCTIONS
def test_gradcheck(function, mixed, masked):
    q, chosen = randn(1, L, L, H, D), masks(1) if masked else None
    given = mixture(mixed, batch=1)

    def run(q, *flat):
        rest = iter(flat)
        rebuilt = [
            type(source)(*(next(rest) if isinstance(part, Tensor) else part for part in source)) for source in given
        ]
        return function(q, rebuilt, chosen)

    inputs = [part.detach().requires_grad_() for part in (q, *tensors_of(given))]
    # Fast mode projects the Jacobian on random vectors; test_core_against_float64 sees every element.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("numbers", [1, 130, 200, 400])
def test_chunks_of_any_size(numbers, monkeypatch):
    """Single rows of queries, some rows, whole images: the same numbers up to the order of sums."""
    results = []
    for size in (numbers, 2 << 20):
        monkeypatch.setitem(chunked.CHUNK_NUMBERS, "cpu", size)
        q, given = randn(B, L, L, H, D).requires_grad_(), mixture("mixed")
        leaves = [q, *(part.detach().requires_grad_() for part in given[1] if isinstance(part, Tensor))]
        out = sva(q, [given[0], Absorbed(*leaves[1:])], masks())
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@FUNCTIONS
@pytest.mark.parametrize("mixed", MIXTURES)
def test_no_images(function, mixed):
    q, given = randn(0, L, L, H, D).requires_grad_(), mixture(mixed, batch=0)
    out = function(q, given)
    assert out.shape == (0, L, L, H * D)
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mixed", MIXTURES)
@FUNCTIONS
def test_what_is_not_finite_stays_in_its_query(function, mixed, bad):
    given = [type(source)(*(p.clone() if isinstance(p, Tensor) else p for p in source)) for source in mixture(mixed)]
    given[1][0][0, 3, 4] = bad  # of the window of query (1, 2) of image 0
    leaf = given[1][0].requires_grad_()
    # The query's elements have both signs: with infinite keys its scores are NaN.
    out = function(randn(B, L, L, H, D), given)
    strange = (~out.isfinite()).any(-1)
    assert strange.nonzero().tolist() == [[0, 1, 2]]
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    outside = torch.ones(B, 2 * L, 2 * L, dtype=torch.bool)
    outside[0, 2:4, 4:6] = False
    assert grad[outside].isfinite().all()


@pytest.mark.parametrize("mixed", ["projected", "turned"])
@FUNCTIONS
def test_a_key_with_a_score_of_minus_infinity_counts_for_nothing(function, mixed):
    q, given = randn(B, L, L, H, D).abs(), mixture(mixed)
    mask = torch.ones(B, 2 * L, 2 * L, dtype=torch.bool)
    mask[0, 3, 4] = False
    keys = given[1].keys.masked_fill(~mask[..., None], float("-inf"))
    out = function(q, [given[0], given[1]._replace(keys=keys)])
    torch.testing.assert_close(out, function(q, given, [None, mask]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mixed", MIXTURES)
@FUNCTIONS
def test_padding_may_hold_anything(function, mixed):
    q = randn(B, L, L, H, D).requires_grad_()
    clean, dirty = mixture(mixed), mixture(mixed)
    dirty = [type(source)(*(p.clone() if isinstance(p, Tensor) else p for p in source)) for source in dirty]
    dirty[1][0][0, 0, 0] = float("nan")
    results = []
    for sample in (clean, dirty):
        leaf = sample[1][0].detach().requires_grad_()
        out = function(q, [sample[0], sample[1]._replace(**{sample[1]._fields[0]: leaf})], masks())
        results.append((out.detach(), *torch.autograd.grad(out.sum(), [q, leaf])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][2][0, 0, 0].any()


def test_opcheck():
    absorbed = [part.float().requires_grad_() for part in tensors_of(sources()[1:])]
    keys, values = (part.float().requires_grad_() for part in projected()[0])
    arguments = (randn(B, L, L, H, D).float().requires_grad_(), [keys], [values], absorbed, [torch.empty(0).bool()] * 2)
    results = torch.library.opcheck(torch.ops.mmoe.sva_absorbed.default, (*arguments, 1e-5))
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_whole():
    q, given = randn(B, L, L, H, D), mixture("mixed")
    compiled = torch.compile(lambda q: sva(q, given, masks()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), sva(q, given, masks()))


def test_autocast_and_bfloat16_keep_the_type_of_q():
    q, given = randn(B, L, L, H, D), mixture("mixed")
    wanted = sva(q, given)
    small = Projected(*(part.bfloat16() for part in given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = sva(q.bfloat16(), [small, sources(dtype=torch.float32)[1]])
    assert out.dtype == torch.bfloat16
    # Scores of about 4 with an error of 2^-8 each move a probability by a few percent at most.
    assert (out - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(1, 3, 3, 8)}, "q"),
        ({"q": torch.zeros(1, 3, 2, 2, 4)}, "q"),
        ({"q": torch.zeros(1, 3, 3, 2, 4, dtype=torch.int64)}, "q"),
        ({"sources": []}, "sources"),
        ({"sources": [Projected(torch.zeros(1, 3, 3, 8), torch.zeros(1, 3, 3, 8))] * 17}, "sources"),
        ({"sources": [Projected(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8))]}, r"sources\[0\]\.keys"),
        ({"sources": [Projected(torch.zeros(1, 27, 27, 8), torch.zeros(1, 27, 27, 8))]}, r"sources\[0\]\.keys"),
        ({"sources": [Projected(torch.zeros(1, 6, 6, 7), torch.zeros(1, 6, 6, 7))]}, r"sources\[0\]\.keys"),
        ({"sources": [Projected(torch.zeros(1, 6, 6, 8).double(), torch.zeros(1, 6, 6, 8))]}, r"sources\[0\]\.keys"),
        ({"sources": [Projected(torch.zeros(1, 6, 6, 8), torch.zeros(1, 3, 3, 8))]}, r"sources\[0\]\.values"),
        ({"masks": []}, "masks"),
        ({"masks": [torch.ones(1, 3, 3, dtype=torch.bool)]}, r"masks\[0\]"),
        ({"masks": [torch.ones(1, 6, 6)]}, r"masks\[0\]"),
    ],
)
def test_errors_name_the_argument(change, named):
    grid = torch.zeros(1, 6, 6, 8)
    arguments = {"q": torch.zeros(1, 3, 3, 2, 4), "sources": [Projected(grid, grid)]} | change
    with pytest.raises((ValueError, TypeError), match=named):
        sva(**arguments)


@pytest.mark.parametrize("field", ["position", "key_norm_weight", "value_norm_bias", "key_weight", "value_weight"])
def test_absorbed_errors_name_the_field(field):
    source = sources()[1]._replace(**{field: torch.zeros(3, 3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=rf"sources\[0\]\.{field}"):
        sva(randn(B, L, L, H, D), [source])


def test_one_eps():
    first, second = sources()
    with pytest.raises(ValueError, match="eps"):
        sva(randn(B, L, L, H, D), [first, second._replace(eps=1e-6)])
