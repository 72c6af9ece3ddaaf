"""The router against a loop written from the paper, against its reference in float64, its gradients, its edge cases."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import threads
from ops.routing import COMBINATIONS, DTYPES, compare, draw, gradients_of, run

from mmoe.ops.router import router
from mmoe.reference import router as reference


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("identity", ["scaled", "unscaled", "copy", "drop"])
@pytest.mark.parametrize(("selection_groups", "selected_groups"), [(1, 1), (3, 1), (3, 2)])
def test_against_a_loop(score, renormalize, identity, selection_groups, selected_groups):
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
        selection_groups=selection_groups,
        selected_groups=selected_groups,
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
        run_size = experts // selection_groups
        runs = [sorted(biased[g * run_size : (g + 1) * run_size])[-2:] for g in range(selection_groups)]
        best = sorted(range(selection_groups), key=lambda g: (-sum(runs[g]), g))[:selected_groups]
        eligible = [i for i in range(experts + zeros) if i >= experts or i // run_size in best]
        ids = sorted(eligible, key=lambda i: (-biased[i], i))[:top_k]
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


@pytest.mark.parametrize("options", COMBINATIONS)
@pytest.mark.parametrize("function", [router, reference.router])
def test_gradient(function, options):
    logits, bias = draw(5, 9, seed=1)
    valid = torch.tensor([True, False, True, True, True])
    fixed = {"zero_experts": 3, "top_k": 3, "scaling": 1.5, "balance_groups": 2, "valid": valid}

    def differentiable(z):
        out = function(z, bias, **fixed, **options)
        return [part for part in (out.weights, out.identity, out.group_probs) if part.requires_grad]

    assert torch.autograd.gradcheck(differentiable, (logits.requires_grad_(),))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_against_float64(data):
    """Any sizes: rows shorter than a vector, ragged, of several buckets; every k up to the whole row."""
    options = dict(data.draw(st.sampled_from(COMBINATIONS)))
    runs = options.get("selection_groups", 1) * data.draw(st.integers(1, 3))
    experts, zeros = runs * data.draw(st.integers(2, 70)), data.draw(st.integers(0, 70))
    eligible = experts // options.get("selection_groups", 1) * options.get("selected_groups", 1) + zeros
    tokens = data.draw(st.integers(0, 40))
    logits, bias = draw(tokens, experts + zeros, experts, data.draw(st.sampled_from(DTYPES)), 2.0)
    options |= {
        "zero_experts": zeros,
        "top_k": data.draw(st.integers(1, min(eligible, 40))),
        "balance_groups": runs,
        "scaling": data.draw(st.sampled_from([1.0, 2.5])),
        "valid": torch.arange(tokens) % 3 != 1 if data.draw(st.booleans()) else None,
    }
    compare(*run(logits, bias, **options), logits, bias, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slots", "zeros", "top_k"), [(2304, 768, 32), (2303, 0, 32), (768, 256, 12), (40, 8, 40)])
def test_large_rows(slots, zeros, top_k, dtype):
    logits, bias = draw(20, slots, 3, dtype)
    options = {"zero_experts": zeros, "top_k": top_k, "scaling": 6.0}
    compare(*run(logits, bias, **options), logits, bias, options)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_rows_that_fill_the_list_of_candidates(order):
    """Rising rows make every column a candidate: the list has to be cut again and again. Equal ones are all ties."""
    logits = torch.linspace(-3, 3, 1000)[None].repeat(2, 1)
    logits = {"rising": logits, "falling": logits.flip(1), "equal": 0 * logits}[order]
    ids = router(logits, torch.zeros(1000), zero_experts=200, top_k=32).ids
    wanted = range(999, 967, -1) if order == "rising" else range(32)
    assert ids.tolist() == [list(wanted)] * 2


def test_strided_and_shifted():
    logits, bias = draw(40, 33, 0, torch.float32)
    options = {"zero_experts": 8, "top_k": 5, "valid": torch.arange(66)[::2] % 4 > 0}
    compare(*run(logits.t(), draw(1, 40)[1].float(), **options), logits.t(), draw(1, 40)[1].float(), options)
    shifted = torch.cat([torch.zeros(1), logits.flatten()])[1:].view(40, 33)
    options["valid"] = None
    for a, b in zip(router(shifted, bias, **options), router(logits, bias, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("missing", range(8))
def test_any_gradient_may_be_absent(missing):
    logits, bias = draw(6, 12, 2)
    options = {"zero_experts": 4, "top_k": 3, "renormalize": True}
    used = [i for i in range(3) if missing >> i & 1 == 0]
    grads = []
    for function in (router, reference.router):
        leaf = logits.clone().requires_grad_()
        out = function(leaf, bias, **options)
        parts = out.weights, out.identity, out.group_probs
        loss = sum([(parts[i] * gradients_of(out)[i]).sum() for i in used], 0 * leaf.sum())
        loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_opcheck():
    logits, bias = draw(5, 9, 0, torch.float32)
    for valid in (None, torch.arange(5) % 2 == 0):
        arguments = logits.requires_grad_(), bias, valid, 3, 2, 1.5, "softmax", True, 2, 3, 2, "scaled"
        results = torch.library.opcheck(torch.ops.mmoe.router.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_compiled_and_under_autocast():
    logits, bias = draw(8, 12, 0, torch.float32)
    weight = torch.eye(12)
    x = logits.bfloat16()

    def routed(x: torch.Tensor) -> tuple:
        return tuple(router(torch.nn.functional.linear(x, weight), bias, zero_experts=4, top_k=3))

    with torch.autocast("cpu", torch.bfloat16):
        out = routed(x)
        compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)(x)
    wanted = router(x.float(), bias, zero_experts=4, top_k=3)
    for a, b, c in zip(out, wanted, compiled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_past_the_caches(score):
    """A gradient of more than 16 MiB is written past the caches. Its halves are not, and have the same bits."""
    logits, bias = draw(5600, 768, dtype=torch.float32)
    assert logits.nbytes > 1 << 24
    options = {"zero_experts": 256, "top_k": 12, "scaling": 6.0, "score": score}
    of_weights, of_identity, of_probs = gradients_of(router(logits, bias, **options))

    def grad(some: slice) -> torch.Tensor:
        leaf = logits[some].clone().requires_grad_()
        out = router(leaf, bias, **options)
        given = of_weights[some], of_identity[some], of_probs
        return torch.autograd.grad((out.weights, out.identity, out.group_probs), leaf, given)[0]

    assert torch.equal(grad(slice(None)), torch.cat([grad(slice(2800)), grad(slice(2800, None))]))


def test_any_number_of_threads_gives_the_same_bits():
    logits, bias = draw(700, 300, 0, torch.float32)

    def both():
        out, grad = run(logits, bias, zero_experts=100, top_k=8, balance_groups=4, renormalize=True)
        return *out, grad

    threads.check_bits(both)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, root):
    script = f"""
import sys
sys.path.insert(0, {str(root / "tests")!r})
import torch
from ops.routing import COMBINATIONS, DTYPES, compare, draw, run
for i, options in enumerate(COMBINATIONS):
    for slots, top_k, dtype in ((27, 5, DTYPES[i % 2]), (203, 17, torch.float32)):
        logits, bias = draw(9, slots, i, dtype, 2.0)
        options = options | {{"zero_experts": slots % 12 + 12, "top_k": top_k, "valid": torch.arange(9) % 4 > 0}}
        compare(*run(logits, bias, **options), logits, bias, options)
from ops.test_router import test_past_the_caches
test_past_the_caches("sigmoid")
"""
    environment = os.environ | {"MMOE_SIMD": isa}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [{}, {"selection_groups": 5, "selected_groups": 2}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(poison, score, groups, dtype):
    """NaN ranks first, infinities propagate: ids, weights and sums as the reference has them."""
    logits, bias = draw(3, 90, 0, dtype)
    logits[1, 30:34] = poison
    options = {"zero_experts": 20, "top_k": 6, "score": score, **groups}
    out, grad = run(logits, bias, **options)
    wanted = reference.router(logits, bias, **options)
    assert torch.equal(out.ids, wanted.ids)
    assert torch.equal(out.counts, wanted.counts)
    for part, wanted_part in ((out.weights, wanted.weights), (out.group_probs, wanted.group_probs)):
        torch.testing.assert_close(part, wanted_part, rtol=2e-6, atol=0, equal_nan=True)
    assert grad[[0, 2]].isfinite().all()


def test_bias_that_is_not_finite():
    """-inf is eligible, after everything else; NaN comes first."""
    bias = torch.tensor([0.0, -math.inf, math.nan, -math.inf])
    ids = router(torch.zeros(1, 4), bias, zero_experts=1, top_k=4).ids
    assert ids.tolist() == [[2, 0, 1, 3]]
    limited = router(torch.zeros(1, 4), bias, zero_experts=0, top_k=2, selection_groups=2, selected_groups=1).ids
    assert limited.tolist() == [[2, 3]]


def test_one_expert_takes_all_and_only_zero_experts():
    logits, bias = draw(50, 24)
    bias[5] = 2.0
    out = router(logits, bias, zero_experts=8, top_k=1)
    assert out.counts.tolist() == [50 * (i == 5) for i in range(24)]
    bias[16:] = 3.0
    out = router(logits, bias, zero_experts=8, top_k=8, scaling=2.0)
    assert out.counts.tolist() == [0] * 16 + [50] * 8
    torch.testing.assert_close(out.identity, out.weights.sum(1), rtol=1e-14, atol=0)


def test_nothing_but_padding():
    logits, bias = draw(4, 12)
    options = {"zero_experts": 4, "top_k": 3, "valid": torch.zeros(4, dtype=torch.bool)}
    compare(*run(logits, bias, **options), logits, bias, options)


def from_transformers(layer, logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of a router of transformers that sees the logits as they are; ids by falling choice."""
    layer = layer.double()
    layer.e_score_correction_bias = bias
    # The weight is cast to fp32 in there, so an identity keeps fp32 logits exact.
    _, weights, ids = layer(logits)
    scores = logits.softmax(-1) if "Longcat" in type(layer).__name__ else logits.sigmoid()
    order = (scores + bias).gather(1, ids).sort(dim=-1, descending=True).indices
    return ids.gather(1, order), weights.gather(1, order)


def test_against_transformers_longcat_flash():
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashConfig, LongcatFlashTopkRouter

    config = LongcatFlashConfig(
        hidden_size=48, n_routed_experts=32, zero_expert_num=16, moe_topk=6, routed_scaling_factor=6.0
    )
    layer = LongcatFlashTopkRouter(config)
    torch.nn.init.eye_(layer.classifier.weight)
    logits, bias = draw(64, 48, dtype=torch.float32)
    ids, weights = from_transformers(layer, logits, bias)
    out = router(logits, bias, zero_experts=16, top_k=6, scaling=6.0)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.weights, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_against_transformers_deepseek_v3(renormalize):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=64,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    layer = DeepseekV3TopkRouter(config)
    torch.nn.init.eye_(layer.weight)
    logits, bias = draw(64, 64, dtype=torch.float32)
    ids, weights = from_transformers(layer, logits, bias)
    options = {"selection_groups": 8, "selected_groups": 3, "score": "sigmoid", "renormalize": renormalize}
    for function in (router, reference.router):
        out = function(logits, bias, zero_experts=0, top_k=6, scaling=2.5, **options)
        assert torch.equal(out.ids, ids)
        torch.testing.assert_close(out.weights, weights, rtol=1e-6, atol=0)


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
        ({"selection_groups": 0}, "selection_groups"),
        ({"selection_groups": 4}, "selection_groups"),
        ({"selected_groups": 2}, "selected_groups"),
        ({"selection_groups": 2, "selected_groups": 1, "top_k": 5}, "selected_groups"),
        ({"logits": torch.zeros(4, 6, dtype=torch.bfloat16)}, "logits"),
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
