"""Zero experts: skipped for real, differentiable, counted and balanced without padding."""

import dataclasses
from typing import Any

import pytest
import small
import torch
from torch import Tensor

from mmoe.layers.moe import ZeroExpertMoE
from mmoe.layers.packed import Packed
from mmoe.layers.router import Tally, ZeroExpertRouter, balance_loss
from mmoe.ops.router import router as route

MOE, D = small.MIXTURE, small.BACKBONE.hidden_size
SLOTS = MOE.experts + MOE.zero_experts


def packed(valid: Tensor) -> Packed:
    nothing = torch.zeros(1)
    return Packed(nothing, (nothing, nothing), (nothing, nothing), valid, torch.tensor(1.0))


def layer(**settings: Any) -> ZeroExpertMoE:
    config = small.config()
    config.moe = dataclasses.replace(MOE, **settings)
    return small.initialised(ZeroExpertMoE(config))


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(3), dtype=dtype)


def dense(moe: ZeroExpertMoE, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """The layer as the report writes it: γ Σ over all slots of weight × expert(x), one token at a time; with ``shift``
    [N + Z] added to every token's scores behind the choice."""
    settings = moe.config.moe
    factor = settings.variance_factor * settings.routed_scaling_factor
    identity = {"scaled": (0, factor), "unscaled": (0, 1), "copy": (1, 0), "drop": (0, 0)}
    constant, of_score = identity[settings.identity]
    scores = (x @ moe.router.weight.to(x.dtype).t()).softmax(-1)
    chosen = (scores + moe.router.e_score_correction_bias.to(x.dtype)).topk(MOE.top_k, -1).indices
    scores, rows = scores + shift, []
    for token, ids in zip(range(len(x)), chosen.tolist(), strict=True):
        out = torch.zeros_like(x[token])
        for expert in ids:
            score = scores[token, expert]
            if expert >= MOE.experts:
                out = out + (constant + of_score * score) * x[token]
                continue
            gate, up = moe.experts.w1[expert].to(x.dtype) @ x[token]
            out = out + factor * score * (moe.experts.w2[expert].to(x.dtype) @ (torch.nn.functional.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [{}, {"variance_factor": 1.5}, {"identity": "unscaled"}, {"identity": "copy"}, {"identity": "drop"}],
    ids=str,
)
def test_equals_the_papers_sum_over_experts(settings: dict) -> None:
    """Outputs, and the gradients to the tokens, the router and both expert weights."""
    moe = layer(**settings)
    weight = torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    parameters = {"router": moe.router.weight, "w1": moe.experts.w1, "w2": moe.experts.w2}

    def outputs_and_gradients(dispatched: bool) -> dict[str, Tensor]:
        x = tokens(40).requires_grad_()
        y = moe(x, packed(torch.ones(40, dtype=torch.bool))) if dispatched else dense(moe, x)
        gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()])
        return {"y": y, "x": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}

    moe.eval()  # without the balance loss, which the paper's sum does not have
    ours, expected = outputs_and_gradients(True), outputs_and_gradients(False)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_only_slots_of_ffn_experts_are_sent() -> None:
    moe, x = layer(), tokens(40)
    valid = torch.ones(40, dtype=torch.bool)
    routed, _ = moe.router(x, valid)
    moe(x, packed(valid))
    assert moe.sent_rows == int((routed.ids < MOE.experts).sum())
    assert 0 < moe.sent_rows < 40 * MOE.top_k

    moe.router.e_score_correction_bias[MOE.experts :] = 10.0
    moe(x, packed(valid))
    assert moe.sent_rows == 40 * (MOE.top_k - MOE.zero_experts)


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count: int) -> None:
    moe = layer()
    x = tokens(count).requires_grad_()
    y = moe(x, packed(torch.ones(count, dtype=torch.bool)))
    y.sum().backward()
    assert y.shape == (count, D)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_through_zero_experts() -> None:
    """With every slot on a zero expert the layer is x · Σ weights: gradcheck to x and to the router, in float64."""
    settings = dataclasses.replace(MOE, top_k=2, active_experts=1.0)
    config = small.config()
    config.moe = settings
    router = small.initialised(ZeroExpertRouter(config))
    moe = small.initialised(ZeroExpertMoE(config))
    moe.router = router
    router.e_score_correction_bias[MOE.experts :] = 10.0
    valid = torch.ones(5, dtype=torch.bool)
    x = tokens(5)
    y = moe(x.clone().requires_grad_(), packed(valid))
    assert moe.sent_rows == 0

    scores = (x @ router.weight.t()).softmax(-1)
    share = MOE.routed_scaling_factor * scores[:, MOE.experts :].sum(1, keepdim=True)
    torch.testing.assert_close(y, share * x, rtol=1e-5, atol=1e-6)

    from mmoe.ops.permute import permute
    from mmoe.ops.unpermute import unpermute

    def through(x64: Tensor, weight64: Tensor) -> Tensor:
        out = route(
            x64 @ weight64.t(),
            router.e_score_correction_bias.double(),
            zero_experts=MOE.zero_experts,
            top_k=2,
            scaling=2.0,
        )
        rows, row_of_slot, _, _ = permute(x64, out.ids, MOE.experts)
        return unpermute(rows, row_of_slot, out.weights, x64, out.identity)

    inputs = (x.double().requires_grad_(), router.weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(through, inputs)
    through(*inputs).sum().backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad.abs().max() > 0


def test_padding_is_neither_counted_nor_balanced() -> None:
    moe = layer()
    x = tokens(30)
    whole = torch.ones(30, dtype=torch.bool)
    padded = torch.cat((x, 5 * tokens(10)))
    valid = torch.cat((whole, torch.zeros(10, dtype=torch.bool)))
    _, loss = moe.router(x, whole)
    _, loss_padded = moe.router(padded, valid)
    torch.testing.assert_close(loss, loss_padded)
    moe.train()
    moe(padded.requires_grad_(), packed(valid))
    assert moe.router.tally[SLOTS] == 30
    assert moe.router.tally[:SLOTS].sum() == 30 * MOE.top_k


@pytest.mark.parametrize("settings", [{"balance_coefficient": 0.0}, {"zero_experts": 0}])
def test_no_zero_share_is_no_nan(settings: dict) -> None:
    """K_e = k: the balance loss has no zero group; without a coefficient it is exactly 0."""
    config = small.config()
    config.moe = dataclasses.replace(MOE, active_experts=float(MOE.top_k), **settings)
    router = small.initialised(ZeroExpertRouter(config))
    _, loss = router(tokens(20), torch.ones(20, dtype=torch.bool))
    assert loss.isfinite()
    assert (loss == 0) == ("balance_coefficient" in settings)
    if loss.requires_grad:
        loss.backward()
        assert router.weight.grad is not None
        assert router.weight.grad.isfinite().all()


def test_balance_loss_is_level_at_the_wanted_load() -> None:
    """Every FFN group at K_e T / D and the zero group at (k − K_e) T: no gradient moves probability between groups."""
    config, t = small.config(), 120.0
    per_expert = MOE.active_experts * t / MOE.experts
    per_zero = (MOE.top_k - MOE.active_experts) * t / MOE.zero_experts
    counts = torch.tensor([per_expert] * MOE.experts + [per_zero] * MOE.zero_experts)
    groups = MOE.balance_groups + 1

    def gradient(load: Tensor) -> Tensor:
        logits = torch.randn(int(t), groups, generator=torch.Generator().manual_seed(4)).requires_grad_()
        balance_loss(load, logits.softmax(-1).sum(0), torch.tensor(t), config).backward()
        assert logits.grad is not None
        return logits.grad

    assert gradient(counts).abs().max() < 1e-9
    tilted = counts.clone()
    tilted[0] *= 2
    assert gradient(tilted).abs().max() > 1e-5


@pytest.mark.parametrize(("groups", "active"), [(1, 1.0), (2, 1.5), (4, 2.0)])
def test_balance_gradient_vanishes_at_the_wanted_ratio_and_uniform_load(groups: int, active: float) -> None:
    """Through real routing: tokens choose FFN and zero experts as K_e : k − K_e, every expert of a kind equally often;
    nothing reaches the logits, whatever the probabilities. Where some tokens take no zero expert, something does."""
    config, few = small.config(), int(active)
    config.moe = dataclasses.replace(MOE, balance_groups=groups, active_experts=active)
    t, generator = 48, torch.Generator().manual_seed(6)
    noise = torch.rand(t, SLOTS, generator=generator, dtype=torch.float64)

    def gradient(without_zero: int) -> Tensor:
        chosen = torch.zeros(t, SLOTS, dtype=torch.float64)
        ffn, zero = 0, 0
        for token in range(t):
            count = few + (token % 2 if active != few else 0)
            ids = [(ffn + i) % MOE.experts for i in range(count)]
            ids += [MOE.experts + (zero + i) % MOE.zero_experts for i in range(MOE.top_k - count)]
            ffn, zero = ffn + count, zero + MOE.top_k - count
            chosen[token, ids] = 2.0
        chosen[:without_zero, MOE.experts :] = -2.0
        logits = (chosen + noise).requires_grad_()
        bias = torch.zeros(SLOTS, dtype=torch.float64)
        routed = route(logits, bias, zero_experts=MOE.zero_experts, top_k=MOE.top_k, balance_groups=groups, scaling=2.0)
        balance_loss(routed.counts, routed.group_probs, torch.tensor(float(t)).double(), config).backward()
        assert logits.grad is not None
        return logits.grad

    assert gradient(without_zero=0).abs().max() < 1e-16
    assert gradient(without_zero=8).abs().max() > 1e-6


@pytest.mark.parametrize("identity", ["scaled", "unscaled", "drop"])
def test_measured_gradients_are_those_of_a_shift_of_all_probabilities(identity: str) -> None:
    """The mean P moves by δ where every token's probabilities do; padding moves nothing."""
    moe = layer(identity=identity).train()
    x = torch.cat((tokens(40), torch.zeros(5, D)))
    valid = torch.arange(45) < 40
    weight = torch.randn(45, D, generator=torch.Generator().manual_seed(8)) * valid.unsqueeze(1)
    moe.router.measures = True
    (moe(x.clone().requires_grad_(), packed(valid)) * weight).sum().backward()
    measured = Tally.of(moe.router.tally, MOE)

    shift = torch.zeros(SLOTS, requires_grad=True)
    (dense(moe, x, shift) * weight).sum().backward()
    torch.testing.assert_close(measured.loss_gradient.float(), shift.grad, rtol=1e-4, atol=1e-4)
    assert (measured.loss_gradient[MOE.experts :] == 0).all() == (identity == "drop")

    # L_LB = α Σ_j f_j P_j, so the gradient is α f_j; its group's for every expert.
    share = measured.selections / 40
    frequency = [share[:2].sum() / 1.5 * 2, share[2:4].sum() / 1.5 * 2, share[4:].sum() / 1.5]
    torch.testing.assert_close(measured.balance_gradient, MOE.balance_coefficient * torch.stack(frequency))


def test_nothing_is_measured_unasked() -> None:
    moe = layer().train()
    moe(tokens(20).requires_grad_(), packed(torch.ones(20, dtype=torch.bool))).sum().backward()
    counted = Tally.of(moe.router.tally, MOE)
    assert counted.tokens == 20
    assert not counted.loss_gradient.any()
    assert not counted.balance_gradient.any()
