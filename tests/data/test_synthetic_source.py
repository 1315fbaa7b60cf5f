"""Synthetic tokens: a function of their options, read alike by any number of ranks, in documents as described.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.base import TokenSource, open_source
from fusiontree.utils.errors import UserError
from tests.data.batches import global_batches, open_data


def source_of(**options: Any) -> TokenSource:
    dataset = DatasetConfig(path="synthetic", type="synthetic", options={"vocab_size": 264} | options)
    return open_source(dataset, DataConfig(train="unused"))


def config_of(**options: Any) -> DataConfig:
    source = {"path": "synthetic", "type": "synthetic", "weight": 1.0, "options": {"vocab_size": 264} | options}
    return DataConfig.model_validate({"train": [source], "num_workers": 0})


@pytest.fixture(scope="module")
def source() -> TokenSource:
    return source_of()


def test_a_range_does_not_depend_on_how_it_is_read(source: TokenSource) -> None:
    whole = source.read(0, 1000, 41_000)
    parts = [source.read(0, begin, begin + 8000) for begin in range(1000, 41_000, 8000)]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    starts = [part.starts + 8000 * number for number, part in enumerate(parts)]
    assert np.array_equal(whole.starts, np.concatenate(starts)) and len(whole.starts) > 4
    again, other = source_of().read(0, 1000, 41_000), source_of(seed=1).read(0, 1000, 41_000)
    assert np.array_equal(again.tokens, whole.tokens) and np.array_equal(again.starts, whole.starts)
    assert not np.array_equal(other.tokens, whole.tokens) and not np.array_equal(other.starts, whole.starts)


def test_documents_end_with_a_token_of_their_own(source: TokenSource) -> None:
    span = source.read(0, 0, 1 << 20)
    assert span.starts[0] == 0 and span.tokens.dtype == np.uint16
    assert np.array_equal(np.flatnonzero(span.tokens == 0), span.starts[1:] - 1)
    counts = np.bincount(span.tokens, minlength=264)
    assert len(counts) == 264 and counts[1] / counts[10:12].sum() == pytest.approx(np.log(2) / np.log(1.2), rel=0.05)


def test_lengths_are_those_of_the_description(source: TokenSource) -> None:
    lengths = np.diff(source.read(0, 0, 1 << 26).starts)
    short = np.sort(lengths)
    assert 1900 < lengths.mean() < 2400
    assert 640 < np.median(lengths) < 720  # of 600 and, one in ten, 6,000
    assert 0.5 < lengths[lengths >= 4096].sum() / lengths.sum() < 0.72 and short[0] >= 2


@pytest.mark.parametrize("kind", [{}, {"seq_len": 64, "global_batch_size": 5}])
def test_every_number_of_ranks_reads_the_same_batches(kind: dict[str, Any]) -> None:
    alone, state = global_batches(config_of(), 4, **kind)
    for size in (2, 3):
        assert global_batches(config_of(), 4, size, **kind)[0] == alone
    assert global_batches(config_of(), 4, seed=4, **kind)[0] != alone
    later, _ = global_batches(config_of(), 2, 3, state, **kind)
    assert [batch.first for batch in later] == [alone[-1].first + n * alone[-1].rows for n in (1, 2)]


def test_another_vocabulary_is_another_dataset(tmp_path: Path) -> None:
    prints = [source_of(**options).fingerprint for options in ({}, {}, {"seed": 1}, {"vocab_size": 70_000})]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    wide = source_of(vocab_size=70_000).read(0, 0, 50_000).tokens
    assert wide.dtype == np.uint32 and wide.max() > 1 << 16
    assert open_data(config_of()).save_tokenizer(tmp_path) == [] and not list(tmp_path.iterdir())


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"synthetic tokens .*264 tokens, and model\.vocab_size is 100"):
        open_data(config_of(), vocab_size=100)
    with pytest.raises(UserError, match="vocab_size"):
        open_source(DatasetConfig(path="synthetic", type="synthetic"), DataConfig(train="unused"))
    with pytest.raises(UserError, match="'data/mine' of type synthetic would not be read"):
        options = {"vocab_size": 264}
        open_source(DatasetConfig(path="data/mine", type="synthetic", options=options), DataConfig(train="unused"))
