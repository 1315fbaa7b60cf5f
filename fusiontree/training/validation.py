"""Loss on held-out data."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusiontree.data.validation import ValidationData
from fusiontree.engines.base import Engine
from fusiontree.training.settings import RunSettings
from fusiontree.training.step import step_inputs


class ValidationLoss(NamedTuple):
    """Result of a validation."""

    loss: float
    """Mean cross entropy per token, in nats."""
    tokens: int
    """Labels that count, over all ranks."""


def validate(engine: Engine, data: ValidationData, settings: RunSettings) -> ValidationLoss:
    """Return the loss on the validation data; all ranks call this together."""
    sums = torch.zeros(2, dtype=torch.float64)
    for micro in data.micro_batches():
        sums[0] += engine.evaluate(step_inputs(micro, settings, step=None)).double().cpu()
        sums[1] += (micro.labels_BS >= 0).sum()
    on_device = sums.to(engine.device)
    loss_sum = float(engine.sum_over_tokens(on_device[:1].clone()))
    tokens = float(engine.sum_over_rows(on_device[1:].clone()))
    return ValidationLoss(loss_sum / max(tokens, 1.0), int(tokens))
