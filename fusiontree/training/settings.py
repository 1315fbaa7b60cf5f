"""The configuration of a run and what training derives from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusiontree.config.root import Config
from fusiontree.supervision.limits import TimeLimits, time_limits
from fusiontree.training.config import TrainingConfig
from fusiontree.training.initial_state import InitialState
from fusiontree.training.losses import LossWeights


@dataclass(frozen=True)
class RunSettings:
    """The configuration of a run, and what training needs to know of model and device."""

    config: Config
    values: dict[str, Any]
    """The configuration as plain values, for checkpoints and experiment trackers."""
    flops_per_token: Callable[[list[int]], float]
    """Model FLOPs of training per token, forward and backward, averaged over documents of the given lengths."""
    peak_flops: float | None
    """Peak dense FLOP/s of one device at the run's precision, or None where it is not known."""
    extra_files: Sequence[Path] = ()
    """Small files that every checkpoint carries: the tokenizer."""
    initial: InitialState | None = None
    """The checkpoint that the run starts from, unless it resumes."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)

    @property
    def training(self) -> TrainingConfig:
        """The section ``training``."""
        return self.config.training

    @cached_property
    def limits(self) -> TimeLimits:
        """Time limits of sections."""
        return time_limits(self.config)

    @property
    def last_step(self) -> int:
        """The step after which this start ends."""
        return min(self.training.max_steps, self.training.exit_at_step or self.training.max_steps)

    def is_logged(self, step: int) -> bool:
        """Return whether the metrics of ``step`` are written."""
        interval = self.config.logging.log_interval
        return (interval > 0 and step % interval == 0) or step == self.last_step

    @property
    def all_layer_metrics(self) -> tuple[str, ...]:
        """Names of the layer metrics of logged steps."""
        return tuple(self.config.logging.layer_metrics)

    def layer_metrics(self, step: int) -> tuple[str, ...]:
        """Return the layer metrics to compute in ``step``."""
        return self.all_layer_metrics if self.is_logged(step) else ()

    @cached_property
    def loss_weights(self) -> LossWeights:
        """Coefficients of the loss terms."""
        model, training = self.config.model, self.config.training
        return LossWeights(
            load_balance=model.load_balance_coeff,
            entropy=model.entropy_reg_coeff,
            z_loss=model.z_loss_coeff,
            gate_target=training.gate_target,
            gate_margin=training.gate_margin,
            distillation=training.teacher_weight if training.teacher else 0.0,
        )
