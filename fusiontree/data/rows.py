"""Rows of a dataset: fixed lengths cut from a shard's concatenated documents.

A row of length S reads S + 1 tokens with stride S, so every token but a shard's last few is an input once an epoch.
Shape legend: S tokens of a row.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusiontree.data.batch import IGNORED
from fusiontree.data.format import DatasetInfo, ShardDamage, read_dataset
from fusiontree.data.index import Shard
from fusiontree.data.order import RowPlace
from fusiontree.data.verify import open_shard
from fusiontree.utils.errors import UserError

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Row:
    """One row, ready to be batched."""

    input_ids_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray


class RowReader:
    """Reads rows of one dataset."""

    def __init__(self, folder: Path, seq_len: int, vocab_size: int) -> None:
        """Read dataset.json; shards are opened when their rows are read.

        Raises:
            UserError: no dataset there, no row of ``seq_len`` tokens in it, or its tokenizer has more tokens than the
                model.
        """
        self.folder, self.seq_len, self.vocab_size = folder, seq_len, vocab_size
        self.info: DatasetInfo = read_dataset(folder)
        if self.info.tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"dataset '{folder}' was made with tokenizer '{self.info.tokenizer.name}' of "
                f"{self.info.tokenizer.vocab_size} tokens, and model.vocab_size is {vocab_size}; set model.vocab_size "
                f"to at least {self.info.tokenizer.vocab_size} or use a dataset made with the model's tokenizer"
            )
        self.rows_of_shards = [max(0, (shard.tokens - 1) // seq_len) for shard in self.info.shards]
        if not sum(self.rows_of_shards):
            longest = max(shard.tokens for shard in self.info.shards)
            raise UserError(
                f"dataset '{folder}' has no row of training.seq_len {seq_len}: its largest shard holds {longest} "
                f"tokens; use shorter rows or more text a shard"
            )
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def read(self, place: RowPlace) -> Row:
        """Read the row at ``place``.

        Raises:
            ShardDamage: its documents cannot be read or differ from their hashes, or a token is no token of the
                model.
        """
        shard = self._open(place.shard)
        begin = place.row * self.seq_len
        span = shard.read(begin, begin + self.seq_len + 1)
        tokens = span.tokens.astype(np.int64)
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise ShardDamage(
                shard.tar,
                shard.key(shard.document_at(begin + int(tokens.argmax()))),
                f"holds token {largest}, and model.vocab_size is {self.vocab_size}",
            )
        labels = tokens[1:].copy()
        labels[span.positions[1:] == 0] = IGNORED  # no label crosses into another document
        return Row(tokens[:-1], labels, row_positions(span.positions[:-1]))

    def _open(self, number: int) -> Shard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = open_shard(self.folder, self.info.shards[number])
        self._shards[number] = shard
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return shard


def row_positions(positions_S: np.ndarray) -> np.ndarray:
    """Restart positions at the row's first token: what a document holds before the row cannot be seen."""
    index_S = np.arange(len(positions_S))
    starts_S = np.where((positions_S == 0) | (index_S == 0), index_S, 0)
    return index_S - np.maximum.accumulate(starts_S)
