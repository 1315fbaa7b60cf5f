"""The whole configuration of a run."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.data.config import DataConfig
from fusiontree.evaluation.config import EvaluationConfig
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.config import ParallelConfig
from fusiontree.supervision.config import SupervisionConfig
from fusiontree.tracking.config import LoggingConfig
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.settings import PathText, Section, setting


class Config(Section):
    """A run: one YAML file with these sections, then ``section.key=value`` overrides."""

    run_dir: PathText = setting(..., "Folder of the run; starting again with the same folder resumes it.")
    plugins: list[str] = setting(
        list,
        "Python modules (dotted names, or paths that end in .py) to import first; they register mixers, optimizers, "
        "metrics, token sources or evaluation tasks.",
    )
    model: ModelConfig = setting(..., "Shape of the model.")
    parallel: ParallelConfig = setting(ParallelConfig, "Layout over processes.")
    training: TrainingConfig = setting(..., "Batch, optimizer, schedule, precision.")
    supervision: SupervisionConfig = setting(SupervisionConfig, "Health checks, time limits, restarts.")
    data: DataConfig = setting(..., "Token shards.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "Interval and retention of checkpoints.")
    logging: LoggingConfig = setting(LoggingConfig, "Metrics, console and experiment trackers.")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "Tasks and data of fusiontree.evaluate.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"training.seq_len {self.training.seq_len} is longer than model.max_position_embeddings "
                f"{self.model.max_position_embeddings}; raise the latter or shorten the rows"
            )
        if self.training.validation.interval and not self.data.validation:
            raise ValueError(
                "training.validation.interval is set and data.validation is not; name a split or set the interval to 0"
            )
        return self
