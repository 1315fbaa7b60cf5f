"""Tasks on random tokens as training data: copy, recall and needle, computed instead of read.

A model that was trained on them shows whether it *can* retrieve at all, which a score of zero after text alone cannot.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np
import torch

from fusiontree.data.answer_rows import AnswerRows, copy_rows, needle_rows, recall_rows
from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.format import token_dtype
from fusiontree.data.sources.base import TOKEN_SOURCES, TokenSource, TokenSpan, open_source, source_options
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash
from fusiontree.utils.settings import Section, setting

_TOKENS = 1 << 30
TaskName = Literal["copy", "recall", "needle"]


class TaskOptions(Section):
    """Options of a dataset of type tasks."""

    tasks: list[TaskName] = setting(["copy", "recall"], "Tasks, in turn.", min_length=1)
    length: int = setting(1024, "Length of a document, with the token that ends it.", unit="tokens", ge=16, le=1 << 24)
    tokenizer_of: str | None = setting(None, "Dataset whose tokens are drawn, to mix tasks with it; null: bytes.")
    needle_tokens: int = setting(4, "Length of a needle's key, and of its value.", unit="tokens", ge=1)
    seed: int = setting(0, "Determines the tokens.", ge=0)


class TaskSource(TokenSource):
    """2^30 tokens of documents that ask for what they said before; one shard, a function of the options alone.

    Documents are rows of ``fusiontree evaluate --tasks copy recall needle`` with other tokens, which no evaluation
    draws. ``recall`` has as many pairs as fit, so that a quarter of its tokens are answers; half of those of ``copy``
    are. All other tokens are random: the loss cannot fall below the logarithm of the alphabet on them.
    """

    def __init__(self, dataset: DatasetConfig, config: DataConfig) -> None:
        """Open the dataset whose tokenizer is used, if there is one.

        Raises:
            UserError: the dataset's path is not ``tasks``, an option is wrong, or a task does not fit into a document.
        """
        options = source_options(dataset, TaskOptions)
        if dataset.path != "tasks":
            raise UserError(
                f"dataset '{dataset.path}' of type tasks would not be read; write path: tasks to train on tasks, or "
                f"remove the type to read the dataset"
            )
        if options.tokenizer_of is None:
            self.tokenizer = ByteTokenizer().info
        else:
            model = open_source(DatasetConfig(path=options.tokenizer_of), config)
            self.tokenizer, self.tokenizer_path = model.tokenizer, model.tokenizer_path
        self.options = options
        self.place = f"{' and '.join(options.tasks)} of {options.length:,} random tokens (seed {options.seed})"
        content = [options.model_dump(exclude={"tokenizer_of"}), self.tokenizer.sha256]
        self.fingerprint = hashlib.sha256(json.dumps(["tasks 1", content], sort_keys=True).encode()).hexdigest()
        self.shard_tokens = [_TOKENS // options.length * options.length]
        tokens_A = torch.arange(self.tokenizer.vocab_size)
        self._alphabet_A = tokens_A[tokens_A != self.tokenizer.eos_id]
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        for number in range(len(options.tasks)):
            self._document(number)

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """See :class:`TokenSource`."""
        length = self.options.length
        first, last = begin // length, -(-end // length)
        tokens = np.concatenate([self._document(number) for number in range(first, last)])
        starts = np.arange(-(-begin // length), last, dtype=np.int64) * length - begin
        return TokenSpan(tokens[begin - first * length : end - first * length], starts)

    def _document(self, number: int) -> np.ndarray:
        """Return the tokens of a document."""
        task = self.options.tasks[number % len(self.options.tasks)]
        tokens = self.options.length - 1
        rows = self._rows(task, tokens, stable_hash("training", self.options.seed, number))
        # A copy of an odd number of tokens lacks the first of them, which nothing asks for.
        text = torch.cat([rows.input_ids_BS[0], rows.labels_BS[0, -1:]])[-tokens:]
        return np.append(text.numpy(), self.tokenizer.eos_id).astype(self._dtype)

    def _rows(self, task: TaskName, tokens: int, seed: int) -> AnswerRows:
        """Return a row and its last label, together at least ``tokens``."""
        if task == "copy":
            return copy_rows(self._alphabet_A, tokens, 1, seed)
        if task == "recall":
            pairs = min(tokens // 4, self._alphabet_A.numel() // 2)
            return recall_rows(self._alphabet_A, tokens - 1, pairs, 1, seed)
        depth = stable_hash("depth", seed) % 1001 / 1000
        return needle_rows(self._alphabet_A, tokens - 1, depth, 1, self.options.needle_tokens, seed)


TOKEN_SOURCES.register("tasks", TaskSource)
