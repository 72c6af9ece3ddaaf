"""The K_e controller: the published rule, and that it settles."""

import small
import torch

from mmoe.models.multimodal import MultimodalModel
from mmoe.train import controller

MOE = small.MIXTURE
SLOTS = MOE.experts + MOE.zero_experts


def tallies(counts: list[float], tokens: float) -> torch.Tensor:
    return torch.tensor([[*counts, tokens, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64)


def test_the_published_rule() -> None:
    model = MultimodalModel(small.RECIPE, small.config())
    controller.steer(model, tallies([30, 10, 20, 0, 60, 0], 40.0))
    for router in controller.routers(model):
        bias = router.e_score_correction_bias
        wanted = MOE.active_experts / (MOE.top_k * MOE.experts)
        for i, chosen in enumerate((30, 10, 20, 0)):
            assert bias[i].item() == torch.tensor(0.1 * (wanted - chosen / (3 * 40))).float().item()
        assert bias[MOE.experts :].eq(0).all()


def test_it_settles_at_the_wanted_mean() -> None:
    """Uniform routing would give 2 of 3; the wanted mean is 1.5."""
    config = small.config()
    model = MultimodalModel(small.RECIPE, config).train()
    batch = small.batch(torch.randint(4, 64, (2, 200), generator=torch.Generator().manual_seed(0)))
    active = []
    for _ in range(150):
        model(batch)
        seen = controller.take_tallies(model)
        controller.steer(model, seen)
        active.append(float(seen[:, SLOTS + 1].sum() / seen[:, SLOTS].sum()))
    assert abs(active[0] - MOE.active_experts) > 0.1
    assert abs(sum(active[-30:]) / 30 - MOE.active_experts) < 0.03 * MOE.active_experts
