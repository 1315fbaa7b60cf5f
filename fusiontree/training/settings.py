"""What the training loop needs to know of a run's configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.training.config import LoggingConfig, TrainingConfig
from fusiontree.training.losses import LossWeights


@dataclass(frozen=True)
class RunSettings:
    """The parts of the configuration the loop reads, and the whole of it as plain values for the checkpoint."""

    run_dir: Path
    training: TrainingConfig
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
