"""What the metrics say of a router's health."""

import dataclasses
import math

import small
import torch

from mmoe.layers.router import Tally
from mmoe.models.multimodal import build
from mmoe.train import controller
from mmoe.train.metrics import gradient_ratio
from mmoe.train.step import Stepper

MOE = small.MIXTURE


def test_gradient_ratio_by_hand() -> None:
    """Groups of 2, 2 and 2 experts; the layer with the larger ratio counts."""
    numbers = torch.zeros(2, Tally.width(MOE), dtype=torch.float64)
    tally = Tally.of(numbers, MOE)
    tally.loss_gradient[:] = torch.tensor([3.0, 0, 4.0, 0, 0, 0])
    tally.balance_gradient[0] = torch.tensor([0.1, 0.2, 0.2])
    tally.balance_gradient[1] = torch.tensor([0.01, 0.01, 0.01])
    assert math.isclose(gradient_ratio(numbers, MOE), math.sqrt(2 * (0.01 + 0.04 + 0.04)) / 5, rel_tol=1e-6)


def test_row_similarity() -> None:
    small.config()
    model = build(small.RECIPE)
    routers = list(controller.routers([model]).values())
    rows = torch.randn(routers[0].weight.shape, generator=torch.Generator().manual_seed(0))
    for router in routers:
        router.weight.data.copy_(rows)
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    off_diagonal = pairs[~torch.eye(len(rows), dtype=torch.bool)]
    assert math.isclose(controller.row_similarity([model]), float(off_diagonal.mean()), rel_tol=1e-5)


def test_a_measured_step_scales_with_the_balance_coefficient() -> None:
    """Twice α, the same weights and batch: the language model's gradient stays, the balance loss's doubles."""

    def outcome(coefficient: float, measure: bool = True) -> tuple[float, float]:
        moe = dataclasses.replace(MOE, balance_coefficient=coefficient)
        recipe = dataclasses.replace(small.RECIPE, model=dataclasses.replace(small.RECIPE.model, moe=moe))
        small.config()
        tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
        batch = {**small.batch(tokens), "samples": [["a"], ["b"]], "skipped": []}
        result = Stepper(recipe, [build(recipe)]).step(iter([batch]), 0.0, measure=measure)
        return gradient_ratio(result.tallies, moe), result.row_similarity

    (low, similarity), (high, _) = outcome(1e-4), outcome(2e-4)
    # Layer 0's gradient holds what layer 1's balance loss sends back: 2 is met to that share.
    assert math.isclose(high, 2 * low, rel_tol=1e-2)
    assert 0 < abs(similarity) < 1
    assert outcome(1e-4, measure=False)[1] == 0
