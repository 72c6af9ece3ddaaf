"""SVA against a loop over queries, its absorbed form against the plain one, gradients, masks, edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmoe.ops.sva import Absorbed, Projected, sva, sva_absorbed

B, L, H, D, C = 2, 3, 2, 4, 5
SIDES = [L, 2 * L]  # m = 1 and m = 2


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(batch: int = B) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    q = randn(batch, L, L, H, D)
    return (
        q,
        [randn(batch, s, s, H * D, seed=s) for s in SIDES],
        [randn(batch, s, s, H * D, seed=2 * s + 1) for s in SIDES],
    )


def masks() -> list[torch.Tensor | None]:
    """Encoder 0 unmasked; encoder 1 with one partly valid window and one without any valid key."""
    mask = torch.ones(B, 2 * L, 2 * L, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = False
    mask[1, 4:, 4:] = False
    return [None, mask]


def loop(q, keys, values, masks=None):
    """The definition, one query at a time."""
    out = torch.zeros(q.shape[0], L, L, H * D, dtype=q.dtype)
    for b in range(q.shape[0]):
        for r in range(L):
            for c in range(L):
                ks, vs = [], []
                for i, (key, value) in enumerate(zip(keys, values, strict=True)):
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


@pytest.mark.parametrize("masked", [False, True])
def test_against_a_loop(masked):
    q, keys, values = inputs()
    chosen = masks() if masked else None
    assert (sva(q, keys, values, chosen) - loop(q, keys, values, chosen)).abs().max() < 1e-14


def test_masks_change_their_windows_alone():
    q, keys, values = inputs()
    differs = (sva(q, keys, values, masks()) != sva(q, keys, values)).any(-1)
    assert differs.nonzero().tolist() == [[0, 0, 0]]


def sources(seed: int = 0) -> list[Absorbed]:
    made = []
    for i, side in enumerate(SIDES):
        s = 100 * seed + 10 * i
        made.append(
            Absorbed(
                features=randn(B, side, side, C, seed=s),
                position=randn((side // L) ** 2, C, seed=s + 1) if side > L else None,
                key_norm_weight=1 + 0.1 * randn(C, seed=s + 2),
                key_norm_bias=randn(C, seed=s + 3),
                key_weight=randn(H * D, C, seed=s + 4),
                value_norm_weight=1 + 0.1 * randn(C, seed=s + 5),
                value_norm_bias=randn(C, seed=s + 6),
                value_weight=randn(H * D, C, seed=s + 7),
            )
        )
    return made


def project(source: Absorbed) -> Projected:
    """The released order of work: position, two LayerNorms, two projections."""
    x, side = source.features, source.features.shape[1]
    if source.position is not None:
        m = side // L
        x = x + source.position.view(m, m, C).repeat(L, L, 1)
    keys = F.layer_norm(x, (C,), source.key_norm_weight, source.key_norm_bias, source.eps) @ source.key_weight.T
    values = F.layer_norm(x, (C,), source.value_norm_weight, source.value_norm_bias, source.eps) @ source.value_weight.T
    return Projected(keys, values)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_absorbed_is_exact(masked, mixed):
    q, chosen, given = randn(B, L, L, H, D), masks() if masked else None, sources()
    projected = [project(source) for source in given]
    plain = sva(q, [p.keys for p in projected], [p.values for p in projected], chosen)
    absorbed = sva_absorbed(q, [projected[0], given[1]] if mixed else given, chosen)
    assert (plain - absorbed).abs().max() < 1e-12


def test_gradient():
    q, keys, values = inputs(batch=1)
    tensors = [part.requires_grad_() for part in (q, *keys, *values)]
    chosen = [None, masks()[1][:1]]
    assert torch.autograd.gradcheck(lambda q, a, b, c, d: sva(q, [a, b], [c, d], chosen), tensors)


def test_gradient_absorbed():
    q, given = randn(B, L, L, H, D)[:1], sources()
    first = Projected(*(part[:1].detach() for part in project(given[0])))
    tensors = [given[1].features[:1], *given[1][1:8]]

    def run(q, keys, values, *absorbed):
        return sva_absorbed(q, [Projected(keys, values), Absorbed(*absorbed)])

    assert torch.autograd.gradcheck(run, [part.requires_grad_() for part in (q, *first, *tensors)])


def test_no_images():
    q, keys, values = inputs(batch=0)
    assert sva(q, keys, values).shape == (0, L, L, H * D)
    assert sva_absorbed(q, [Projected(k, v) for k, v in zip(keys, values, strict=True)]).shape == (0, L, L, H * D)


def test_bfloat16_keeps_its_type():
    q, keys, values = inputs()
    wanted = sva(q, keys, values)
    out = sva(q.bfloat16(), [k.bfloat16() for k in keys], [v.bfloat16() for v in values])
    assert out.dtype == torch.bfloat16
    # Scores of about 4 with an error of 2^-8 each move a probability by a few percent at most.
    assert (out - wanted).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(1, 3, 3, 8)}, "q"),
        ({"q": torch.zeros(1, 3, 2, 2, 4)}, "q"),
        ({"keys": []}, "keys"),
        ({"keys": [torch.zeros(1, 4, 4, 8)]}, r"keys\[0\]"),
        ({"keys": [torch.zeros(1, 6, 6, 7)]}, r"keys\[0\]"),
        ({"keys": [torch.zeros(1, 6, 6, 8, dtype=torch.float64)]}, r"keys\[0\]"),
        ({"values": []}, "values"),
        ({"values": [torch.zeros(1, 3, 3, 8)]}, r"values\[0\]"),
        ({"masks": []}, "masks"),
        ({"masks": [torch.ones(1, 3, 3, dtype=torch.bool)]}, r"masks\[0\]"),
        ({"masks": [torch.ones(1, 6, 6)]}, r"masks\[0\]"),
    ],
)
def test_errors_name_the_argument(change, named):
    grid = torch.zeros(1, 6, 6, 8)
    arguments = {"q": torch.zeros(1, 3, 3, 2, 4), "keys": [grid], "values": [grid]} | change
    with pytest.raises((ValueError, TypeError), match=named):
        sva(**arguments)


@pytest.mark.parametrize("field", ["position", "key_norm_weight", "value_norm_bias", "key_weight", "value_weight"])
def test_absorbed_errors_name_the_field(field):
    source = sources()[1]._replace(**{field: torch.zeros(3, 3, dtype=torch.float64)})
    with pytest.raises(ValueError, match=rf"sources\[0\]\.{field}"):
        sva_absorbed(randn(B, L, L, H, D), [source])
