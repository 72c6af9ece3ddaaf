"""router: the CUDA kernels on the emulator against the reference in float64."""

import math
from typing import Any

import pytest
import torch
from ops.routing import COMBINATIONS, compare, draw, gradients_of
from torch import Tensor

from mmoe.reference import router as reference
from mmoe.reference.router import RouterOutput


@pytest.fixture
def run(emulated):
    """The operator with the keywords of mmoe.ops.router: its outputs and the gradient for gradients_of."""

    def call(logits: Tensor, bias: Tensor, *, zero_experts: int, top_k: int, **given: Any) -> tuple:
        options = {
            "scaling": 1.0,
            "score": "softmax",
            "renormalize": False,
            "balance_groups": 1,
            "selection_groups": 1,
            "selected_groups": 1,
            "valid": None,
            "identity": "scaled",
        } | given
        valid = options.pop("valid")
        weights, identity, probs, stats, ids, counts = emulated.router(
            logits, bias, valid, zero_experts, top_k, *options.values()
        )
        out = RouterOutput(ids, weights, identity, counts, probs)
        del options["selection_groups"], options["selected_groups"]
        grad = emulated.router_backward(*gradients_of(out), logits, valid, ids, stats, zero_experts, *options.values())
        return out, grad

    return call


# Every instance of the forward, with 16-byte accesses and without, and rows of a column, of less than a warp, ragged.
@pytest.mark.parametrize(
    ("slots", "zeros", "top_k"),
    [
        *[
            (1, 0, 1),
            (24, 8, 4),
            (27, 3, 27),
            (128, 64, 12),
            (130, 2, 12),
            (256, 0, 32),
            (511, 255, 12),
            (512, 256, 17),
        ],
        *[(768, 256, 12), (766, 0, 32), (1536, 512, 16), (1533, 1, 32), (2304, 768, 32), (2303, 768, 12)],
    ],
)
def test_against_float64(run, slots, zeros, top_k):
    logits, bias = draw(9, slots, slots, torch.float32, 2.0)
    options = {"zero_experts": zeros, "top_k": top_k, "scaling": 2.5, "valid": torch.arange(9) % 3 != 1}
    compare(*run(logits, bias, **options), logits, bias, options)


@pytest.mark.parametrize("options", COMBINATIONS)
def test_every_option(run, options):
    logits, bias = draw(7, 51, 3, torch.float32, 2.0)
    options = options | {"zero_experts": 9, "top_k": 6, "scaling": 1.5, "balance_groups": 6}
    compare(*run(logits, bias, **options), logits, bias, options)


def test_many_groups(run):
    """DeepSeek-V3: 256 experts in 8 groups, the best 4, 8 experts; and as many groups as there may be."""
    for groups, selected in ((8, 4), (32, 5)):
        logits, bias = draw(6, 256, groups, torch.float32)
        options = {"zero_experts": 0, "top_k": 8, "selection_groups": groups, "selected_groups": selected}
        options |= {"score": "sigmoid", "renormalize": True, "scaling": 2.5}
        compare(*run(logits, bias, **options), logits, bias, options)


@pytest.mark.parametrize("top_k", [5, 16, 17, 32])
def test_ties_fill_the_list_of_candidates(run, top_k):
    logits = torch.zeros(2, 700)
    logits[1, 300:] = 1.0
    out, _ = run(logits, torch.zeros(700), zero_experts=200, top_k=top_k)
    assert out.ids.tolist() == [list(range(top_k)), list(range(300, 300 + top_k))]


def test_rows_off_the_vector_grid(run):
    logits, bias = draw(5, 64, 0, torch.float32)
    options = {"zero_experts": 8, "top_k": 5}
    shifted = torch.cat([torch.zeros(1), logits.flatten()])[1:].view(5, 64)
    compare(*run(shifted, bias, **options), shifted, bias, options)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_what_is_not_finite(run, poison, score):
    """Ids and weights as the reference has them, and every gradient outside of the row finite."""
    logits, bias = draw(3, 90, 0, torch.float32)
    logits[1, 40:44] = poison
    options = {"zero_experts": 20, "top_k": 6, "score": score}
    out, grad = run(logits, bias, **options)
    wanted = reference.router(logits, bias, **options)
    assert torch.equal(out.ids, wanted.ids)
    torch.testing.assert_close(out.weights, wanted.weights, rtol=2e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(out.group_probs, wanted.group_probs, rtol=2e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(out.counts, wanted.counts)
    assert grad[[0, 2]].isfinite().all()


def test_nothing_to_count(run):
    for tokens in (0, 3):
        logits, bias = draw(tokens, 8, 0, torch.float32)
        valid = torch.zeros(tokens, dtype=torch.bool)
        out, grad = run(logits, bias, zero_experts=2, top_k=2, balance_groups=3, valid=valid)
        assert not out.counts.any()
        assert not out.group_probs.any()
        assert not out.identity.any()
        assert grad.shape == logits.shape


def test_what_a_warp_cannot_hold_is_named(run):
    for slots, options, named in (
        (2305, {"top_k": 4}, "columns"),
        (100, {"top_k": 33}, "top_k"),
        (132, {"top_k": 4, "selection_groups": 33, "selected_groups": 2}, "selection_groups"),
    ):
        with pytest.raises(RuntimeError, match=named):
            run(*draw(2, slots, 0, torch.float32), zero_experts=0, **options)
