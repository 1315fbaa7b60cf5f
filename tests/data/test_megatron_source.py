"""Megatron's corpora read in place, against the same documents in token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.base import open_source
from fusiontree.data.tokenizers import ByteTokenizer, load_tokenizer
from fusiontree.utils.errors import UserError
from tests.data.batches import global_batches, open_data
from tests.data.datasets import documents, write

indexed: Any = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is an extra: fusiontree[megatron]"
)


def write_corpus(path: Path, docs: list[np.ndarray], dtype: type = np.uint16) -> Path:
    """Write documents, some of them as two sequences."""
    import torch

    builder = indexed.IndexedDatasetBuilder(str(path), dtype=dtype)
    for number, doc in enumerate(docs):
        parts = np.split(doc, [len(doc) // 2]) if number % 3 == 0 and len(doc) > 1 else [doc]
        for part in parts:
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))
    return path


def config_of(file: Path, **options: Any) -> DataConfig:
    source = {"path": str(file), "weight": 1.0, "type": "megatron", "options": {"tokenizer": "byte"} | options}
    return DataConfig.model_validate({"train": [source], "num_workers": 0})


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_corpus_gives_the_tokens_and_documents_of_a_shard(tmp_path: Path, dtype: type) -> None:
    docs = documents(80, seed=8)
    shards = write(tmp_path / "shards", [docs], ByteTokenizer.info)
    corpus, _ = global_batches(config_of(write_corpus(tmp_path / "corpus.bin", docs, dtype)), 30)
    expected, _ = global_batches(DataConfig(train=str(shards), num_workers=0), 30)
    assert [batch.digest for batch in corpus] == [batch.digest for batch in expected]
    if dtype is np.uint16:  # the hash of a row is of its bytes
        assert corpus == expected


def test_another_corpus_is_another_dataset(tmp_path: Path) -> None:
    docs = documents(80, seed=8)
    first = write_corpus(tmp_path / "a.bin", docs)
    same = write_corpus(tmp_path / "b.bin", docs)
    docs[7][0] ^= 1
    changed = write_corpus(tmp_path / "c.bin", docs)
    prints = [open_data(config_of(file)).sources[0].fingerprint for file in (first, same, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_the_tokenizer_is_kept(tmp_path: Path) -> None:
    data = open_data(config_of(write_corpus(tmp_path / "a.bin", documents(80, seed=8))))
    data.save_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).info == ByteTokenizer.info


def test_wrong_entries_are_refused(tmp_path: Path) -> None:
    config = DataConfig(train="x")

    def refuse(path: Path, message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            open_source(DatasetConfig(path=str(path), type="megatron", options=options), config)

    corpus = write_corpus(tmp_path / "a.bin", documents(3, seed=1))
    refuse(corpus, "tokenizer: Field required; known options: tokenizer, eos")
    refuse(corpus.with_suffix(".idx"), r"is not a \.bin file with its \.idx beside it", tokenizer="byte")
    corpus.with_suffix(".idx").write_bytes(b"something else")
    refuse(corpus, "cannot be read as a Megatron corpus", tokenizer="byte")
