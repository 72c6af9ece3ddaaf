"""The learning rate as a pure function of the step: nothing to checkpoint."""

import math

from mmoe.recipe.schema import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine from ``lr`` down to ``min_lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.min_lr + 0.5 * (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0)))
