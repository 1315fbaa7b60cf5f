"""MFU counts the documents of all ranks, not those of the rank that writes the metrics."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree.data.batch import StepBatch
from fusiontree.data.config import DataConfig
from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import training_flops_per_token
from fusiontree.training import metrics
from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.step import count, document_lengths, model_flops
from fusiontree.training.step_sums import RowSums, StepCounts, TokenSums, read_step_counts
from tests.data.batches import SEQ, open_data
from tests.data.datasets import random_dataset
from tests.tiny import tiny_section

MODEL = ModelConfig.model_validate(tiny_section(vocab_size=264, window_size=4))


def flops_per_token(lengths: list[int]) -> float:
    return training_flops_per_token(MODEL, lengths)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(train=str(random_dataset(tmp_path_factory.mktemp("data") / "a")), num_workers=0)


def batches(config: DataConfig, size: int, **kind: Any) -> list[StepBatch]:
    return [next(open_data(config, rank, size, **kind).steps())[0] for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])  # with 4 ranks two of the eight rows are fillers
@pytest.mark.parametrize("ranks_per_row", [1, 3])
def test_ranks_with_other_documents_add_up_to_the_global_batch(
    config: DataConfig, size: int, ranks_per_row: int
) -> None:
    lengths, packed = [], []
    for batch in batches(config, size):
        flops = model_flops(batch, flops_per_token)
        packed += [count(batch, stop_wanted=False)._replace(flops=flops).pack()] * ranks_per_row
        counted = [m.positions_BS[m.rows_B >= 0] for m in batch.micro_batches]
        flat = torch.cat([positions.flatten() for positions in counted]).tolist()
        starts = [*(n for n, position in enumerate(flat) if position == 0), len(flat)]
        lengths.append([end - start for start, end in pairwise(starts)])
    counts = read_step_counts(torch.stack(packed).sum(0), ranks_per_row)()
    every = [length for mine in lengths for length in mine]
    assert sum(every) == 6 * SEQ
    assert counts.flops == pytest.approx(flops_per_token(every) * 6 * SEQ, rel=1e-12)
    if size == 2:
        assert flops_per_token(lengths[0]) != flops_per_token(lengths[1])  # rank 0 alone would be wrong


def test_flops_of_a_large_job_are_exact() -> None:
    """A trillion parameters and 16M tokens on 4,096 ranks of 64 per row: more than 63 bits."""
    mine = 6 * 10**12 * 2**24 // 64 + 1
    summed = torch.stack([StepCounts(1, 1, 0, 0, 0, mine).pack()] * 4096).sum(0)
    assert read_step_counts(summed, 64)().flops == 64 * mine
    assert 4096 * mine > 1 << 63


def test_the_logged_mfu_is_of_the_global_batch(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "gate_statistics", lambda means_L: {})
    ranks = batches(config, 2)
    total = sum(model_flops(batch, flops_per_token) for batch in ranks)
    logged = []
    for batch in ranks:
        step: Any = SimpleNamespace(
            **{name: 0.0 for name in FinishedStep.__dataclass_fields__ if name not in ("row_sums", "token_sums")}
            | {"number": 1, "batch": batch, "device_s": 0.5, "counts": StepCounts(1, 6, 0, 0, 0, total)},
            row_sums=RowSums(0.0, 0.0, {}),
            token_sums=TokenSums(1.0, 0.0),
        )
        settings: Any = SimpleNamespace(
            loss_weights=SimpleNamespace(z_loss=0.0, load_balance=0.0, entropy=0.0, distillation=0.0),
            training=SimpleNamespace(global_batch_size=6, seq_len=SEQ),
            peak_flops=1e9,
            layer_metrics=lambda number: (),
        )
        logged.append(metrics.step_metrics(step, settings, 2, torch.device("cpu"))["mfu"])
    assert logged == [pytest.approx(total / 0.5 / 2 / 1e9)] * 2


def test_curriculum_rows_are_documents_of_their_own_length(config: DataConfig) -> None:
    (batch,) = batches(config, 1, curriculum=[[4, 1]])
    assert max(document_lengths(batch)) <= 4
    assert sum(document_lengths(batch)) == 6 * SEQ
