"""Rows of a dataset: fixed-length ranges of a shard's concatenated documents.

A row of length S reads S + 1 tokens with stride S, so every token but a shard's last few is an input once per epoch.
Shape legend: S tokens of a row.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from itertools import pairwise

import numpy as np

from fusiontree.data.batch import IGNORED, RowArrays
from fusiontree.data.format import ShardDamage
from fusiontree.data.index import Shard, TokenSpan
from fusiontree.data.order import RowPlace
from fusiontree.data.sources import OpenShard, Source
from fusiontree.utils.errors import UserError


class _Kept:
    """A shard kept open between reads."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self.opened: OpenShard | None = None
        self.users = 0
        self.dropped = False

    def unpin(self) -> None:
        assert self.opened is not None
        self.opened.unpin()


class RowReader:
    """Reads rows of one dataset. Threads may share it."""

    def __init__(self, source: Source, seq_len: int, vocab_size: int, *, open_shards: int = 64) -> None:
        """Prepare to read; shards are opened when needed, and at most ``open_shards`` stay open.

        Raises:
            UserError: the dataset has no row of ``seq_len`` tokens, or its vocabulary is larger than the model's or
                than its data type can represent.
        """
        self.source, self.seq_len, self.vocab_size, self._open_shards = source, seq_len, vocab_size, open_shards
        info, tokenizer = source.info, source.info.tokenizer
        if info.dtype not in ("uint16", "uint32") or tokenizer.vocab_size - 1 > np.iinfo(info.dtype).max:
            raise UserError(
                f"dataset '{source.place}': tokens of type {info.dtype} cannot represent a vocabulary of "
                f"{tokenizer.vocab_size}; build the dataset again"
            )
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"dataset '{source.place}' was made with tokenizer '{tokenizer.name}' of {tokenizer.vocab_size} "
                f"tokens, and model.vocab_size is {vocab_size}; set model.vocab_size to at least "
                f"{tokenizer.vocab_size} or use a dataset made with the model's tokenizer"
            )
        self.rows_of_shards = [max(0, (shard.tokens - 1) // seq_len) for shard in info.shards]
        self.rows = sum(self.rows_of_shards)
        if not self.rows:
            longest = max(shard.tokens for shard in info.shards)
            raise UserError(
                f"dataset '{source.place}' has no row of training.seq_len {seq_len}: its largest shard holds {longest} "
                f"tokens; use shorter rows or more text per shard"
            )
        self.info = info
        self._item_bytes = np.dtype(info.dtype).itemsize
        self._ramp_S = np.arange(seq_len)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    def read(self, place: RowPlace, out: RowArrays, *, piece: int | None = None) -> int:
        """Write the row at ``place`` into ``out`` and return a 32-bit hash of it.

        Args:
            place: of the row.
            out: receives tokens, labels and positions.
            piece: length of the shorter rows that a curriculum stage splits the row into; positions restart at each.

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
        if piece and piece < seq_len:
            bounds = sorted({*bounds, *range(0, seq_len, piece)})
        elif not bounds or bounds[0]:
            bounds = [0, *bounds]
        if bounds[-1] < seq_len:
            bounds.append(seq_len)
        for begin, end in pairwise(bounds):
            out.positions_S[begin:end] = self._ramp_S[: end - begin]
        return zlib.crc32(starts.data, zlib.crc32(span.tokens.data))

    def _span(self, place: RowPlace) -> TokenSpan:
        """Read a row's tokens and the next token; retry after damage that can be repaired."""
        begin = place.row * self.seq_len
        attempt = 1
        while True:
            kept = self._take(place.shard)
            try:
                shard = self._pin(place.shard, kept)
                try:
                    span = shard.read(begin, begin + self.seq_len + 1)
                finally:
                    kept.unpin()
                largest = int(span.tokens.max())
                if largest < self.vocab_size:
                    return span
                document = shard.document_at(begin + int(span.tokens.argmax()))
                raise UserError(
                    f"{shard.name}, member {shard.key(document)} holds token {largest}, and model.vocab_size is "
                    f"{self.vocab_size}: the dataset does not fit its own tokenizer '{self.info.tokenizer.name}'; "
                    f"build it again"
                )
            except ShardDamage as damage:
                with self._lock:
                    mended = self._kept.get(place.shard) is not kept  # repaired by another thread meanwhile
                if not mended:
                    if not self.source.mend(place.shard, damage, attempt):
                        raise
                    attempt += 1
                    self._drop(place.shard, kept)
            finally:
                self._give_back(kept)

    def _pin(self, number: int, kept: _Kept) -> Shard:
        with kept.opening:
            if kept.opened is None:
                kept.opened = self.source.open(number)
        shard = kept.opened.pin()
        if shard.item_bytes != self._item_bytes:
            kept.unpin()
            raise ShardDamage(shard.name, None, f"has tokens of {shard.item_bytes} bytes, not {self._item_bytes}")
        return shard

    def _take(self, number: int) -> _Kept:
        with self._lock:
            kept = self._kept.setdefault(number, _Kept())
            self._kept.move_to_end(number)
            kept.users += 1
            return kept

    def _give_back(self, kept: _Kept) -> None:
        with self._lock:
            kept.users -= 1
            too_many = len(self._kept) - self._open_shards
            if too_many > 0:
                for number in [n for n, k in self._kept.items() if not k.users][:too_many]:
                    self._close(self._kept.pop(number))
            if kept.dropped and not kept.users:
                self._close(kept)

    @staticmethod
    def _close(kept: _Kept) -> None:
        if kept.opened is not None:
            kept.opened.close()
            kept.opened = None

    def _drop(self, number: int, kept: _Kept) -> None:
        with self._lock:
            if self._kept.get(number) is kept:
                del self._kept[number]
            kept.dropped = True

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for kept in self._kept.values():
                self._close(kept)
            self._kept.clear()
