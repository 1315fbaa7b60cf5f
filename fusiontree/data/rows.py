"""Rows of a dataset: fixed-length ranges of a shard's concatenated documents.

A row of length S reads S + 1 tokens with stride S, so every token but a shard's last few is an input once per epoch. A
curriculum stage of a shorter length splits each row into subrows. Shape legend: S tokens of a row.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fusiontree.data.batch import IGNORED, RowArrays, RowsOfStep
from fusiontree.data.format import ShardDamage
from fusiontree.data.order import RowPlace
from fusiontree.data.sources.base import TokenSource, TokenSpan
from fusiontree.utils.errors import UserError

_ROW_ID = struct.Struct("<qiI")
"""Number, source and hash of a row."""


class RowReader:
    """Reads rows of one token source. Threads may share it."""

    def __init__(self, source: TokenSource, seq_len: int, vocab_size: int) -> None:
        """Prepare to read.

        Raises:
            UserError: the source has no row of ``seq_len`` tokens, or its vocabulary is larger than the model's.
        """
        self.source, self.seq_len, self.vocab_size = source, seq_len, vocab_size
        tokenizer = source.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"dataset '{source.place}' was made with tokenizer '{tokenizer.name}' of {tokenizer.vocab_size} "
                f"tokens, and model.vocab_size is {vocab_size}; set model.vocab_size to at least "
                f"{tokenizer.vocab_size} or use a dataset made with the model's tokenizer"
            )
        self.rows_of_shards = [max(0, (tokens - 1) // seq_len) for tokens in source.shard_tokens]
        self.rows = sum(self.rows_of_shards)
        if not self.rows:
            raise UserError(
                f"dataset '{source.place}' has no row of training.seq_len {seq_len}: its largest shard holds "
                f"{max(source.shard_tokens, default=0)} tokens; use shorter rows or more text per shard"
            )
        self._ramp_S = np.arange(seq_len)

    def note_on_unread(self) -> str:
        """Return a sentence on tokens that no row contains, empty if they are less than 1%.

        Rows do not cross shards, so the end of each shard, or a shard shorter than a row, is not read.
        """
        tokens = self.source.shard_tokens
        unread = sum(n - rows * self.seq_len - (rows > 0) for n, rows in zip(tokens, self.rows_of_shards, strict=True))
        total = sum(tokens)
        if unread * 100 < total:
            return ""
        short = sum(not rows for rows in self.rows_of_shards)
        return (
            f"dataset '{self.source.place}': {unread / total:.0%} of its tokens are never read, because rows of "
            f"{self.seq_len} tokens do not cross shards and {short:,} of {len(tokens):,} shards are shorter than that; "
            "build it with a larger --shard-mb, or use shorter rows"
        )

    def read(self, place: RowPlace, out: RowArrays, *, subrow: int | None = None) -> int:
        """Write the row at ``place`` into ``out`` and return a 32-bit hash of it.

        Args:
            place: of the row.
            out: receives tokens, labels and positions.
            subrow: length of the subrows into which a curriculum stage splits the row; positions restart at each.

        Raises:
            ShardDamage: a document of the row cannot be read or differs from its hash.
            UserError: the row contains a token outside the model's vocabulary, or the dataset cannot be reached.
        """
        span = self._span(place)
        seq_len, starts = self.seq_len, span.starts
        out.input_ids_S[:] = span.tokens[:-1]
        out.labels_S[:] = span.tokens[1:]
        out.labels_S[starts[starts > 0] - 1] = IGNORED  # no label crosses into another document
        bounds = starts.tolist()
        if subrow and subrow < seq_len:
            bounds = sorted({*bounds, *range(0, seq_len, subrow)})
        elif not bounds or bounds[0]:
            bounds = [0, *bounds]
        if bounds[-1] < seq_len:
            bounds.append(seq_len)
        for begin, end in pairwise(bounds):
            out.positions_S[begin:end] = self._ramp_S[: end - begin]
        return zlib.crc32(starts.data, zlib.crc32(span.tokens.data))

    def _span(self, place: RowPlace) -> TokenSpan:
        """Read a row's tokens and the next token, and check them."""
        source, begin, count = self.source, place.row * self.seq_len, self.seq_len + 1
        span = source.read(place.shard, begin, begin + count)
        if span.tokens.shape != (count,) or span.tokens.dtype.kind != "u" or span.starts.dtype != np.int64:
            raise UserError(
                f"dataset '{source.place}' of type {type(source).__name__} returned {span.tokens.dtype} tokens of "
                f"shape {span.tokens.shape} and {span.starts.dtype} starts; a source returns unsigned tokens of shape "
                f"({count},) and int64 starts here"
            )
        largest = int(span.tokens.max())
        if largest >= self.vocab_size:
            raise UserError(
                f"{source.locate(place.shard, begin + int(span.tokens.argmax()))} holds token {largest}, and "
                f"model.vocab_size is {self.vocab_size}: the dataset does not fit its own tokenizer "
                f"'{source.tokenizer.name}'; build it again"
            )
        return span


@dataclass(frozen=True)
class WantedRow:
    """A row to read: its index in the step, the number of its first curriculum row, and its place in the dataset."""

    index: int
    number: int
    source: int
    place: RowPlace


def read_rows(
    rows: RowsOfStep, wanted: Sequence[WantedRow], readers: Sequence[RowReader], on_damage: str
) -> tuple[list[str], int]:
    """Read rows into their slots of ``rows``; return a message per skipped row, and the hash of all rows.

    Raises:
        UserError: a row is damaged and ``on_damage`` is stop, or a dataset cannot be reached.
    """
    damages, total = [], 0
    for item in wanted:
        row_hash, weight = 0, 1.0
        try:
            row_hash = readers[item.source].read(item.place, rows.place(item.index), subrow=rows.length)
        except ShardDamage as damage:
            message = f"row {item.number} of the run (row {item.place.row} of its shard): {damage}"
            if on_damage == "stop":
                raise UserError(
                    f"{message}; mend the shard (fusiontree data verify names all damage) or set data.on_damage=skip"
                ) from damage
            damages.append(message)
            rows.blank(item.index)
            weight = 0.0
        rows.describe(item.index, item.number, item.source, weight)
        total += zlib.crc32(_ROW_ID.pack(item.number, item.source, row_hash))
    return damages, total & 0xFFFF_FFFF
