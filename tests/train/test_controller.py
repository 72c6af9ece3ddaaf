"""The K_e controller: the published rule, the terms beside it, and how each settles."""

import dataclasses

import pytest
import small
import torch
from torch import Tensor

from mmoe.layers.config import make_config
from mmoe.layers.router import Tally, ZeroExpertRouter
from mmoe.models.multimodal import MultimodalModel
from mmoe.recipe.model import MoE
from mmoe.train import controller

MOE = small.MIXTURE
SLOTS = MOE.experts + MOE.zero_experts
WANTED = MOE.active_experts / (MOE.top_k * MOE.experts)


def build(moe: MoE) -> MultimodalModel:
    model = dataclasses.replace(small.RECIPE.model, moe=moe)
    small.config()
    recipe = dataclasses.replace(small.RECIPE, model=model)
    return MultimodalModel(recipe, make_config(recipe)).train()


def tallies(counts: list[float], tokens: float) -> Tensor:
    numbers = torch.zeros(2, Tally.width(MOE), dtype=torch.float64)
    numbers[:, : SLOTS + 1] = torch.tensor([*counts, tokens])
    return numbers


def test_the_published_rule() -> None:
    model = build(MOE)
    controller.steer([model], tallies([30, 10, 20, 0, 60, 0], 40.0), 0.1)
    for router in controller.routers([model]).values():
        bias = router.e_score_correction_bias
        for i, chosen in enumerate((30, 10, 20, 0)):
            assert bias[i].item() == torch.tensor(0.1 * (WANTED - chosen / (3 * 40))).float().item()
        assert bias[MOE.experts :].eq(0).all()


def test_integral_and_derivative_by_hand() -> None:
    model = build(dataclasses.replace(MOE, bias_integral_gain=0.5, bias_derivative_gain=2.0))
    loads, expected = [[30, 10, 20, 0, 60, 0], [15, 15, 0, 30, 60, 0]], torch.zeros(4, dtype=torch.float64)
    before, total = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for load in loads:
        controller.steer([model], tallies([float(count) for count in load], 40.0), 0.1)
        error = WANTED - torch.tensor(load[:4], dtype=torch.float64) / (3 * 40)
        total += error
        expected += 0.1 * (error + 0.5 * total + 2.0 * (error - before))
        before = error
    for router in controller.routers([model]).values():
        torch.testing.assert_close(router.e_score_correction_bias[:4].double(), expected, rtol=1e-6, atol=1e-8)


def test_the_summed_error_is_bounded() -> None:
    """An expert that gets nothing for long: the sum stops at its bound, and is unwound from there at once."""
    model = build(dataclasses.replace(MOE, bias_integral_gain=1.0, bias_integral_limit=3.0))
    router = controller.routers([model])[0]
    for _ in range(50):
        controller.steer([model], tallies([0, 20, 20, 20, 60, 0], 40.0), 0.1)
    bound = torch.tensor(3 * WANTED).float()
    assert router.bias_error_sum[0] == bound
    assert router.bias_error_sum[1] == -bound
    controller.steer([model], tallies([30, 15, 15, 15, 45, 0], 40.0), 0.1)
    torch.testing.assert_close(router.bias_error_sum[0], bound + (WANTED - 30 / 120))


def active_means(moe: MoE, steps: int, drift: float = 0.0) -> Tensor:
    """The mean number of FFN experts per token, step by step, of a layer that only the controller moves, while the FFN
    experts' biases sink by ``drift`` a step as if the router lost interest in them."""
    config = small.config()
    config.moe = moe
    generator = torch.Generator().manual_seed(0)
    router = ZeroExpertRouter(config).train()
    router.weight.data = torch.randn(router.weight.shape, generator=generator) * moe.router_init_std
    x = torch.randn(1000, config.hidden_size, generator=generator)
    valid = torch.ones(1000, dtype=torch.bool)
    active = []
    for _ in range(steps):
        routed, loss = router(x, valid)
        router.count(routed, valid, loss)
        active.append(float(router.tally[SLOTS + 1] / router.tally[SLOTS]))
        controller.steer_router(router, router.tally, moe.bias_rate)
        router.tally.zero_()
        router.e_score_correction_bias[: moe.experts] -= drift
    return torch.tensor(active)


@pytest.fixture(scope="module")
def proportional() -> Tensor:
    """Uniform routing would give 2 of 3; the wanted mean is 1.5."""
    return active_means(MOE, 120)


def first_within(active: Tensor) -> int:
    """The first step that is within 1% of the wanted mean."""
    return int((active - MOE.active_experts).abs().lt(0.01 * MOE.active_experts).int().argmax())


def test_the_published_rule_settles_from_above(proportional: Tensor) -> None:
    assert proportional[0] - MOE.active_experts > 0.3
    assert (proportional[-20:] - MOE.active_experts).abs().max() < 0.01 * MOE.active_experts
    assert proportional.min() > 0.998 * MOE.active_experts


def test_the_integral_arrives_sooner_and_overshoots_less_the_tighter_its_bound(proportional: Tensor) -> None:
    free, bound = (
        active_means(dataclasses.replace(MOE, bias_integral_gain=0.1, bias_integral_limit=limit), 120)
        for limit in (10.0, 0.5)
    )
    assert first_within(free) < first_within(bound) < first_within(proportional)
    assert free.min() < bound.min() < 0.99 * MOE.active_experts


def test_only_the_integral_holds_a_drifting_router() -> None:
    """The published rule settles where μ e = drift: e · k · N below the wanted mean."""
    drift = 0.001
    short = active_means(MOE, 150, drift)[-1]
    held = active_means(dataclasses.replace(MOE, bias_integral_gain=0.1, bias_derivative_gain=1.0), 250, drift)[-10:]
    offset = drift / MOE.bias_rate * MOE.top_k * MOE.experts
    assert abs(float(short) - (MOE.active_experts - offset)) < 0.1 * offset
    assert (held - MOE.active_experts).abs().max() < 0.01 * MOE.active_experts
