"""What the training loop needs to know of a run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.models.config import ModelConfig
from fusiontree.supervision.config import SupervisionConfig
from fusiontree.tracking.config import LoggingConfig
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import LossWeights


@dataclass(frozen=True)
class RunSettings:
    """The parts of the configuration the loop reads, and the whole of it as plain values for the checkpoint."""

    run_dir: Path
    training: TrainingConfig
    supervision: SupervisionConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    values: dict[str, Any]
    loss_weights: LossWeights
    num_layers: int
    drop_branch_prob: float
    flops_per_token: Callable[[list[int]], float]
    """Model FLOPs of training on one token, forward and backward, averaged over documents of these lengths."""
    peak_flops: float | None
    """Peak dense FLOP/s of one device at the run's precision, or None where it is not known."""
    extra_files: list[Path]
    """Small files that every checkpoint carries: the tokenizer."""

    @classmethod
    def of(
        cls,
        *,
        run_dir: Path,
        model: ModelConfig,
        training: TrainingConfig,
        supervision: SupervisionConfig,
        checkpoint: CheckpointConfig,
        logging: LoggingConfig,
        values: dict[str, Any],
        flops_per_token: Callable[[list[int]], float],
        peak_flops: float | None,
        extra_files: Sequence[Path] = (),
    ) -> RunSettings:
        """Return the settings of a configuration, given by its sections; the arguments are the fields."""
        weights = LossWeights(
            load_balance=model.load_balance_coeff,
            entropy=model.entropy_reg_coeff,
            z_loss=model.z_loss_coeff,
            gate_target=training.gate_target,
            gate_margin=training.gate_margin,
        )
        return cls(
            run_dir=run_dir,
            training=training,
            supervision=supervision,
            checkpoint=checkpoint,
            logging=logging,
            values=values,
            loss_weights=weights,
            num_layers=model.num_layers,
            drop_branch_prob=model.drop_branch_prob,
            flops_per_token=flops_per_token,
            peak_flops=peak_flops,
            extra_files=list(extra_files),
        )
