"""Steers the mean number of FFN experts per token towards K_e by moving the routers' selection bias."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmoe.layers.router import Tally, ZeroExpertRouter
from mmoe.models.multimodal import MultimodalModel
from mmoe.parallel import cpu_platform, engine


def routers(models: Sequence[MultimodalModel]) -> dict[int, ZeroExpertRouter]:
    """The routers of this rank's pipeline stages by their layer, from 0; a dense model has none."""
    layers: list[Any] = [layer for model in models for layer in model.language.decoder.layers]
    return {layer.layer_number - 1: layer.moe.router for layer in layers if hasattr(layer, "moe")}


def take_tallies(models: Sequence[MultimodalModel]) -> Tensor:
    """fp64 [layers of the whole model, Tally.width]: what this rank's routers counted since the last call, zero for the
    layers of other stages; they start again at zero. Summed over all ranks they are the global batch's. A dense model
    has [0, 0]."""
    parts = routers(models)
    tally = next((router.tally for router in parts.values()), None)
    if tally is None:
        return torch.zeros(0, 0, dtype=torch.float64, device=cpu_platform.device())
    tallies = tally.new_zeros(models[0].config.num_layers, tally.numel())
    for layer, router in parts.items():
        tallies[layer] = router.tally
        router.tally.zero_()
    return tallies


def _spoken_for(models: Sequence[MultimodalModel]) -> list[ZeroExpertRouter]:
    """This rank's routers; none on a rank whose layers another one speaks for."""
    here = engine.ranks()
    return [] if here.data_rank or here.tensor_rank or here.context_rank else list(routers(models).values())


def squared_bias(models: Sequence[MultimodalModel]) -> float:
    """Σ b² over this rank's routers; summed over all ranks it is the whole model's."""
    return sum(float(router.e_score_correction_bias.square().sum()) for router in _spoken_for(models))


@torch.no_grad()
def row_similarity(models: Sequence[MultimodalModel]) -> float:
    """The mean cosine of two different rows of a router, of N + Z, summed over this rank's routers and divided by the
    layers of the whole model; summed over all ranks it is their mean (arXiv 2509.01322, on router
    stability)."""
    total = 0.0
    for router in _spoken_for(models):
        rows = torch.nn.functional.normalize(router.weight.double(), dim=1)
        count = rows.size(0)
        # ‖Σ u‖² = Σ u·u over equal and different pairs; the equal ones give 1 each.
        total += (float(rows.sum(0).square().sum()) - count) / (count * (count - 1))
    return total / models[0].config.num_layers


def set_measuring(models: Sequence[MultimodalModel], measure: bool) -> None:
    """Whether the routers' next backward measures gradients (:meth:`ZeroExpertRouter.measure`)."""
    for router in routers(models).values():
        router.measures = measure


def steer(models: Sequence[MultimodalModel], tallies: Tensor, rate: float) -> None:
    """Moves the biases of this rank's routers by ``tallies``, fp64 [layers, Tally.width], summed over all ranks."""
    for layer, router in routers(models).items():
        if router.weight.requires_grad:  # else it is frozen, and its bias with it
            steer_router(router, tallies[layer], rate)


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
    counted = Tally.of(tally, moe)
    chosen = counted.selections[: moe.experts] / (moe.top_k * counted.tokens.clamp(min=1))
    wanted = moe.active_experts / (moe.top_k * moe.experts)
    error = wanted - chosen
    bound = moe.bias_integral_limit * wanted
    router.bias_error_sum.copy_((router.bias_error_sum + error).clamp(-bound, bound))
    beside = moe.bias_integral_gain * router.bias_error_sum + moe.bias_derivative_gain * (error - router.bias_error)
    router.bias_error.copy_(error)
    router.e_score_correction_bias[: moe.experts] += (rate * (error + beside)).float()
