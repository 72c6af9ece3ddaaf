"""Rates as pure functions of the step: nothing to checkpoint. ``step`` counts from 0 to ``steps`` − 1."""

import math

from mmoe.recipe.model import MoE
from mmoe.recipe.schema import Optimizer


def _half_cosine(first: float, last: float, progress: float) -> float:
    """From ``first`` at progress 0 to ``last`` at 1 and behind it."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from ``lr`` down to ``min_lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return _half_cosine(settings.lr, settings.min_lr, progress)


def batch_factor(settings: Optimizer, global_batch: int) -> float:
    """What every learning rate is multiplied by at ``global_batch`` packs a step."""
    return 1.0 if settings.reference_batch is None else math.sqrt(global_batch / settings.reference_batch)


def bias_rate(settings: MoE, step: int, steps: int) -> float:
    """μ of the bias controller: ``bias_rate``, or a cosine from there to ``bias_rate_min`` at the last step."""
    if settings.bias_rate_min is None:
        return settings.bias_rate
    return _half_cosine(settings.bias_rate, settings.bias_rate_min, step / max(1, steps - 1))
