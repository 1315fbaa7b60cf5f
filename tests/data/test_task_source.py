"""Tasks as training data: documents hold their answers, are read alike in any pieces, and no evaluation draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusiontree.data.answer_rows import copy_rows
from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.base import TokenSource, open_source
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import build_data

LENGTH = 64
END = 256
"""Token of the byte tokenizer that ends a document."""


def source_of(**options: Any) -> TokenSource:
    given = {"length": LENGTH} | options
    dataset = DatasetConfig(path="tasks", type="tasks", options={k: v for k, v in given.items() if v is not None})
    return open_source(dataset, DataConfig(train="unused"))


def documents(source: TokenSource, count: int) -> list[np.ndarray]:
    span = source.read(0, 0, count * LENGTH)
    assert len(span.tokens) == count * LENGTH
    assert np.array_equal(span.starts, np.arange(count) * LENGTH)
    return np.split(span.tokens, count)


def test_a_range_does_not_depend_on_how_it_is_read() -> None:
    source = source_of(tasks=["copy", "recall", "needle"])
    whole = source.read(0, 1000, 4000)
    parts = [source.read(0, begin, begin + 500) for begin in range(1000, 4000, 500)]
    assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
    starts = [part.starts + 500 * number for number, part in enumerate(parts)]
    assert np.array_equal(whole.starts, np.concatenate(starts)) and whole.starts[0] == -1000 % LENGTH
    other = source_of(tasks=["copy", "recall", "needle"], seed=1)
    assert not np.array_equal(other.read(0, 1000, 4000).tokens, whole.tokens)
    assert other.fingerprint != source.fingerprint
    assert source.shard_tokens[0] % LENGTH == 0 and source.read(0, source.shard_tokens[0] - 1, source.shard_tokens[0])


def test_documents_hold_their_answers_and_end_with_the_token_of_the_end() -> None:
    for number, text in enumerate(documents(source_of(tasks=["copy", "recall", "needle"]), 30)):
        assert len(text) == LENGTH and text[-1] == END and (text[:-1] < END).all()
        text = text[:-1].astype(int)
        if number % 3 == 0:
            assert np.array_equal(text[:31], text[32:])
        elif number % 3 == 1:  # pairs, then the same pairs in another order
            pairs = {tuple(pair) for pair in text[-30:].reshape(15, 2)}
            told = {(text[at], text[at + 1]) for at in range(0, len(text) - 31)}
            assert len(pairs) == 15 and pairs <= told
        else:
            needle = text[-8:]
            assert any(np.array_equal(text[at : at + 8], needle) for at in range(len(text) - 15))


def test_no_document_is_a_row_of_an_evaluation() -> None:
    """An evaluation with any small seed has other tokens than the training."""
    seen = {tuple(text[:20]) for text in documents(source_of(tasks=["copy"]), 200)}
    for seed in range(200):
        row = copy_rows(torch.arange(END), LENGTH - 1, 1, seed).input_ids_BS[0]
        assert tuple(row[1:21].numpy().astype(np.uint16)) not in seen


def test_the_tokenizer_of_a_dataset_lets_tasks_be_mixed_with_it(tmp_path: Path) -> None:
    dataset = build_data(tmp_path) / "train"
    text = open_source(DatasetConfig(path=str(dataset)), DataConfig(train="unused"))
    source = source_of(tokenizer_of=str(dataset))
    assert source.tokenizer == text.tokenizer
    ends = [text[-1] for text in documents(source, 4)]
    assert ends == [text.tokenizer.eos_id] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 100}, "vocab_size"),
        ({"tokenizer_of": "x"}, "x"),
        ({"tasks": ["count"]}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["needle"], "needle_tokens": 40}, "a row of 62 tokens holds no needle"),
        ({"length": 4}, "length"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        source_of(**options)


def test_another_path_is_refused() -> None:
    with pytest.raises(UserError, match="would not be read"):
        open_source(DatasetConfig(path="x", type="tasks"), DataConfig(train="unused"))
