"""The order in which rows are visited: keyed permutations that are computed, not stored.

Any row's place is found in O(1) from the seed, so a run resumes anywhere without reading or replaying anything.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusiontree.utils.hashing import stable_hash

_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of range(size), decided by a key.

    A Feistel network over the smallest even number of bits that holds ``size``; values outside are fed in again until
    they fall inside (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, size: int, key: int) -> None:
        """Make the permutation of ``size`` >= 1 elements."""
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [key.to_bytes(8, "little") + bytes([r]) for r in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Return where ``index`` goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                mixed = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
                left, right = right, left ^ (int.from_bytes(mixed, "little") & self._mask)
            index = left << self._half | right
            if index < self.size:
                return index


@dataclass(frozen=True)
class RowPlace:
    """A row of a dataset."""

    shard: int
    row: int
    """Number of the row in the shard."""


class RowOrder:
    """Visits every row of every shard once an epoch, in an order of its own each epoch.

    Shards are shuffled and taken in blocks; the rows of a block are mixed with each other. So reads stay within a few
    shards for a long time, and neighbours in a batch come from different documents.
    """

    def __init__(self, rows_of_shards: Sequence[int], *, seed: int, block: int, shuffle: bool) -> None:
        """Prepare the order.

        Args:
            rows_of_shards: number of rows of each shard.
            seed: decides the order.
            block: shards whose rows are mixed.
            shuffle: False visits shards and rows as they lie.
        """
        self.rows = np.asarray(rows_of_shards, dtype=np.int64)
        self.total = int(self.rows.sum())
        self._seed, self._block, self._shuffle = seed, block, shuffle
        self._epoch = -1
        self._permutations: dict[int, Permutation] = {}

    def place(self, index: int) -> tuple[int, RowPlace]:
        """Return the epoch and the place of the ``index``-th row ever visited."""
        epoch, index = divmod(index, self.total)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        block = bisect_right(self._block_ends, index)
        first_row = self._block_ends[block - 1] if block else 0
        first, last = block * self._block, (block + 1) * self._block
        inside = index - first_row
        if self._shuffle:
            if block not in self._permutations:
                if len(self._permutations) > 64:
                    self._permutations.clear()
                size = self._block_ends[block] - first_row
                self._permutations[block] = Permutation(size, stable_hash("rows", self._seed, epoch, block))
            inside = self._permutations[block][inside]
        ends = np.cumsum(self.rows[self._shards[first:last]])
        slot = int(np.searchsorted(ends, inside, side="right"))
        return epoch, RowPlace(int(self._shards[first + slot]), inside - (int(ends[slot - 1]) if slot else 0))

    def _start_epoch(self, epoch: int) -> None:
        count = len(self.rows)
        self._shards = np.arange(count)
        if self._shuffle:
            keys = [stable_hash("shards", self._seed, epoch, shard) for shard in range(count)]
            self._shards = np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
        sums = np.cumsum(self.rows[self._shards])
        lasts = [min(begin + self._block, count) - 1 for begin in range(0, count, self._block)]
        self._block_ends = sums[lasts].tolist()
        self._permutations = {}
        self._epoch = epoch
