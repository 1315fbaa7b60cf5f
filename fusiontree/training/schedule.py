"""Learning rate as a function of the step alone, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from fusiontree.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (the first step is 1).

    Warm-up rises linearly to the peak at ``warmup_steps``. Then, with progress p from 0 to 1 over the remaining
    steps and floor r = min_lr_ratio: cosine r + (1-r)(1 + cos πp)/2; linear 1 - (1-r)p; wsd stays at 1 and falls
    linearly to r over the last ``decay_steps``; constant stays at 1.
    """
    peak, floor = config.learning_rate, config.min_lr_ratio
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.lr_scheduler == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.lr_scheduler == "linear":
        return peak * (1 - (1 - floor) * progress)
    if config.lr_scheduler == "wsd":
        decay = config.decay_steps or max(1, config.max_steps // 10)
        fall = min(1.0, max(0.0, (step - (config.max_steps - decay)) / decay))
        return peak * (1 - (1 - floor) * fall)
    return peak
