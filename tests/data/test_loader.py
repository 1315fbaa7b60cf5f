"""The data order is a property of the run: any world size, any worker count, any restart, the same tokens."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusiontree.data.config import DataConfig
from fusiontree.data.batch import RowsOfStep
from fusiontree.data.format import TokenizerInfo, read_dataset
from fusiontree.data.loader import TrainingData, ValidationData
from fusiontree.data.order import RowPlace
from fusiontree.data.rows import RowReader
from fusiontree.data.sources import open_source
from fusiontree.utils.errors import UserError
from tests.data.datasets import documents, random_dataset, write

SEQ = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("datasets")
    return [random_dataset(base / "a", shards=4, seed=1), random_dataset(base / "b", shards=2, seed=2)]


def row_reader(folder: Path, seq_len: int, vocab_size: int) -> RowReader:
    config = DataConfig(train=str(folder), fetch_wait_s=0.0)
    return RowReader(open_source(str(folder), config), seq_len, vocab_size)


def loader(config: DataConfig, rank: int = 0, size: int = 1, **kind: object) -> TrainingData:
    defaults = {"seq_len": SEQ, "global_batch_size": 6, "micro_batch_size": 2, "curriculum": None, "seed": 3}
    return TrainingData(config, vocab_size=264, dp_rank=rank, dp_size=size, **(defaults | kind))


def global_batches(config: DataConfig, steps: int, size: int = 1, state=None, **kind: object):
    """Return the hash of every global batch, put together from all ranks, and the state after them."""
    streams = [loader(config, rank, size, **kind).steps(state) for rank in range(size)]
    hashes = []
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        assert len({len(batch.micro_batches) for batch, _ in parts}) == 1
        assert len({str(s) for _, s in parts}) == 1
        rows = {}
        for batch, _ in parts:
            for micro in batch.micro_batches:
                for i, number in enumerate(micro.rows_B.tolist()):
                    if micro.row_weight_B[i]:
                        assert number not in rows
                        rows[number] = [
                            t[i].numpy().tobytes() for t in (micro.input_ids_BS, micro.labels_BS, micro.positions_BS)
                        ]
                    else:
                        assert (micro.labels_BS[i] == -100).all()
        digest = hashlib.sha256()
        for number in sorted(rows):
            digest.update(number.to_bytes(8, "little") + b"".join(rows[number]))
        hashes.append(digest.hexdigest())
        state = parts[0][1]
    for stream in streams:
        stream.close()
    return hashes, state


@pytest.fixture(scope="module")
def mixed(folders: list[Path]) -> dict:
    sources = [{"path": str(folders[0]), "weight": 3.0}, {"path": str(folders[1]), "weight": 1.0}]
    return {"train": sources, "shuffle_shards": 2}


STEPS = 60  # both sources come to the end of an epoch within it
CURRICULUM = [[4, 20], [8, 20]]


@pytest.fixture(scope="module")
def reference(mixed: dict) -> list[str]:
    config = DataConfig.model_validate(mixed | {"num_workers": 0})
    hashes, state = global_batches(config, STEPS, curriculum=CURRICULUM)
    assert all(source["epoch"] >= 1 for source in state["sources"])
    assert len(set(hashes)) == STEPS
    return hashes


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (1, 4), (2, 0), (3, 1), (4, 0), (8, 0)])
def test_any_world_and_workers_give_the_same_batches(
    mixed: dict, reference: list[str], size: int, workers: int
) -> None:
    config = DataConfig.model_validate(mixed | {"num_workers": workers})
    assert global_batches(config, STEPS, size, curriculum=CURRICULUM)[0] == reference


@given(
    stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=4, unique=True),
    sizes=st.lists(st.integers(1, 8), min_size=5, max_size=5),
    workers=st.sampled_from([0, 1, 4]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stops_and_resumes_anywhere(
    mixed: dict, reference: list[str], stops: list[int], sizes: list[int], workers: int
) -> None:
    config = DataConfig.model_validate(mixed | {"num_workers": workers})
    state, hashes = None, []
    for begin, end in itertools.pairwise([0, *sorted(stops), STEPS]):
        part, state = global_batches(config, end - begin, sizes[len(hashes) % 5], state, curriculum=CURRICULUM)
        hashes += part
    assert hashes == reference


def test_rows_are_the_text(folders: list[Path]) -> None:
    """Unshuffled rows laid side by side are the shard; labels are the next token, cut at document starts."""
    docs = documents(30, seed=9)
    folder = write(folders[0].parent / "one", [docs])
    reader = row_reader(folder, SEQ, 264)
    whole = np.concatenate(docs)
    starts = np.cumsum([0] + [len(d) for d in docs])
    rows = reader.rows_of_shards[0]
    assert rows == (len(whole) - 1) // SEQ
    for row in range(rows):
        got = RowsOfStep(1, SEQ, SEQ).place(0)
        reader.read(RowPlace(0, row), got)
        begin = row * SEQ
        assert np.array_equal(got.input_ids_S, whole[begin : begin + SEQ])
        for i in range(SEQ):
            crosses = begin + i + 1 in starts
            assert got.labels_S[i] == (-100 if crosses else whole[begin + i + 1])
            document_start = starts[np.searchsorted(starts, begin + i, side="right") - 1]
            assert got.positions_S[i] == begin + i - max(begin, document_start)


def test_curriculum_cuts_the_same_text(folders: list[Path]) -> None:
    config = DataConfig(train=str(folders[0]), num_workers=0)
    short = next(loader(config, curriculum=[[4, 1]]).steps())[0]
    long = next(loader(config).steps())[0]
    for a, b in zip(short.micro_batches, long.micro_batches, strict=True):
        assert a.input_ids_BS.shape == (8, 4)
        assert a.input_ids_BS.flatten().equal(b.input_ids_BS.flatten())
        assert a.labels_BS.flatten().equal(b.labels_BS.flatten())
        assert (a.positions_BS[:, 0] == 0).all()


def test_another_dataset_or_seed_cannot_resume(folders: list[Path]) -> None:
    config = DataConfig(train=str(folders[0]), num_workers=0)
    _, state = global_batches(config, 2)
    for other in (loader(DataConfig(train=str(folders[1]))), loader(config, seed=4), loader(config, seq_len=8)):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            next(other.steps(state))


def test_validation_covers_the_same_rows_on_any_world(folders: list[Path]) -> None:
    config = DataConfig(train="x", validation=str(folders[0]))

    def rows(size: int, limit: int) -> list[bytes]:
        found = []
        for rank in range(size):
            data = ValidationData(
                config, seq_len=SEQ, micro_batch_size=3, max_rows=limit, vocab_size=264, dp_rank=rank, dp_size=size
            )
            for micro in data.micro_batches():
                for i in range(3):
                    if micro.row_weight_B[i]:
                        found.append(micro.input_ids_BS[i].numpy().tobytes())
        return sorted(found)

    total = sum((s.tokens - 1) // SEQ for s in read_dataset(folders[0]).shards)
    assert len(rows(1, 0)) == total
    assert len(rows(1, 7)) == 7
    assert rows(1, 7) == rows(2, 7) == rows(3, 7)
    assert rows(1, 0) == rows(4, 0)


def corrupt(folder: Path) -> None:
    """Flip a token of the second shard's first document."""
    from fusiontree.data.verify import open_shard

    shard = open_shard(folder, read_dataset(folder).shards[1])
    offset = int(shard._offsets[0])
    data = bytearray(shard.tar.read_bytes())
    data[offset] ^= 1
    shard.tar.write_bytes(data)


def test_damage_stops_with_names_or_keeps_the_slot(tmp_path: Path) -> None:
    folder = random_dataset(tmp_path / "d", shards=3)
    good, _ = global_batches(DataConfig(train=str(folder), num_workers=0), 20)
    corrupt(folder)
    with pytest.raises(UserError, match=r"shard-000001\.tar, member 000000020: its tokens differ"):
        global_batches(DataConfig(train=str(folder), num_workers=1), 20)
    skipping = DataConfig(train=str(folder), num_workers=0, on_damage="skip")
    stream = loader(skipping).steps()
    batches = [next(stream)[0] for _ in range(20)]
    assert 0 < sum(b.skipped_rows for b in batches) < 20
    skipped, _ = global_batches(skipping, 20)
    same = [a == b for a, b in zip(good, skipped, strict=True)]
    assert [b.skipped_rows == 0 for b in batches] == same
    with pytest.raises(UserError, match="max_skipped_rows 0"):
        global_batches(skipping.model_copy(update={"max_skipped_rows": 0}), 20)


def test_what_does_not_fit_the_model_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"257 tokens, and model.vocab_size is 100"):
        row_reader(folders[0], SEQ, 100)
    with pytest.raises(UserError, match=r"no row of training.seq_len 100000"):
        row_reader(folders[0], 100000, 264)
    other = TokenizerInfo("byte", "other", 200, 199, "1" * 64)
    small = write(tmp_path / "small", [[np.arange(0, 190)]], other)
    sources = [{"path": str(p), "weight": 1.0} for p in (folders[0], small)]
    with pytest.raises(UserError, match="different tokenizers"):
        loader(DataConfig.model_validate({"train": sources}))


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    lying = TokenizerInfo("byte", "byte", 50, 49, "0" * 64)
    folder = write(tmp_path / "d", [[np.arange(0, 40), np.array([5, 90, 49])]], lying)
    with pytest.raises(UserError, match=r"shard-000000\.tar, member 000000001 holds token 90"):
        row_reader(folder, 21, 60).read(RowPlace(0, 1), RowsOfStep(1, 21, 21).place(0))
