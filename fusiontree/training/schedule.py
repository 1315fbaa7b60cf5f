"""Functions of the step number: learning rate and dropped branches. So a resume needs no state of the schedule.

Shape legend: L layers, B rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusiontree.training.config import TrainingConfig
from fusiontree.utils.hashing import stable_uniform


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
        decay = config.decay_steps or max(1, min(config.max_steps // 10, span))
        fall = min(1.0, max(0.0, (step - (config.max_steps - decay)) / decay))
        return peak * (1 - (1 - floor) * fall)
    return peak


def branch_scale(rows: list[int], *, layers: int, probability: float, seed: int, step: int) -> Tensor | None:
    """Return the factors ``[L, B, 2]`` of the (first, second) branch outputs, or None if nothing can be dropped.

    A row loses one branch of a layer with ``probability``, each branch equally often, never both. The factor is 0 or 1;
    the other branch is not rescaled, as the gate mixes and does not sum. It depends on seed, step, row and layer alone,
    so every layout drops the same branches.

    Args:
        rows: global numbers of the batch's rows.
        layers: number of blocks.
        probability: chance of a drop for each row and layer.
        seed: the run's seed.
        step: optimizer step.
    """
    if not probability:
        return None
    scale_LB2 = torch.ones(layers, len(rows), 2)
    for layer in range(layers):
        for index, row in enumerate(rows):
            draw = stable_uniform("branch_dropout", seed, step, row, layer)
            if draw < probability:
                scale_LB2[layer, index, 0 if draw < probability / 2 else 1] = 0.0
    return scale_LB2
