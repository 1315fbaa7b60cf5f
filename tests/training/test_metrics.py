"""Metrics of a step by hand: what is divided by what."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree.data.batch import MicroBatch, StepBatch
from fusiontree.training.losses import LossWeights
from fusiontree.training.metrics import step_metrics
from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.step import document_lengths
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums

WEIGHTS = LossWeights(load_balance=0.5, entropy=0.25, z_loss=0.125, gate_target=0.5, gate_margin=0.1)
POSITIONS_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])


def settings(peak_flops: float | None = 1e4, weights: LossWeights = WEIGHTS) -> Any:
    return SimpleNamespace(
        loss_weights=weights,
        training=SimpleNamespace(global_batch_size=6, seq_len=8),
        peak_flops=peak_flops,
        layer_metrics=lambda step: (),
    )


def finished() -> FinishedStep:
    ids_BS = torch.zeros_like(POSITIONS_BS)
    micro = MicroBatch(ids_BS, ids_BS, POSITIONS_BS, torch.arange(2), torch.ones(2), torch.zeros(2, dtype=torch.int16))
    return FinishedStep(
        number=7,
        batch=StepBatch([micro], seq_len=8, skipped_rows=0, wait_s=0.5, epochs=(1.5,)),
        learning_rate=0.01,
        counts=StepCounts(tokens=40, rows=4, skipped_rows=3, tokens_hash=(1 << 32) + 0xAB, stop_requests=0, flops=720),
        token_sums=TokenSums(lm=3.0, z=2.0),
        row_sums=RowSums(0.5, 0.75, {"gate": [2.0, 1.0], "square": [1.25, 0.25], "entropy": [0.5, 1.0]}),
        grad_norm=1.25,
        skipped=None,
        is_spike=False,
        tokens=280,
        device_s=0.25,
        host_s=0.3,
        own_s=0.1,
    )


@pytest.mark.parametrize("world_size", [1, 2, 16])
def test_speed_is_of_the_job_and_mfu_of_one_device(world_size: int) -> None:
    found = step_metrics(finished(), settings(), world_size, torch.device("cpu"))
    assert found["tokens_per_s"] == 6 * 8 / 0.25
    assert found["tokens_per_s_per_gpu"] == 192 / world_size
    assert found["mfu"] == pytest.approx(720 / 0.25 / world_size / 1e4)
    assert step_metrics(finished(), settings(None), world_size, torch.device("cpu"))["mfu"] is None


def test_the_loss_is_what_is_trained() -> None:
    found = step_metrics(finished(), settings(), 4, torch.device("cpu"))
    assert found["loss"] == pytest.approx(3.0 + 0.125 * 2.0 + 0.5 * 0.5 + 0.25 * 0.75)
    assert (found["lm_loss"], found["z_loss"]) == (3.0, 2.0)
    assert found["gates"]["mean"] == [0.5, 0.25]
    assert found["gates"]["std"] == pytest.approx([0.25, 0.0])
    assert found["gates"]["entropy"] == [0.125, 0.25]
    assert found["tokens_hash"] == "000000ab"
    assert (found["step"], found["tokens"], found["lr"], found["grad_norm"]) == (7, 280, 0.01, 1.25)


def test_the_loss_with_a_teacher_is_what_is_trained() -> None:
    step = finished()
    step = replace(step, token_sums=TokenSums(lm=3.0, z=2.0, divergence=8.0))
    found = step_metrics(step, settings(weights=replace(WEIGHTS, distillation=0.75)), 4, torch.device("cpu"))
    assert found["loss"] == pytest.approx(0.25 * 3.0 + 0.75 * 8.0 + 0.125 * 2.0 + 0.5 * 0.5 + 0.25 * 0.75)
    assert (found["lm_loss"], found["distillation_loss"]) == (3.0, 8.0)
    assert "distillation_loss" not in step_metrics(finished(), settings(), 4, torch.device("cpu"))


def test_documents_end_with_their_rows() -> None:
    assert document_lengths(finished().batch) == [3, 5, 8]
