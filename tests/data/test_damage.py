"""Damaged shards: the run stops with names, or goes on with the slots kept."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.data.config import DataConfig
from fusiontree.data.format import read_dataset
from fusiontree.data.sources import index
from fusiontree.data.sources.index import open_shard
from fusiontree.data.validation import ValidationData
from fusiontree.utils.errors import UserError
from tests.data.batches import SEQ, global_batches, open_data, row_digests
from tests.data.datasets import random_dataset


def flip(folder: Path, shard: int = 1, document: int = 0) -> None:
    """Flip a token of a shard's document."""
    opened = open_shard(folder, read_dataset(folder).shards[shard])
    data = bytearray(opened.tar.read_bytes())
    data[int(opened._offsets[document])] ^= 1
    opened.tar.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_dataset(tmp_path / "d", shards=3)


def config_of(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(train=str(folder), num_workers=0, fetch_wait_s=0.0, **values)


def rows_of(config: DataConfig, steps: int) -> list[dict[int, str]]:
    return [row_digests(batch) for batch, _ in itertools.islice(open_data(config).steps(), steps)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_stop_names_row_shard_and_member_when_the_row_is_due(folder: Path, workers: int) -> None:
    good = rows_of(config_of(folder), 20)
    flip(folder)
    stream = open_data(config_of(folder).model_copy(update={"num_workers": workers})).steps()
    seen = []
    with pytest.raises(UserError, match=r"row \d+ of the run \(row \d+ of its shard\).*shard-000001\.tar") as caught:
        for batch, _ in stream:
            seen.append(row_digests(batch))
    assert "member 000000020: its tokens differ from their recorded hash" in str(caught.value)
    assert "data.on_damage=skip" in str(caught.value)
    # Steps before it were delivered, whatever had been read ahead.
    assert seen == good[: len(seen)]
    row = int(str(caught.value).split()[1])
    assert row in good[len(seen)]


def test_skip_keeps_every_other_row_in_its_place(folder: Path) -> None:
    good = rows_of(config_of(folder), 20)
    flip(folder)
    skipping = config_of(folder, on_damage="skip")
    skipped = 0
    for (batch, _), wanted in zip(open_data(skipping).steps(), good, strict=False):
        got = row_digests(batch)
        changed = {number for number in wanted if got[number] != wanted[number]}
        assert len(changed) == batch.skipped_rows == len(batch.damage)
        assert all(any(f"row {number} of the run" in text for text in batch.damage) for number in changed)
        for micro in batch.micro_batches:
            for i, number in enumerate(micro.rows_B.tolist()):
                blank = bool((micro.labels_BS[i] == -100).all())
                assert blank == (number in changed) == (micro.row_weight_B[i] == 0)
        skipped += batch.skipped_rows
    assert 0 < skipped < 20
    # Any world gives these batches too.
    assert global_batches(skipping, 20)[0] == global_batches(skipping, 20, size=3)[0]


DAMAGES = {
    "missing tar": lambda tar: tar.unlink(),
    "missing index": lambda tar: tar.with_suffix(".index").unlink(),
    "truncated tar": lambda tar: os.truncate(tar, 700),
    "empty tar": lambda tar: os.truncate(tar, 0),
    "empty index": lambda tar: os.truncate(tar.with_suffix(".index"), 0),
    "flipped index": lambda tar: tar.with_suffix(".index").write_bytes(
        bytes([*tar.with_suffix(".index").read_bytes()[:-1], 7])
    ),
    "another shard": lambda tar: tar.write_bytes(tar.with_name("shard-000000.tar").read_bytes()),
    "a folder": lambda tar: (tar.unlink(), tar.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_shard_is_named_and_loses_its_own_rows_only(folder: Path, damage: str) -> None:
    good = rows_of(config_of(folder), 20)
    tar = folder / "shard-000002.tar"
    DAMAGES[damage](tar)
    with pytest.raises(UserError, match=r"shard-000002\.(tar|index)"):
        rows_of(config_of(folder), 20)
    lost = sum((s.tokens - 1) // SEQ for s in read_dataset(folder).shards[2:])
    config = config_of(folder, on_damage="skip", max_skipped_rows=1000)
    total = open_data(config).readers[0].rows
    steps = -(-total // 6)
    batches = [batch for batch, _ in itertools.islice(open_data(config, global_batch_size=6).steps(), steps)]
    again = steps * 6 - total  # rows of the second epoch in the last batch
    assert lost <= sum(batch.skipped_rows for batch in batches) <= lost + again
    for batch, wanted in zip(batches, good, strict=False):
        got = row_digests(batch)
        assert sum(got[number] != wanted[number] for number in wanted) == batch.skipped_rows


def test_the_cap_counts_the_whole_run_over_all_ranks(folder: Path) -> None:
    flip(folder)
    config = config_of(folder, on_damage="skip", max_skipped_rows=5)
    data = open_data(config)
    stream = data.steps()
    _, state = next(stream)
    data.count_skipped(3)  # as the trainer counts over all ranks
    assert state["skipped_rows"] == 3
    _, state = next(stream)
    assert state["skipped_rows"] == 3
    resumed = open_data(config)
    _, state = next(resumed.steps(state))
    assert state["skipped_rows"] == 3
    with pytest.raises(UserError, match=r"6 damaged rows were skipped in this run, more than data.max_skipped_rows 5"):
        resumed.count_skipped(3)


def test_the_cap_stops_a_reader_that_nobody_counts_for(folder: Path) -> None:
    flip(folder)
    with pytest.raises(UserError, match=r"1 damaged rows.*max_skipped_rows 0; the last was row \d+.*shard-000001"):
        rows_of(config_of(folder, on_damage="skip", max_skipped_rows=0), 20)


def test_validation_stops_or_skips_too(folder: Path) -> None:
    flip(folder)

    def loss_rows(**values: Any) -> tuple[ValidationData, list[torch.Tensor]]:
        config = DataConfig(train="x", validation=str(folder), **values)
        data = ValidationData(config, seq_len=SEQ, micro_batch_size=4, max_rows=0, vocab_size=264)
        return data, [micro.row_weight_B for micro in data.micro_batches()]

    with pytest.raises(UserError, match=r"shard-000001\.tar, member 000000020"):
        loss_rows()
    data, weights = loss_rows(on_damage="skip")
    assert 0 < data.skipped_rows < 10
    assert int(torch.cat(weights).sum()) == data.rows - data.skipped_rows
    with pytest.raises(UserError, match=r"validation skipped more than data.max_skipped_rows 0"):
        loss_rows(on_damage="skip", max_skipped_rows=0)


def test_a_disk_that_stumbles_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input/output error that passes is no damage, so ranks do not differ in what they skip."""
    good = rows_of(config_of(folder), 3)
    pread, failures = os.pread, itertools.cycle([1, 0, 0, 0, 0, 0, 0, 0])

    def stumbling(descriptor: int, size: int, offset: int) -> bytes:
        if next(failures):
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(index.os, "pread", stumbling)
    assert rows_of(config_of(folder, fetch_attempts=50), 3) == good
    with pytest.raises(UserError, match=r"cannot be read: .*Input/output error"):
        rows_of(config_of(folder, fetch_attempts=1), 3)
