"""The router against a loop written from the paper, its gradients, and its edge cases."""

import math

import pytest
import torch

from mmoe.ops.router import router


def draw(
    tokens: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, slots, generator=generator, dtype=dtype),
        0.1 * torch.randn(slots, generator=generator, dtype=dtype),
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("identity", ["scaled", "unscaled", "copy", "drop"])
def test_against_a_loop(score, renormalize, identity):
    tokens, experts, zeros, top_k, scaling, groups = 7, 6, 3, 4, 2.5, 3
    logits, bias = draw(tokens, experts + zeros)
    valid = torch.tensor([True, True, False, True, False, True, True])
    out = router(
        logits,
        bias,
        zero_experts=zeros,
        top_k=top_k,
        scaling=scaling,
        score=score,
        renormalize=renormalize,
        balance_groups=groups,
        valid=valid,
        identity=identity,
    )
    counts, masses = [0] * (experts + zeros), [0.0] * (groups + 1)
    for t in range(tokens):
        exponentials = [math.exp(z) for z in logits[t].tolist()]
        if score == "softmax":
            scores = [e / sum(exponentials) for e in exponentials]
        else:
            scores = [e / (1 + e) for e in exponentials]
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        ids = sorted(range(experts + zeros), key=lambda i: (-biased[i], i))[:top_k]
        chosen = [scores[i] for i in ids]
        if renormalize:
            chosen = [s / sum(chosen) for s in chosen]
        weights = [scaling * s for s in chosen]
        zero_places = [j for j in range(top_k) if ids[j] >= experts]
        wanted = {
            "scaled": sum(weights[j] for j in zero_places),
            "unscaled": sum(chosen[j] for j in zero_places),
            "copy": float(len(zero_places)),
            "drop": 0.0,
        }[identity]
        assert out.ids[t].tolist() == ids
        assert out.weights[t].tolist() == pytest.approx(weights, rel=1e-12)
        assert out.identity[t].item() == pytest.approx(wanted if valid[t] else 0.0, rel=1e-12)
        if valid[t]:
            for i in ids:
                counts[i] += 1
            for i, s in enumerate(scores):
                masses[min(i // (experts // groups), groups)] += s / sum(scores)
    assert out.counts.tolist() == counts
    assert out.group_probs.tolist() == pytest.approx(masses, rel=1e-12)


def test_dtypes_and_shapes():
    logits, bias = draw(5, 9, dtype=torch.float32)
    out = router(logits, bias, zero_experts=3, top_k=2, balance_groups=2)
    assert [(part.dtype, tuple(part.shape)) for part in out] == [
        (torch.int64, (5, 2)),
        (torch.float32, (5, 2)),
        (torch.float32, (5,)),
        (torch.int64, (9,)),
        (torch.float32, (3,)),
    ]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("identity", ["scaled", "unscaled"])
def test_gradient(score, renormalize, identity):
    logits, bias = draw(5, 7, seed=1)
    valid = torch.tensor([True, False, True, True, True])

    def differentiable(z):
        out = router(
            z,
            bias,
            zero_experts=3,
            top_k=3,
            scaling=1.5,
            score=score,
            renormalize=renormalize,
            balance_groups=2,
            valid=valid,
            identity=identity,
        )
        return out.weights, out.identity, out.group_probs

    assert torch.autograd.gradcheck(differentiable, (logits.requires_grad_(),))


def test_bias_chooses_but_never_weighs():
    logits = torch.zeros(2, 4)
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0], requires_grad=True)
    out = router(logits, bias, zero_experts=1, top_k=2, scaling=4.0)
    assert out.ids.tolist() == [[3, 0], [3, 0]]
    assert out.weights.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not out.weights.requires_grad


def test_ties_go_to_the_lowest_index():
    out = router(torch.zeros(3, 700), torch.zeros(700), zero_experts=200, top_k=5)
    assert out.ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_no_tokens():
    out = router(torch.zeros(0, 6), torch.zeros(6), zero_experts=2, top_k=2)
    assert out.ids.shape == (0, 2)
    assert out.counts.tolist() == [0] * 6
    assert out.group_probs.tolist() == [0.0, 0.0]


def test_no_zero_experts():
    logits, bias = draw(4, 6)
    out = router(logits, bias, zero_experts=0, top_k=2, balance_groups=3)
    assert out.identity.tolist() == [0.0] * 4
    assert out.group_probs[-1].item() == 0.0
    assert out.group_probs.sum().item() == pytest.approx(4.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_unfinished_logits_stay_in_their_row(poison):
    logits, bias = draw(3, 6)
    logits[1, 2] = poison
    out = router(logits, bias, zero_experts=2, top_k=3)
    assert out.ids.min() >= 0
    assert out.ids.max() < 6
    assert all(len(set(row)) == 3 for row in out.ids.tolist())
    assert out.weights[[0, 2]].isfinite().all()
    assert out.weights[1].isfinite().all().item() == (poison == -math.inf)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.zeros(6)}, "logits"),
        ({"logits": torch.zeros(4, 6, dtype=torch.int64)}, "logits"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, "bias"),
        ({"zero_experts": 6}, "zero_experts"),
        ({"zero_experts": -1}, "zero_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 7}, "top_k"),
        ({"balance_groups": 3}, "balance_groups"),
        ({"score": "relu"}, "score"),
        ({"identity": "none"}, "identity"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, "valid"),
        ({"valid": torch.ones(4)}, "valid"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {"logits": torch.zeros(4, 6), "bias": torch.zeros(6), "zero_experts": 2, "top_k": 2} | change
    with pytest.raises((ValueError, TypeError), match=named):
        router(**arguments)
