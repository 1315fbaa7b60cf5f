"""Loss on held-out data."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusiontree.data.validation import ValidationData
from fusiontree.engines.base import Engine
from fusiontree.tracking.console import Console
from fusiontree.tracking.records import Records


class ValidationLoss(NamedTuple):
    """Result of a validation."""

    loss: float
    """Mean cross entropy per token, in nats."""
    tokens: int
    """Labels that count, over all ranks."""


class Validation:
    """Computes the loss on every validation set; shows and records it. The loss on the first set is the run's."""

    def __init__(self, engine: Engine, sets: dict[str, ValidationData], records: Records, console: Console) -> None:
        """Validate on ``sets``, datasets by name."""
        self.engine, self.sets, self.records, self.console = engine, sets, records, console
        self.last: tuple[int, float] | None = None
        """Step and loss of the last validation."""

    def run(self, step: int, tokens: int) -> None:
        """Validate after ``step``, at which the run has seen ``tokens``; all ranks call this together."""
        values: dict[str, float] = {}
        for name, data in self.sets.items():
            loss, labels = validate(self.engine, data)
            if not values:
                self.last, values = (step, loss), data.metrics("", loss, labels)
            values |= data.metrics(name, loss, labels)
            self.console.validated(step, loss, labels, name)
        if values:
            self.records.metrics({"step": step, "tokens": tokens, **values})


def validate(engine: Engine, data: ValidationData) -> ValidationLoss:
    """Return the loss on one dataset; all ranks call this together."""
    sums = torch.zeros(2, dtype=torch.float64)
    for micro in data.micro_batches():
        sums[0] += engine.evaluate(micro).double().cpu()
        sums[1] += (micro.labels_BS >= 0).sum()
    on_device = sums.to(engine.device)
    loss_sum = float(engine.sum_over_tokens(on_device[:1].clone()))
    tokens = float(engine.sum_over_rows(on_device[1:].clone()))
    return ValidationLoss(loss_sum / max(tokens, 1.0), int(tokens))
