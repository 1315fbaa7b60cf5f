"""A micro-batch larger than the rows of a rank adds no filler rows, and reads the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.data.config import DataConfig
from fusiontree.data.validation import ValidationData
from tests.data.batches import SEQ, open_data, row_digests
from tests.data.datasets import random_dataset


@pytest.mark.parametrize(("size", "rows"), [(1, 2), (2, 1)])
def test_training_computes_no_filler(tmp_path: Path, size: int, rows: int) -> None:
    config = DataConfig(train=str(random_dataset(tmp_path / "d")))
    digests = []
    for micro in (1, 64):
        steps = open_data(config, 0, size, global_batch_size=2, micro_batch_size=micro).steps()
        batch, _ = next(steps)
        steps.close()
        assert sum(len(m.rows_B) for m in batch.micro_batches) == rows
        digests.append(row_digests(batch))
    assert digests[0] == digests[1]


def test_validation_computes_no_filler(tmp_path: Path) -> None:
    config = DataConfig(train="(not read)", validation=str(random_dataset(tmp_path / "v")))
    data = ValidationData(config, seq_len=SEQ, micro_batch_size=64, max_rows=3, vocab_size=264)
    (micro,) = data.micro_batches()
    assert len(micro.rows_B) == 3
