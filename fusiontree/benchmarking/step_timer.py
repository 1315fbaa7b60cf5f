"""Times the steps of training: the trainer's own :class:`TrainStep`, without checkpoints, validation and records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch

from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.training.measurements import document_lengths
from fusiontree.training.settings import RunSettings
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.step import PendingStep, TrainStep
from fusiontree.utils.device import Mark


@dataclass(frozen=True)
class StepTimes:
    """Measurements of consecutive steps."""

    seconds: list[float]
    """Time between the ends of consecutive steps on the device."""
    grad_norm: float
    """Gradient norm of the last step."""
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
        self._step = TrainStep(settings, engine, data, watchdog, SpikeFilter(settings.training.spikes))
        self._device = engine.device
        self._batches = self._read(data, one_document)
        self._number, self._tokens = 0, 0

    def next_micro_batch(self) -> MicroBatch:
        """Return the first micro-batch of the next step, which is not timed any more."""
        return next(self._batches).micro_batches[0]

    def run(self, steps: int) -> StepTimes:
        """Execute ``steps`` steps; as in training, a step's results are read while the device has the next one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        marks, lengths = [Mark(self._device)], list[int]()
        pending: PendingStep | None = None
        for _ in range(steps):
            batch = next(self._batches)
            lengths += document_lengths(_counted(batch))
            self._number += 1
            read_before = partial(self._finish, pending)
            pending = self._step.run(self._number, batch, stop_wanted=False, limit=0.0, overlap_work=read_before)
            marks.append(pending.ended)
        assert pending is not None
        self._finish(pending)
        seconds = [end.seconds_since(start) for start, end in pairwise(marks)]
        return StepTimes(seconds, pending.result.grad_norm, lengths)

    def _finish(self, done: PendingStep | None) -> None:
        """Read the results of a step as the trainer does to log them."""
        if done is not None:
            self._tokens += done.counts().tokens
            self._step.values(done, self._tokens)

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
