"""Steps whose gradient was not applied: whose fault they were, and how many may come in a row."""

from __future__ import annotations

from torch import Tensor

from fusiontree.data.batch import StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError


def name_nonfinite(engine: Engine, train_data: TrainingData, batch: StepBatch, losses: list[Tensor]) -> str:
    """Say which ranks had a loss or a gradient that is not finite, and on which rows; all ranks call this together.

    A gradient broken on one rank is broken on each after the reduction; only the rank itself can say that it was its
    own, and from whose rows.

    Args:
        engine: the engine that did the step.
        train_data: describes rows.
        batch: this rank's part of the step.
        losses: of this rank's micro batches, before any sum over ranks.

    Returns:
        Something like ``loss not finite on rank 3: row 17 (shards/a.tar, from token 512)``, or an empty string.
    """
    finite_losses = [bool(loss.isfinite()) for loss in losses]
    gradients = engine.finite_passes()
    finite_gradients = gradients if len(gradients) == len(losses) else [True] * len(losses)
    parts = []
    for what, finite in (("loss", finite_losses), ("gradient", finite_gradients)):
        rows = sorted(
            int(row)
            for micro, good in zip(batch.micro_batches, finite, strict=True)
            if not good
            for row in micro.rows_B[micro.row_weight_B > 0]
        )
        if rows:
            shown = ", ".join(train_data.describe_row(row) for row in rows[:4])
            more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
            parts.append(f"{what} not finite on rank {engine.rank}: {shown}{more}")
            break  # a broken loss has a broken gradient
    return "; ".join(text for text in engine.gather_text("; ".join(parts)) if text)


def check_skips(step: int, in_a_row: int, reason: str, config: TrainingConfig) -> None:
    """Refuse to go on when too many steps in a row could not be applied.

    Raises:
        UserError: ``in_a_row`` is more than ``training.max_skipped_steps``.
    """
    if in_a_row > config.max_skipped_steps:
        raise UserError(
            f"step {step}: {in_a_row} steps in a row were skipped ({reason}), more than training.max_skipped_steps "
            f"{config.max_skipped_steps}; lower the learning rate or resume from an earlier checkpoint"
        )
