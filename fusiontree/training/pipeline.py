"""Reads the results of each step while the device executes the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from fusiontree.data.batch import StepBatch
from fusiontree.data.loader import TrainingData
from fusiontree.engines.base import Engine
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.training.nonfinite import name_nonfinite
from fusiontree.training.spikes import SpikeFilter
from fusiontree.training.step import PendingStep, TrainStep
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums
from fusiontree.utils.device import Mark


@dataclass(frozen=True)
class FinishedStep:
    """Results of an optimizer step, on the host."""

    number: int
    """The first step is 1."""
    batch: StepBatch
    """This rank's part of the global batch."""
    learning_rate: float
    counts: StepCounts
    token_sums: TokenSums
    row_sums: RowSums
    grad_norm: float
    skipped: str | None
    """Why the step changed no parameter, or None."""
    is_spike: bool
    """The step was skipped because its loss is a spike."""
    tokens: int
    """Tokens trained on up to this step: the labels of all steps that were not skipped."""
    device_s: float
    """Seconds on the device, from the end of the previous step or, after a pause, from this step's own begin."""
    host_s: float
    """Seconds on the host, from the begin of this step to the begin of the next step or of a pause."""
    own_s: float
    """Seconds before the step's first collective: this rank's data loading and host work."""


class BatchStream:
    """The batches of a run from a position in the data on."""

    def __init__(self, data: TrainingData) -> None:
        """Read nothing before :meth:`seek`."""
        self._data = data
        self._batches: Generator[tuple[StepBatch, dict[str, Any]]] | None = None
        self.position: dict[str, Any] | None = None
        """Position after the last batch, as a checkpoint stores it."""

    def seek(self, position: dict[str, Any] | None) -> None:
        """Continue at ``position``; None is the begin of the data."""
        if self._batches is not None:
            self._batches.close()  # ends its threads
        self.position = position
        self._batches = self._data.steps(position)

    def next(self) -> StepBatch:
        """Return this rank's part of the next global batch."""
        assert self._batches is not None
        batch, self.position = next(self._batches)
        return batch


@dataclass(frozen=True)
class _Queued:
    step: PendingStep
    device_began: Mark
    began: float
    ended: float


class StepPipeline:
    """Queues steps on the device and returns them when their results are on the host.

    The results of step n are read after the backward passes of step n + 1 were queued, so the device never waits for
    the host. They are read before the optimizer step of n + 1, so that its loss is judged by all earlier losses.
    """

    def __init__(
        self,
        step: TrainStep,
        engine: Engine,
        train_data: TrainingData,
        watchdog: Watchdog,
        spikes: SpikeFilter,
        next_batch: Callable[[], StepBatch],
    ) -> None:
        """Connect the parts of a step; nothing is queued yet.

        Args:
            step: executes a step.
            engine: the engine of ``step``.
            train_data: describes sequences whose loss is not finite.
            watchdog: is told the section of the step.
            spikes: takes the loss of every applied step.
            next_batch: returns this rank's part of the next global batch.
        """
        self.step, self.engine, self.train_data = step, engine, train_data
        self.watchdog, self.spikes, self.next_batch = watchdog, spikes, next_batch
        self.tokens = 0
        """Tokens trained on up to the last finished step."""
        self._queued: _Queued | None = None

    def submit(
        self, number: int, *, stop_wanted: Callable[[], bool] = lambda: False, limit_s: float = 0.0
    ) -> FinishedStep | None:
        """Queue step ``number``; return the previous step unless :meth:`drain` returned it. All ranks call it together.

        Args:
            number: the step's number.
            stop_wanted: returns whether this rank was asked to stop; called when the batch is there.
            limit_s: seconds that any section of the step may take; 0 sets no limit.
        """
        began = time.perf_counter()
        # A step lasts from the end of the previous step, which the device may still execute.
        device_began = self._queued.step.ended if self._queued else Mark(self.engine.device)
        with self.watchdog.section("wait for data", limit_s):
            batch = self.next_batch()
        with self.watchdog.section("step", limit_s), self.engine.checkpointing.step():
            gradient = self.step.compute_gradient(number, batch, stop_wanted=stop_wanted(), limit_s=limit_s)
            finished = self._read()
            step = self.step.apply(gradient, limit_s=limit_s)
        self._queued = _Queued(step, device_began, began, time.perf_counter())
        return finished

    def drain(self) -> FinishedStep | None:
        """Wait for the queued step and return it, or None where no step is queued. All ranks call it together."""
        if self._queued is not None:
            self._queued.step.wait()
            self._queued = replace(self._queued, ended=time.perf_counter())
        return self._read()

    def forget(self) -> None:
        """Drop the queued step without reading its results."""
        self._queued = None

    @property
    def queued(self) -> PendingStep:
        """The step that was submitted last and whose results were not read."""
        assert self._queued is not None
        return self._queued.step

    def _read(self) -> FinishedStep | None:
        if self._queued is None:
            return None
        queued, self._queued = self._queued, None
        step, gradient = queued.step, queued.step.gradient
        counts, token_sums, skipped = gradient.counts(), gradient.token_sums(), step.result.skipped
        if skipped is None:
            self.tokens += counts.tokens
            self.spikes.accept(token_sums.lm, gradient.batch.seq_len)
        elif step.spike is None:  # all ranks skip the same steps, so all ranks are here
            named = name_nonfinite(self.engine, self.train_data, gradient.batch, gradient.losses)
            skipped += f"; {named}" if named else ""
        return FinishedStep(
            number=gradient.number,
            batch=gradient.batch,
            learning_rate=step.learning_rate,
            counts=counts,
            token_sums=token_sums,
            row_sums=step.row_sums(),
            grad_norm=step.result.grad_norm,
            skipped=skipped,
            is_spike=step.spike is not None,
            tokens=self.tokens,
            device_s=step.ended.seconds_since(queued.device_began),
            host_s=queued.ended - queued.began,
            own_s=gradient.reached_collective_at - queued.began,
        )
