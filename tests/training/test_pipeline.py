"""The pipeline reads the results of a step while the device executes the next step; a fake step notes the order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.engines.base import StepResult
from fusiontree.parallel.activation_checkpointing import Checkpointing
from fusiontree.training.pipeline import BatchStream, StepPipeline
from fusiontree.training.step import PendingStep, StepGradient
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums
from fusiontree.utils.device import Mark

CPU = torch.device("cpu")
MICRO = MicroBatch(*[torch.zeros(1, 8, dtype=torch.int64)] * 3, torch.tensor([5]), torch.ones(1), torch.zeros(1))
BATCH = StepBatch([MICRO], seq_len=8, skipped_rows=0, wait_s=0.0)


class Fakes:
    """Engine, data, watchdog, spike filter and step of a pipeline, which note the events."""

    device, rank = CPU, 0
    checkpointing = Checkpointing([])

    def __init__(self) -> None:
        self.events: list[str] = []
        self.norms: dict[int, float] = {}
        self.spikes: set[int] = set()

    def section(self, name: str, limit_s: float) -> Any:
        return nullcontext()

    def next_batch(self) -> StepBatch:
        self.events.append("batch")
        return BATCH

    def finite_passes(self) -> list[bool]:
        return [False]

    def gather_text(self, text: str) -> list[str]:
        return [text]

    def describe_row(self, row: int) -> str:
        return f"row {row}"

    def accept(self, loss: float, seq_len: int) -> None:
        self.events.append(f"accept {loss:g}")

    def compute_gradient(self, number: int, batch: StepBatch, *, stop_wanted: bool, limit_s: float) -> StepGradient:
        self.events.append(f"gradient {number}")

        def counts() -> StepCounts:
            self.events.append(f"read {number}")
            return StepCounts(tokens=8, rows=1, skipped_rows=0, tokens_hash=0, stop_requests=int(stop_wanted))

        losses = [torch.tensor(float(number))]
        sums = TokenSums(lm=float(number), z=0.0)
        return StepGradient(number, batch, 0.0, losses, counts, lambda: sums, torch.zeros(1), ("gate",))

    def apply(self, gradient: StepGradient, *, limit_s: float) -> PendingStep:
        number = gradient.number
        self.events.append(f"apply {number}")
        norm = self.norms.get(number, 1.0)
        spike = "loss spike" if number in self.spikes else None
        result = StepResult(lambda: math.nan if spike else norm, unless_finite=spike or "non-finite gradient norm")

        def row_sums() -> RowSums:
            self.events.append(f"wait {number}")
            return RowSums(0.0, 0.0, {})

        return PendingStep(gradient, 1e-3, spike, False, result, row_sums, Mark(CPU))


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def pipeline(fakes: Fakes) -> StepPipeline:
    parts: Any = fakes
    return StepPipeline(parts, parts, parts, parts, parts, fakes.next_batch)


def test_results_are_read_between_gradient_and_optimizer_step_of_the_next_step(
    fakes: Fakes, pipeline: StepPipeline
) -> None:
    assert pipeline.submit(1) is None
    assert fakes.events == ["batch", "gradient 1", "apply 1"]
    fakes.events.clear()
    finished = pipeline.submit(2)
    assert finished is not None
    assert (finished.number, finished.tokens, finished.skipped, finished.grad_norm) == (1, 8, None, 1.0)
    assert fakes.events == ["batch", "gradient 2", "read 1", "accept 1", "wait 1", "apply 2"]
    assert pipeline.queued.gradient.number == 2


def test_drain_returns_the_queued_step_once(fakes: Fakes, pipeline: StepPipeline) -> None:
    assert pipeline.drain() is None
    pipeline.submit(1)
    fakes.events.clear()
    finished = pipeline.drain()
    assert finished is not None and finished.number == 1
    assert fakes.events[0] == "wait 1"  # its results are read only after the device has executed it
    assert pipeline.drain() is None
    assert pipeline.submit(2) is None
    assert pipeline.tokens == 8


def test_a_forgotten_step_counts_nothing(fakes: Fakes, pipeline: StepPipeline) -> None:
    """A rewind forgets the queued step and submits an earlier number."""
    for number in (1, 2, 3):
        pipeline.submit(number)
    pipeline.forget()
    fakes.events.clear()
    assert pipeline.submit(2) is None
    assert not [event for event in fakes.events if "3" in event]
    assert pipeline.tokens == 16


def test_skipped_steps_count_no_tokens_and_say_why(fakes: Fakes, pipeline: StepPipeline) -> None:
    fakes.norms, fakes.spikes = {1: math.inf}, {2}
    pipeline.submit(1)
    nonfinite, spike, applied = pipeline.submit(2), pipeline.submit(3), pipeline.drain()
    assert nonfinite is not None and spike is not None and applied is not None
    assert nonfinite.skipped == "non-finite gradient norm; gradient not finite on rank 0: row 5"
    assert not nonfinite.is_spike
    assert (spike.skipped, spike.is_spike) == ("loss spike", True)
    assert [step.tokens for step in (nonfinite, spike, applied)] == [0, 0, 8]
    assert [event for event in fakes.events if "accept" in event] == ["accept 3"]


def test_batches_continue_at_a_position_and_close_the_previous_reader() -> None:
    closed: list[Any] = []

    class Data:
        def steps(self, position: dict[str, Any] | None) -> Iterator[tuple[StepBatch, dict[str, Any]]]:
            number = 0 if position is None else position["row"]
            try:
                while True:
                    number += 1
                    yield BATCH, {"row": number}
            finally:
                closed.append(position)

    data: Any = Data()
    batches = BatchStream(data)
    batches.seek(None)
    batches.next()
    batches.next()
    assert batches.position == {"row": 2} and not closed
    batches.seek({"row": 7})
    assert batches.position == {"row": 7} and closed == [None]
    batches.next()
    assert batches.position == {"row": 8}
