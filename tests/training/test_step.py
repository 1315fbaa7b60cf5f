"""One optimizer step on a fake engine: what is counted, what the engine is told, and what is never applied."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from fusiontree.data.batch import IGNORED, MicroBatch, StepBatch
from fusiontree.engines.base import ModelOutput, StepResult
from fusiontree.models.model import LayerSums
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import LossWeights
from fusiontree.training.nonfinite import check_skips
from fusiontree.training.schedule import learning_rate
from fusiontree.training.step import TrainStep, count
from fusiontree.training.step_sums import StepCounts
from fusiontree.training.validation import validate
from fusiontree.utils.errors import UserError

TRAINING = TrainingConfig(seq_len=4, max_steps=10, global_batch_size=4, warmup_steps=5, learning_rate=1.0)
WATCHDOG: Any = SimpleNamespace(section=lambda name, limit_s: nullcontext())


def micro(weights: list[float]) -> MicroBatch:
    """Rows of four tokens, of which the last has no label; rows without weight have none at all."""
    rows = len(weights)
    ids_BS, weight_B = torch.arange(4).expand(rows, -1), torch.tensor(weights)
    labels_BS = torch.where(weight_B[:, None] > 0, torch.tensor([1, 2, 3, IGNORED]), IGNORED)
    return MicroBatch(ids_BS, labels_BS, ids_BS, torch.arange(rows), weight_B, torch.zeros(rows, dtype=torch.int16))


BATCH = StepBatch([micro([1.0, 1.0]), micro([1.0, 0.0])], seq_len=4, skipped_rows=1, wait_s=0.0, tokens_hash=77)


class FakeEngine:
    """Two ranks that read different rows; notes what it is told. The sums over ranks name their kind."""

    device, rank, world_size, dp_size = torch.device("cpu"), 0, 2, 2

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forward(self, micro: MicroBatch, branch_scale: Any, layer_metrics: Any) -> ModelOutput:
        rows = len(micro.rows_B)
        sums = LayerSums({"gate": torch.ones(1, rows), "entropy": torch.ones(1, rows)}, torch.ones(rows))
        return ModelOutput((micro.labels_BS >= 0).sum() * 2.0, torch.zeros(()), None, sums, None)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.calls.append(("backward", last))

    def step(self, rate: float) -> StepResult:
        self.calls.append(("step", rate))
        return StepResult(lambda: 1.0, "")

    def discard(self) -> None:
        self.calls.append("discard")

    def evaluate(self, micro: MicroBatch) -> Tensor:
        return (micro.labels_BS >= 0).sum() * 2.0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values.mul_(2)

    sum_over_rows = sum_over_ranks

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        return values.mul_(4)  # as if rows were cut in two


def new_step(engine: Any, spike: str | None = None) -> TrainStep:
    settings: Any = SimpleNamespace(
        training=TRAINING.model_copy(update={"spikes": SimpleNamespace(policy="skip")}),
        config=SimpleNamespace(model=SimpleNamespace(num_layers=1, drop_branch_prob=0.0)),
        layer_metrics=lambda number: (),
        is_logged=lambda number: True,
        flops_per_token=lambda lengths: 5.0 * len(lengths),
        loss_weights=LossWeights(0.0, 0.0, 0.0, 0.5, 0.0),
    )
    spikes: Any = SimpleNamespace(judge=lambda loss, seq_len: spike)
    return TrainStep(settings, engine, MagicMock(), WATCHDOG, spikes)


@pytest.mark.parametrize("number", [1, 3, 5, 8])
def test_a_step_is_applied_at_its_own_learning_rate(number: int) -> None:
    engine = FakeEngine()
    step = new_step(engine)
    pending = step.apply(step.compute_gradient(number, BATCH, stop_wanted=False, limit_s=0.0), limit_s=0.0)
    rate = learning_rate(number, TRAINING)
    assert engine.calls == [("backward", False), ("backward", True), ("step", rate)]
    assert pending.learning_rate == rate
    assert (pending.spike, pending.stop, pending.result.skipped) == (None, False, None)


def test_a_spike_is_discarded() -> None:
    engine = FakeEngine()
    step = new_step(engine, spike="loss spike")
    pending = step.apply(step.compute_gradient(3, BATCH, stop_wanted=True, limit_s=0.0), limit_s=0.0)
    assert engine.calls[2:] == ["discard"]
    assert (pending.spike, pending.stop, pending.result.skipped) == ("loss spike", True, "loss spike")


def test_labels_rows_and_losses_are_those_that_count() -> None:
    counted = count(BATCH, stop_wanted=True)
    assert counted == StepCounts(9, 3, 1, 77, 1)
    engine = FakeEngine()
    gradient = new_step(engine).compute_gradient(1, BATCH, stop_wanted=False, limit_s=0.0)
    assert gradient.counts() == StepCounts(18, 6, 2, 154, 0, flops=2 * 16 * 5 * 4)
    # Each label costs 2; this rank has 9 of 18, and the fake's sum over tokens is four times the rank's.
    assert gradient.token_sums().lm == pytest.approx(4 * 9 * 2.0 / 18)


def test_validation_is_the_mean_over_labels() -> None:
    engine: Any = FakeEngine()
    data: Any = SimpleNamespace(micro_batches=lambda: iter(BATCH.micro_batches))
    loss, tokens = validate(engine, data)
    assert tokens == 18
    assert loss == pytest.approx(4 * 9 * 2.0 / 18)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_as_many_steps_as_allowed_may_be_skipped_in_a_row(limit: int) -> None:
    config = TRAINING.model_copy(update={"max_skipped_steps": limit})
    check_skips(9, limit, "non-finite gradient norm", config)
    with pytest.raises(UserError, match=rf"{limit + 1} steps in a row .* training\.max_skipped_steps {limit}"):
        check_skips(9, limit + 1, "non-finite gradient norm", config)
