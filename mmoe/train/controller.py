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


def steer(model: MultimodalModel, tallies: Tensor, rate: float) -> None:
    """Moves the biases of all layers by ``tallies``, fp64 [layers, N + Z + 4], summed over all data-parallel ranks."""
    for router, tally in zip(routers(model), tallies, strict=True):
        steer_router(router, tally, rate)


@torch.no_grad()
def steer_router(router: ZeroExpertRouter, tally: Tensor, rate: float) -> None:
    """Moves the bias of every FFN expert i; zero experts' biases never move (arXiv 2509.01322, section 2.1.1).

        e_i  = K_e/(k N) − T_i/(k T)
        S_i  ← S_i + e_i, held within ± limit · K_e/(k N)
        Δb_i = μ (e_i + g_S S_i + g_D (e_i − e_i of the step before))

    T_i: tokens that chose expert i, T: tokens, both over the global batch without padding. ``rate`` is μ; S and e start
    at 0.

    With both gains 0 this is the published rule. The bias is itself the sum of its changes: in terms of the bias the
    published rule integrates the error, g_D adds a proportional answer to it, and g_S a second integral, which also
    holds a router that drifts at a steady pace. The bound on S limits what a long one-sided error leaves behind.
    """
    moe = router.config.moe
    chosen = tally[: moe.experts] / (moe.top_k * tally[moe.experts + moe.zero_experts].clamp(min=1))
    wanted = moe.active_experts / (moe.top_k * moe.experts)
    error = wanted - chosen
    bound = moe.bias_integral_limit * wanted
    router.bias_error_sum.copy_((router.bias_error_sum + error).clamp(-bound, bound))
    beside = moe.bias_integral_gain * router.bias_error_sum + moe.bias_derivative_gain * (error - router.bias_error)
    router.bias_error.copy_(error)
    router.e_score_correction_bias[: moe.experts] += (rate * (error + beside)).float()
