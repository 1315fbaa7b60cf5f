"""The loader besides its order: curriculum, refusals on resume, validation, errors at the right step."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.batch import StepBatch
from fusiontree.data.config import DataConfig
from fusiontree.data.format import TokenizerInfo, read_dataset
from fusiontree.data.loader import TrainingData
from fusiontree.data.order import LengthSchedule
from fusiontree.data.validation import ValidationData
from fusiontree.utils.errors import UserError
from tests.data.batches import SEQ, global_batches, open_data
from tests.data.datasets import random_dataset, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("datasets")
    return [random_dataset(base / "a", shards=4, seed=1), random_dataset(base / "b", shards=2, seed=2)]


def test_curriculum_cuts_the_same_text(folders: list[Path]) -> None:
    config = DataConfig(train=str(folders[0]), num_workers=0)
    short = next(open_data(config, curriculum=[[4, 1]]).steps())[0]
    long = next(open_data(config).steps())[0]
    assert (short.seq_len, long.seq_len) == (4, SEQ)
    for a, b in zip(short.micro_batches, long.micro_batches, strict=True):
        assert a.input_ids_BS.shape == (8, 4)
        assert a.input_ids_BS.flatten().equal(b.input_ids_BS.flatten())
        assert a.labels_BS.flatten().equal(b.labels_BS.flatten())
        assert (a.positions_BS[:, 0] == 0).all()
    numbers = [n for micro in short.micro_batches for n in micro.rows_B.tolist()]
    assert numbers == list(range(24))


def test_no_slot_stays_with_one_source(folders: list[Path]) -> None:
    """With Fibonacci numbers of rows per step, the mixture nearly repeats from step to step."""
    config = DataConfig(train=[{"path": str(f), "weight": 1.0} for f in folders], num_workers=0)
    for size, stuck in ((89, True), (144, True), (88, False)):
        kind = {"global_batch_size": size, "micro_batch_size": size}
        data = open_data(config, **kind)
        assert data.mixture.repeats(size) == stuck
        steps = [batch.micro_batches[0] for batch, _ in itertools.islice(data.steps(), 12)]
        sources = np.array([step.sources_B.tolist() for step in steps])
        changes = (sources[1:] != sources[:-1]).mean()
        assert 0.3 < changes < 0.7 if stuck else changes > 0, changes
        assert abs(sources.mean(axis=1) - 0.5).max() < 0.03  # every step stays evenly mixed
        for number, step in enumerate(steps):
            assert sorted(step.rows_B.tolist()) == list(range(number * size, (number + 1) * size))
            assert [data.mixture.source(row) for row in step.rows_B.tolist()] == step.sources_B.tolist()
    one, _ = global_batches(config, 4, global_batch_size=89)
    three, _ = global_batches(config, 4, size=3, global_batch_size=89)
    assert one == three


def test_stages_follow_each_other() -> None:
    schedule = LengthSchedule(16, [[4, 2], [8, 1]])
    assert [schedule.length(step) for step in range(1, 6)] == [4, 4, 8, 16, 16]
    assert LengthSchedule(16, None).length(1) == 16
    for stages in ([[5, 1]], [[4, 0]], [[32, 1]], [[1, 3]]):
        with pytest.raises(ValueError, match="curriculum stage"):
            LengthSchedule(16, stages)


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"seed": 4}, {}, "training.seed was 3 and is 4"),
    ({"seq_len": 8}, {}, "training.seq_len was 16 and is 8"),
    ({}, {"shuffle": False}, "data.shuffle was True and is False"),
    ({}, {"shuffle_shards": 3}, "data.shuffle_shards was 16 and is 3"),
]


@pytest.mark.parametrize(("kind", "values", "message"), CHANGES)
def test_another_order_cannot_resume_and_says_why(
    folders: list[Path], kind: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    config = DataConfig(train=str(folders[0]), num_workers=0)
    _, state = global_batches(config, 2)
    other = open_data(config.model_copy(update=values), **kind)
    with pytest.raises(UserError, match="not those of the checkpoint") as caught:
        next(other.steps(state))
    assert message in str(caught.value)
    assert str(caught.value).count(" was ") == 1


def test_other_datasets_cannot_resume_and_are_named(folders: list[Path], tmp_path: Path) -> None:
    def sources(*weights: float) -> DataConfig:
        train = [{"path": str(path), "weight": weight} for path, weight in zip(folders, weights, strict=False)]
        return DataConfig.model_validate({"train": train, "num_workers": 0})

    _, state = global_batches(sources(3.0, 1.0), 2)
    with pytest.raises(UserError, match=rf"the weight of dataset 1 '{folders[1]}' was 1.0 and is 2.0"):
        next(open_data(sources(3.0, 2.0), seed=4).steps(state))
    with pytest.raises(UserError, match="had 2 datasets and has 1"):
        next(open_data(sources(3.0)).steps(state))
    rebuilt = random_dataset(tmp_path / "a", shards=4, seed=7)
    _, state = global_batches(DataConfig(train=str(folders[0]), num_workers=0), 2)
    changed = rf"dataset 0 '{rebuilt}' \(was '{folders[0]}'\) is another dataset or was rebuilt"
    with pytest.raises(UserError, match=changed):
        next(open_data(DataConfig(train=str(rebuilt))).steps(state))


def test_what_does_not_change_the_order_may_change(folders: list[Path], tmp_path: Path) -> None:
    """A dataset that moved, workers, batch size and curriculum."""
    import shutil

    config = DataConfig(train=str(folders[0]), num_workers=0)
    _, state = global_batches(config, 2)
    moved = shutil.copytree(folders[0], tmp_path / "moved")
    data = open_data(DataConfig(train=str(moved), num_workers=2), curriculum=[[4, 9]], global_batch_size=2)
    batch, after = next(data.steps(state))
    assert (after["step"], after["row"], batch.seq_len) == (3, 14, 4)


def test_tokenizers_do_not_mix(folders: list[Path], tmp_path: Path) -> None:
    other = TokenizerInfo("byte", "other", 200, 199, "1" * 64)
    small = write(tmp_path / "small", [[np.arange(0, 190)]], other)
    sources = [{"path": str(p), "weight": 1.0} for p in (folders[0], small)]
    with pytest.raises(UserError, match=r"tokenizer 'byte'.*tokenizer 'other'.*different tokenizers"):
        open_data(DataConfig.model_validate({"train": sources}))


def validation(config: DataConfig, **kind: Any) -> ValidationData:
    defaults = {"seq_len": SEQ, "micro_batch_size": 3, "max_rows": 0, "vocab_size": 264}
    return ValidationData(config, **(defaults | kind))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_validation_covers_the_same_rows_on_any_world(folders: list[Path], workers: int) -> None:
    config = DataConfig(train="x", validation=str(folders[0]), num_workers=workers)

    def rows(size: int, limit: int) -> list[tuple[int, bytes]]:
        found = []
        passes = set()
        for rank in range(size):
            data = validation(config, max_rows=limit, dp_rank=rank, dp_size=size)
            micro_batches = list(data.micro_batches())
            passes.add(len(micro_batches))
            for micro in micro_batches:
                for i in range(len(micro.rows_B)):
                    if micro.row_weight_B[i]:
                        found.append((int(micro.rows_B[i]), micro.input_ids_BS[i].numpy().tobytes()))
        assert len(passes) == 1
        return sorted(found)

    total = sum((s.tokens - 1) // SEQ for s in read_dataset(folders[0]).shards)
    everything = rows(1, 0)
    assert [number for number, _ in everything] == list(range(total))
    assert everything == rows(3, 0) == rows(4, 10**6)
    some = rows(1, 7)
    assert some == rows(2, 7) == rows(5, 7)
    # Spread over the split, not its first rows.
    assert [text for _, text in some] == [everything[n * total // 7][1] for n in range(7)]


def test_validation_gives_the_same_rows_every_time(folders: list[Path]) -> None:
    data = validation(DataConfig(train="x", validation=str(folders[0])))
    first, second = ([micro.input_ids_BS for micro in data.micro_batches()] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_validation_is_told_apart_from_training(folders: list[Path], tmp_path: Path) -> None:
    import shutil

    training = open_data(DataConfig(train=str(folders[0])))
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"holds the same documents as data.train"):
        validation(DataConfig(train="x", validation=str(copy)), training=training.sources)
    other = write(tmp_path / "small", [[np.arange(0, 190)]], TokenizerInfo("byte", "other", 200, 199, "1" * 64))
    with pytest.raises(UserError, match="different tokenizers"):
        validation(DataConfig(train="x", validation=str(other)), training=training.sources)
    validation(DataConfig(train="x", validation=str(folders[1])), training=training.sources)


def test_a_row_says_where_it_comes_from(folders: list[Path]) -> None:
    """In every stage, in the newest step and in the one before; compared with the shards read without the loader."""
    from fusiontree.data.sources.index import open_shard

    data = open_data(DataConfig(train=str(folders[0]), num_workers=1), curriculum=[[4, 2]])
    info = read_dataset(folders[0])
    newest: list[StepBatch] = []
    for batch, _ in itertools.islice(data.steps(), 4):
        newest = [*newest[-1:], batch]
        for batch, micro in [(step, micro) for step in newest for micro in step.micro_batches]:
            for number, ids in zip(micro.rows_B.tolist(), micro.input_ids_BS, strict=True):
                text = data.describe_row(number)
                place, token = text.removeprefix(f"row {number} (").removesuffix(")").split(", from token ")
                shard = next(s for s in info.shards if place == f"{folders[0]}/{s.name}")
                read = open_shard(folders[0], shard).read(int(token), int(token) + batch.seq_len)
                assert ids.tolist() == read.tokens.tolist()
    with pytest.raises(ValueError, match="row 0 is not one of the last two steps'"):
        data.describe_row(0)


def test_closing_ends_the_threads(folders: list[Path]) -> None:
    before = threading.active_count()
    stream = open_data(DataConfig(train=str(folders[0]), num_workers=4)).steps()
    next(stream)
    assert threading.active_count() == before + 4
    stream.close()
    assert threading.active_count() == before


def test_waiting_is_measured(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    read = TrainingData._read_step
    monkeypatch.setattr(TrainingData, "_read_step", lambda self, before: (time.sleep(0.05), read(self, before))[1])
    stream = open_data(DataConfig(train=str(folders[0]), num_workers=0)).steps()
    assert next(stream)[0].wait_s >= 0.05
    ahead = open_data(DataConfig(train=str(folders[0]), num_workers=4)).steps()
    next(ahead)
    time.sleep(0.2)
    assert next(ahead)[0].wait_s < 0.04
    ahead.close()
