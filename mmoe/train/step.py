"""One optimizer step: micro-batches forward and backward, the decision to take or skip it, the controller."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmoe.data.batch import to_device
from mmoe.errors import UserError
from mmoe.layers import fp8
from mmoe.layers.roles import lr_multiplier, role_of
from mmoe.layers.router import Tally
from mmoe.models.multimodal import MultimodalModel
from mmoe.parallel import cpu_platform, engine
from mmoe.parallel import optimizer as adam
from mmoe.recipe.schema import Optimizer, Recipe
from mmoe.train import controller


@dataclass(frozen=True)
class Outcome:
    """What a step did, the same on every rank but for ``suspects``. Losses in nats per token that carries loss.

    ``loss`` is NaN where no token of the global batch carries any; such a step is not taken either.
    """

    taken: bool
    loss: float
    balance_loss: float
    hidden_z_loss: float
    mtp_loss: float
    """Per token that has one; not weighted. NaN without."""
    grad_norm: float
    bias_norm: float
    """Of the selection bias of all routers, as it stood during the step."""
    tokens: int
    samples: int
    skipped_samples: int
    interrupted: bool
    tallies: Tensor
    """fp64 [layers, Tally.width], summed over ranks: see mmoe.layers.router; [0, 0] for a dense model."""
    row_similarity: float
    """Mean cosine of two rows of a router, where the step measured; else 0."""
    suspects: list[str]
    """The samples of this rank's micro-batches whose loss was not finite."""


RECORD = 5
"""Numbers that a micro-batch leaves: loss summed, tokens with loss, tokens, samples, samples skipped."""


def _forward(batches: Iterator[dict[str, Any]], model: torch.nn.Module, *, suspects: list[str]) -> tuple[Tensor, Any]:
    batch = to_device(next(batches), cpu_platform.device())

    def loss(losses_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.tensor(losses_n.numel(), dtype=torch.int, device=losses_n.device)
        here = engine.ranks()
        record = [
            float(losses_n.detach().double().sum()),
            losses_n.numel(),
            int((batch["document"] > 0).sum()) * here.has_batch,
            sum(len(pack) for pack in batch["samples"]) * here.has_batch,
            len(batch["skipped"]) * here.has_batch,
        ]
        if not math.isfinite(record[0]):
            suspects.extend(name for pack in batch["samples"] for name in pack)
        # Tensor-parallel ranks have the same losses: one of them counts.
        return (
            losses_n.sum(),
            count,
            torch.tensor(record, dtype=torch.float64) if here.has_losses else torch.zeros(RECORD),
        )

    return model(batch), loss


def freeze(models: Sequence[torch.nn.Module], names: Sequence[str], rated: Sequence[str] = ()) -> None:
    """Takes the parameters of the modules called ``names`` out of training, before anything is made for their
    gradients; ``rated`` are those with a learning rate of their own. Called by all ranks together.

    Raises:
        UserError: no rank has a module of one of these names, or nothing is left to train.
    """
    keys = [("train.frozen", name) for name in names] + [("optimizer.modules", name) for name in rated]
    found, left = torch.zeros(len(keys)), torch.zeros(1)
    for model in models:
        for name, parameter in model.named_parameters():
            matches = [i for i, (_, module) in enumerate(keys) if f"{name}.".startswith(f"{module}.")]
            found[matches] += 1
            if matches and matches[0] < len(names):
                parameter.requires_grad_(False)
            left += parameter.requires_grad
    counts = engine.sum_over_world(torch.cat((found, left)).to(cpu_platform.device()))
    for (key, module), count in zip(keys, counts[:-1].tolist(), strict=True):
        if not count:
            known = sorted({name.split(".")[0] for model in models for name, _ in model.named_parameters()})
            raise UserError(f"the model has no module {module!r}", key, f"name one in {', '.join(known)}")
    if not counts[-1]:
        raise UserError("every module is frozen: nothing is left to train", "train.frozen", "thaw one")


def module_factor(name: str, settings: Optimizer) -> float:
    """The learning rate of the parameter ``name`` over ``settings.lr``."""
    holding = [module for module in settings.modules if f"{name}.".startswith(f"{module.name}.")]
    longest = max(holding, key=lambda module: len(module.name), default=None)
    return longest.lr / settings.lr if longest else 1.0


class Stepper:
    """This rank's pipeline stages (:func:`mmoe.models.multimodal.build_stages`) and optimizer, ready to step."""

    def __init__(self, recipe: Recipe, models: Sequence[MultimodalModel]) -> None:
        self.recipe = recipe
        self.models = list(models)
        freeze(self.models, recipe.train.frozen, [module.name for module in recipe.optimizer.modules])
        config, sharded = self.models[0].config, recipe.parallel.distributed_optimizer
        self.wrapped = engine.prepare(self.models, config, distributed_optimizer=sharded)
        self.optimizer: Any = adam.build(
            recipe.optimizer,
            self.wrapped,
            config,
            distributed=sharded,
            lr_multiplier=lambda name: lr_multiplier(role_of(name), recipe) * module_factor(name, recipe.optimizer),
        )
        self.micro_batches = recipe.train.global_batch // (recipe.train.micro_batch * engine.ranks().data_size)

    def step(
        self,
        batches: Iterator[dict[str, Any]],
        rate: float,
        interrupted: Callable[[], bool] = lambda: False,
        bias_rate: float | None = None,
        measure: bool = False,
    ) -> Outcome:
        """Consumes this rank's micro-batches of one global batch and updates the weights with learning rate ``rate``,
        the routers' selection bias with ``bias_rate`` (the recipe's, if None). ``measure``: gradients of the routers'
        probabilities go into the tallies too, and their rows are compared.

        A loss or a gradient norm that is not finite on any rank makes all ranks skip the update together: weights,
        optimizer and controller stay as they were. ``interrupted`` is asked once the micro-batches are done; True on
        any rank comes back as True on all.
        """
        suspects: list[str] = []
        for model in self.wrapped:
            model.train()
        controller.set_measuring(self.models, measure)
        records = engine.forward_backward(
            self.wrapped,
            self.optimizer,
            functools.partial(_forward, suspects=suspects),
            batches,
            self.micro_batches,
            self.recipe.data.sequence_length,
            self.recipe.train.micro_batch,
        )
        tallies = controller.take_tallies(self.models)
        local = tallies.new_zeros(RECORD + 6)
        if records:
            local[:RECORD] = torch.stack(records).sum(0)
        local[RECORD] = controller.squared_bias(self.models)
        local[RECORD + 1] = controller.row_similarity(self.models) if measure else 0.0
        local[RECORD + 2 : RECORD + 5] = sum(model.language.take_auxiliary() for model in self.models)
        local[-1] = float(interrupted())
        sums = engine.sum_over_world(torch.cat((local, tallies.flatten())))
        loss_sum, loss_tokens, tokens, samples, skipped = sums[:RECORD].tolist()
        squared_bias, similarity, hidden_z, ahead_sum, ahead_tokens, stop = sums[RECORD : local.numel()].tolist()
        tallies = sums[local.numel() :].view_as(tallies)
        loss = loss_sum / loss_tokens if loss_tokens else math.nan

        taken, grad_norm = False, math.nan
        if math.isfinite(loss):
            taken, grad_norm = adam.update(self.optimizer, rate)
        fp8.end_step(self.models, taken)
        moe = self.recipe.model.moe
        if taken and moe is not None:
            controller.steer(self.models, tallies, moe.bias_rate if bias_rate is None else bias_rate)
        return Outcome(
            taken=taken,
            loss=loss,
            balance_loss=float(Tally.of(tallies, moe).balance_loss.sum()) / max(loss_tokens, 1) if moe else 0.0,
            hidden_z_loss=hidden_z / max(loss_tokens, 1),
            mtp_loss=ahead_sum / ahead_tokens if ahead_tokens else math.nan,
            grad_norm=grad_norm,
            bias_norm=math.sqrt(squared_bias),
            tokens=int(tokens),
            samples=int(samples),
            skipped_samples=int(skipped),
            interrupted=stop > 0,
            tallies=tallies,
            row_similarity=similarity,
            suspects=suspects,
        )
