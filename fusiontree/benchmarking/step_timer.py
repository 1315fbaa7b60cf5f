"""Times the steps of training: the trainer's own :class:`StepPipeline`, without checkpoints, validation and records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.training.metrics import step_metrics
from fusiontree.training.pipeline import StepPipeline
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.step import TrainStep, document_lengths


@dataclass(frozen=True)
class StepTimes:
    """Measurements of consecutive steps."""

    seconds: list[float]
    """Time between the ends of consecutive steps on the device."""
    grad_norm: float
    """Gradient norm of the last step."""
    loss: float
    """Loss of the last step, in nats per token."""
    document_lengths: list[int]
    """Tokens of each document in this rank's rows, over all steps."""


class StepTimer:
    """Executes training steps on consecutive batches and times them."""

    def __init__(self, settings: RunSettings, engine: Engine, data: TrainingData, *, one_document: bool) -> None:
        """Open the stream of batches.

        Args:
            settings: the run's configuration.
            engine: executes the steps.
            data: yields the batches.
            one_document: take every row as one document.
        """
        watchdog = Watchdog(settings.run_dir, engine.rank, engine.world_size)  # not started: no step has a time limit
        spikes = SpikeFilter(settings.training.spikes)
        step = TrainStep(settings, engine, data, watchdog, spikes)
        self._settings, self._engine = settings, engine
        self._batches = self._read(data, one_document)
        self._pipeline = StepPipeline(step, engine, data, watchdog, spikes, partial(next, self._batches))
        self._number = 0

    def next_micro_batch(self) -> MicroBatch:
        """Return the first micro-batch of the next step, which is not timed any more."""
        return next(self._batches).micro_batches[0]

    def run(self, steps: int) -> StepTimes:
        """Execute ``steps`` steps; as in training, a step's results are read while the device has the next one."""
        device = self._engine.device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, lengths, grad_norm, loss = list[float](), list[int](), math.nan, math.nan
        for index in range(steps + 1):
            if index < steps:
                self._number += 1
                finished = self._pipeline.submit(self._number)
            else:
                finished = self._pipeline.drain()
            if finished is not None:
                # as the trainer logs a step
                loss = step_metrics(finished, self._settings, self._engine.world_size, device)["lm_loss"]
                seconds.append(finished.device_s)
                lengths += document_lengths(_counted(finished.batch))
                grad_norm = finished.grad_norm
        return StepTimes(seconds, grad_norm, loss, lengths)

    @staticmethod
    def _read(data: TrainingData, one_document: bool) -> Iterator[StepBatch]:
        for batch, _ in data.steps():
            if one_document:
                like = batch.micro_batches[0].positions_BS
                whole_BS = torch.arange(like.shape[1]).expand_as(like).contiguous()
                batch = replace(batch, micro_batches=[replace(m, positions_BS=whole_BS) for m in batch.micro_batches])
            yield batch


def _counted(batch: StepBatch) -> StepBatch:
    """Leave out rows without weight (damaged, or fillers): they are computed and are not part of the global batch."""
    kept = [replace(m, positions_BS=m.positions_BS[m.row_weight_B > 0]) for m in batch.micro_batches]
    return replace(batch, micro_batches=kept)
