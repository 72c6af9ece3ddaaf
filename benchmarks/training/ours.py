"""The model whose step is measured, with its weights, one batch and the two routings: as drawn, and balanced."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.training import parts_of
from mmoe.models.multimodal import MultimodalModel, build_stages
from mmoe.parallel import engine
from mmoe.recipe.model import Longcat, Model, MoE
from mmoe.recipe.schema import Data, Optimizer, Parallel, Precision, Recipe, Train
from mmoe.train import controller
from mmoe.train.step import Outcome, Stepper

ROUTINGS = ("balanced", "real")


def recipe(
    *,
    quick: bool,
    dtype: str = "float32",
    packs: int = 4,
    sequence: int | None = None,
    zero_experts: int | None = None,
    parallel: Parallel | None = None,
) -> Recipe:
    """A proxy in LongCat-Flash's proportions: dense FFN 2 D, experts D / 3, half as many zero experts as FFN experts, 8
    of 12 selections for FFN experts; a quarter of its experts and a twelfth of its width.

    ``packs`` sequences are a micro-batch of a rank, and the step's only one.
    """
    if quick:
        width, heads, experts, active, expert_width, vocab, length = 64, 2, 8, 4, 32, 128, 32
    else:
        width, heads, experts, active, expert_width, vocab, length = 512, 8, 128, 8, 168, 8192, 512
    backbone = Longcat(
        vocab_size=vocab,
        hidden_size=width,
        layers=2,
        heads=heads,
        q_lora_rank=width // 4,
        kv_lora_rank=width // 8,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        ffn_hidden_size=2 * width,
    )
    zeros = experts // 2 if zero_experts is None else zero_experts
    moe = MoE(
        experts=experts,
        zero_experts=zeros,
        top_k=active * 3 // 2,
        expert_hidden_size=expert_width,
        routed_scaling_factor=6.0,
        active_experts=float(active),
        bias_rate=0.0,
    )
    layout = parallel or Parallel()
    return Recipe(
        name="bench",
        model=Model(backbone=backbone, moe=moe),
        data=Data(mixture="none", sequence_length=sequence or length),
        train=Train(steps=1, global_batch=packs * layout.expert, micro_batch=packs),
        # So small that the routing stays what it is however many steps are measured; the work does not depend on it.
        optimizer=Optimizer(lr=1e-7, weight_decay=0.1),
        precision=Precision(dtype="bf16" if dtype == "bfloat16" else "fp32"),
        parallel=layout,
    )


def batch(settings: Recipe, seed: int = 0) -> dict[str, Any]:
    """A micro-batch of plain sequences of random tokens, all of which carry loss."""
    b, s = settings.train.micro_batch, settings.data.sequence_length
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, settings.model.backbone.vocab_size, (b, s + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(b, s),
        "position": torch.arange(s).expand(b, s),
        "document": torch.ones(b, s, dtype=torch.int32),
        "branch": torch.zeros(b, s, dtype=torch.int32),
        "images": {},
        "original_sizes": torch.zeros(0, 2, dtype=torch.int64),
        "samples": [["random"]] * b,
        "skipped": [],
    }


class Ours:
    """Model, optimizer and batch of a recipe, ready to step again and again on the same batch."""

    def __init__(self, settings: Recipe, *, balanced: bool) -> None:
        here = engine.start(settings.parallel, settings.train.seed)
        self.recipe = settings
        (self.model,) = build_stages(settings)
        self.batch = batch(settings, seed=here.rank)
        self.tokens = self.batch["tokens"].numel()
        if balanced:
            balance(self.model, self.batch)
        self.stepper = Stepper(settings, [self.model])

    def step(self) -> Outcome:
        return self.stepper.step(self._once(), self.recipe.optimizer.lr)

    def _once(self) -> Iterator[dict[str, Any]]:
        return itertools.repeat(self.batch, 1)

    def active_experts(self) -> float:
        """Mean FFN experts a token of the batch, over layers, without a change to the weights."""
        _, moe = parts_of(self.recipe.model)
        ids = [scores.add(bias).topk(moe.top_k).indices for scores, bias in routings(self.model, self.batch)]
        return float((torch.stack(ids) < moe.experts).sum(-1).double().mean())


@torch.no_grad()
def routings(model: MultimodalModel, data: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Of every layer: scores [T, N + Z] and selection bias."""
    routers = list(controller.routers([model]).values())
    seen: dict[int, Tensor] = {}

    def look(router: Any, arguments: tuple[Tensor, Tensor]) -> None:
        seen[id(router)] = torch.nn.functional.linear(arguments[0].float(), router.weight).softmax(-1)

    hooks = [router.register_forward_pre_hook(look) for router in routers]
    try:
        model.eval()
        model.hidden(data)
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return [(seen[id(router)], router.e_score_correction_bias) for router in routers]


@torch.no_grad()
def balance(model: MultimodalModel, data: dict[str, Any], rounds: int = 400) -> None:
    """Sets the selection biases so that every FFN expert gets K_e T / N of the batch's selections, in every layer.

    The controller's rule with a rate that falls to nothing, on the scores of one batch; a layer's scores depend on the
    biases of the layers below it, so the layers are done in turn.
    """
    config: Any = model.config
    moe = config.moe
    for layer in range(config.num_layers):
        scores, bias = routings(model, data)[layer]
        slots = moe.experts + moe.zero_experts
        wanted = moe.active_experts / (moe.top_k * moe.experts)
        spread = float(scores.std())
        for turn in range(rounds):
            ids = scores.add(bias).topk(moe.top_k).indices
            share = ids.view(-1).bincount(minlength=slots)[: moe.experts] / ids.numel()
            rate = 2.0 * spread / wanted * (1 - turn / rounds) ** 2
            bias[: moe.experts] += (rate * (wanted - share)).clamp(-spread, spread)
