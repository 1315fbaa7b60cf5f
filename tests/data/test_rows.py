"""Rows against a plain definition: the shard's text cut into pieces, documents as the only context."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.batch import FILLER, IGNORED, RowsOfStep
from fusiontree.data.format import ShardDamage, TokenizerInfo, read_dataset
from fusiontree.data.order import RowPlace
from fusiontree.data.sources.index import open_shard
from fusiontree.utils.errors import UserError
from tests.data.datasets import TOKENIZER, random_dataset, read_row, row_reader, write


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda n: sum(n) > 24),
    pieces=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_row_is_its_text(lengths: list[int], pieces: int, seed: int) -> None:
    seq = 24  # a multiple of every number of pieces
    rng = np.random.default_rng(seed)
    docs = [np.append(rng.integers(0, 256, n - 1), 256) for n in lengths]
    text = np.concatenate(docs)
    start_of = np.concatenate([np.full(n, sum(lengths[:i])) for i, n in enumerate(lengths)])
    with tempfile.TemporaryDirectory() as folder:
        reader = row_reader(write(Path(folder) / "d", [docs]), seq)
        assert reader.rows == (len(text) - 1) // seq
        for row in range(reader.rows):
            got = read_row(reader, row, pieces)
            for i in range(seq):
                token, piece_start = row * seq + i, row * seq + i // (seq // pieces) * (seq // pieces)
                assert got.input_ids_S[i] == text[token]
                assert got.positions_S[i] == token - max(start_of[token], piece_start)
                last = start_of[token + 1] == token + 1
                assert got.labels_S[i] == (IGNORED if last else text[token + 1])
        reader.source.close()


def test_rows_of_long_documents_are_checked_whole_when_first_touched(tmp_path: Path) -> None:
    """A flip far outside the row shows too: one hash covers the document."""
    doc = np.append(np.random.default_rng(0).integers(0, 256, 3_000_000), 256)
    folder = write(tmp_path / "d", [[doc]])
    shard = open_shard(folder, row_reader(folder, 64).source.info.shards[0])
    data = bytearray(shard.tar.read_bytes())
    data[int(shard._offsets[0]) + 5_999_990] ^= 1
    shard.tar.write_bytes(data)
    with pytest.raises(ShardDamage, match="differ from their recorded hash"):
        read_row(row_reader(folder, 64), 3)


def test_the_hash_of_a_row_knows_its_tokens_and_its_documents(tmp_path: Path) -> None:
    a, b = np.arange(1, 41), np.arange(41, 81)
    variants = {
        "same": [a, b],
        "joined": [np.concatenate([a, b])],
        "other": [a, np.where(b == 50, 51, b)],
    }
    hashes = {}
    for name, docs in variants.items():
        reader = row_reader(write(tmp_path / name, [docs]), 60)
        hashes[name] = reader.read(RowPlace(0, 0), RowsOfStep(1, 60, 60).place(0))
    again = row_reader(tmp_path / "same", 60).read(RowPlace(0, 0), RowsOfStep(1, 60, 20).place(0), subrow=20)
    assert len(set(hashes.values())) == 3
    assert again == hashes["same"]


def test_rows_not_written_are_fillers() -> None:
    rows = RowsOfStep(3, 8, 4)
    for index in range(3):
        rows.blank(index)
    rows.describe(1, 10, 2)
    first, second = rows.micro_batches(2)
    assert first.rows_B.tolist() == [FILLER, FILLER, 10, 11]
    assert first.row_weight_B.tolist() == [0, 0, 1, 1]
    assert first.sources_B.tolist() == [0, 0, 2, 2]
    assert first.positions_BS.tolist() == [[0, 1, 2, 3]] * 4
    assert second.rows_B.tolist() == [FILLER] * 2
    assert (first.labels_BS == IGNORED).all()


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [[np.arange(0, 200), np.arange(0, 50)]])
    with pytest.raises(UserError, match=r"257 tokens, and model.vocab_size is 100"):
        row_reader(folder, 16, 100)
    with pytest.raises(UserError, match=r"no row of training.seq_len 100000: its largest shard holds 250"):
        row_reader(folder, 100000)
    narrow = TokenizerInfo("byte", "wide", 70_000, 1, "0" * 64)
    from fusiontree.data.format import DatasetInfo, read_dataset, write_dataset

    write_dataset(folder, DatasetInfo(narrow, "uint16", read_dataset(folder).shards))
    with pytest.raises(UserError, match="tokens of type uint16 cannot represent a vocabulary of 70000"):
        row_reader(folder, 16, 80_000)
    # A shard of another type than dataset.json says.
    write_dataset(folder, DatasetInfo(TOKENIZER, "uint32", read_dataset(folder).shards))
    with pytest.raises(ShardDamage, match="has tokens of 2 bytes, not 4"):
        read_row(row_reader(folder, 16), 0)


@pytest.mark.parametrize("vocab_size", [60, 90])
def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path, vocab_size: int) -> None:
    lying = TokenizerInfo("byte", "byte", 50, 49, "0" * 64)
    folder = write(tmp_path / "d", [[np.arange(0, 40), np.array([5, 90, 49])]], lying)
    with pytest.raises(UserError, match=r"shard-000000\.tar, member 000000001 holds token 90, and model.vocab_size"):
        read_row(row_reader(folder, 21, vocab_size), 1)
    read_row(row_reader(folder, 21, 91), 1)


def test_few_shards_stay_open(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [[np.arange(0, 40)] for _ in range(9)])
    reader = row_reader(folder, 16, open_shards=3)
    for shard in [*range(9), *range(9)]:
        reader.read(RowPlace(shard, 1), RowsOfStep(1, 16, 16).place(0))
    assert len(reader.source._kept) == 3
    assert all(kept.opened is not None for kept in reader.source._kept.values())


def test_tokens_that_no_row_contains_are_named(tmp_path: Path) -> None:
    """Shards shorter than a row, and the ends of shards just over a multiple of it."""
    short = random_dataset(tmp_path / "short", shards=4, count=3)
    tokens = [shard.tokens for shard in read_dataset(short).shards]
    largest = max(tokens)
    note = row_reader(short, largest - 1).note_on_unread()
    assert f"{1 - largest / sum(tokens):.0%} of its tokens are never read" in note
    assert "3 of 4 shards are shorter than that" in note and "--shard-mb" in note
    assert not row_reader(short, 1).note_on_unread()  # all but one token per shard is an input
