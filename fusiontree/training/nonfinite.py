"""Steps with a non-finite loss or gradient: the ranks and rows that caused it, and how many may be consecutive."""

from __future__ import annotations

from torch import Tensor

from fusiontree.data.batch import StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError


def name_nonfinite(engine: Engine, train_data: TrainingData, batch: StepBatch, losses: list[Tensor]) -> str:
    """Return which ranks had a non-finite loss or gradient, and on which rows; all ranks call this together.

    The reduction spreads a non-finite gradient from one rank to all. So each rank reports what it found before the
    reduction.

    Args:
        engine: the engine that executed the step.
        train_data: describes rows.
        batch: this rank's part of the step.
        losses: of this rank's micro-batches, before any sum over ranks.

    Returns:
        For example ``loss not finite on rank 3: row 17 (shards/a.tar, from token 512)``; empty if no rank reports.
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
            break  # a non-finite loss makes its gradient non-finite
    return "; ".join(text for text in engine.gather_text("; ".join(parts)) if text)


def check_skips(step: int, in_a_row: int, reason: str, config: TrainingConfig) -> None:
    """Check the number of consecutive steps that were skipped for a non-finite gradient.

    Raises:
        UserError: ``in_a_row`` is more than ``training.max_skipped_steps``.
    """
    if in_a_row > config.max_skipped_steps:
        raise UserError(
            f"step {step}: {in_a_row} steps in a row were skipped ({reason}), more than training.max_skipped_steps "
            f"{config.max_skipped_steps}; lower the learning rate or resume from an earlier checkpoint"
        )
