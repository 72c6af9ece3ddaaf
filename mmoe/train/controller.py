"""Steers the mean number of FFN experts per token towards K_e by moving the routers' selection bias."""

from typing import Any

import torch
from torch import Tensor

from mmoe.layers.router import ZeroExpertRouter
from mmoe.models.multimodal import MultimodalModel


def routers(model: MultimodalModel) -> list[ZeroExpertRouter]:
    """The routers in the order of their layers."""
    layers: Any = model.language.decoder.layers
    return [layer.moe.router for layer in layers]


def take_tallies(model: MultimodalModel) -> Tensor:
    """fp64 [layers, N + Z + 4]: what the routers counted on this rank since the last call; they start again at zero."""
    parts = routers(model)
    tallies = torch.stack([part.tally for part in parts])
    for part in parts:
        part.tally.zero_()
    return tallies


@torch.no_grad()
def steer(model: MultimodalModel, tallies: Tensor) -> None:
    """Δb_i = μ (K_e/(k N) − T_i/(k T)) for FFN expert i; zero experts' biases never move (arXiv 2509.01322, 2.1.1).

    T_i: tokens that chose expert i, T: tokens, over the global batch without padding: ``tallies`` summed over all
    data-parallel ranks. Proportional, the published rule.
    """
    for router, tally in zip(routers(model), tallies, strict=True):
        moe = router.config.moe
        chosen = tally[: moe.experts] / (moe.top_k * tally[moe.experts + moe.zero_experts].clamp(min=1))
        wanted = moe.active_experts / (moe.top_k * moe.experts)
        step = moe.bias_rate * (wanted - chosen)
        router.e_score_correction_bias[: moe.experts] += step.to(router.e_score_correction_bias.dtype)
