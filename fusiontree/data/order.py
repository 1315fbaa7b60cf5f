"""The order of rows: keyed permutations that are computed, not stored.

Any row's place is computed in O(1) from the seed, so a run resumes at any row without reading or replaying others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusiontree.utils.hashing import stable_hash

_ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """A pseudo-random permutation of range(size), determined by a key.

    A Feistel network over the smallest even number of bits that represents ``size``; it is applied again to results
    outside the range until they are inside (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """

    def __init__(self, size: int, key: int) -> None:
        """Create the permutation of ``size`` >= 1 elements."""
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [stable_hash("round", key, number) for number in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Return the image of ``index``."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")
        half, mask = self._half, self._mask
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                # The finaliser of SplitMix64 (Steele, Lea and Flood 2014), which spreads every bit over all.
                mixed = right + key & _WORD
                mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
                mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
                left, right = right, left ^ (mixed ^ mixed >> 31) & mask
            index = left << half | right
            if index < self.size:
                return index


@dataclass(frozen=True)
class RowPlace:
    """The place of a row in a dataset."""

    shard: int
    row: int
    """Number of the row in the shard."""


@dataclass(frozen=True)
class _ShuffleGroup:
    """Shards whose rows are shuffled together."""

    shards: np.ndarray
    ends: np.ndarray
    """Cumulative number of rows at the end of each shard of the group."""
    permutation: Permutation | None


class _Epoch:
    """Order of the shards in one epoch, and the ends of its shuffle groups; stores nothing per row."""

    def __init__(self, rows: np.ndarray, seed: int, epoch: int, group_size: int, shuffle: bool) -> None:
        count = len(rows)
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        self.shards = np.arange(count)
        if shuffle:
            keys = [stable_hash("shards", seed, epoch, shard) for shard in range(count)]
            self.shards = np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")
        self.sums = np.cumsum(rows[self.shards])
        # Groups of nearly equal size: a last group of a single shard would not be mixed with other shards.
        groups = -(-count // group_size)
        self.firsts = [index * count // groups for index in range(groups + 1)]
        self.group_ends = self.sums[np.asarray(self.firsts[1:]) - 1].tolist()
        self._groups: dict[int, _ShuffleGroup] = {}

    def first_row(self, group: int) -> int:
        return self.group_ends[group - 1] if group else 0

    def group(self, number: int) -> _ShuffleGroup:
        found = self._groups.get(number)
        if found is None:
            first, last = self.firsts[number], self.firsts[number + 1]
            begin, size = self.first_row(number), self.group_ends[number] - self.first_row(number)
            key = stable_hash("rows", self.seed, self.epoch, number)
            permutation = Permutation(size, key) if self.shuffle and size else None
            found = _ShuffleGroup(self.shards[first:last], self.sums[first:last] - begin, permutation)
            if len(self._groups) > 8:
                self._groups.clear()
            self._groups[number] = found
        return found


class RowOrder:
    """Visits every row of every shard once per epoch, in a different order each epoch.

    Shards are shuffled and divided into groups; the rows of a group are shuffled together. So reads stay within a few
    shards for a long time, and neighbouring rows of a batch come from different documents. Thread-safe: the only state
    is a cache of values that can be recomputed.
    """

    def __init__(self, rows_of_shards: Sequence[int], *, seed: int, group_size: int, shuffle: bool) -> None:
        """Prepare the order.

        Args:
            rows_of_shards: number of rows of each shard; at least one must be positive.
            seed: determines the order.
            group_size: maximum number of shards whose rows are shuffled together.
            shuffle: False visits shards and rows in stored order.
        """
        self.rows = np.asarray(rows_of_shards, dtype=np.int64)
        self.total = int(self.rows.sum())
        assert self.total > 0
        self._seed, self._group_size, self._shuffle = seed, group_size, shuffle
        self._epochs: dict[int, _Epoch] = {}

    def place(self, index: int) -> tuple[int, RowPlace]:
        """Return the epoch and the place of the row with index ``index`` in the order over all epochs."""
        number, index = divmod(index, self.total)
        epoch = self._epoch(number)
        which = bisect_right(epoch.group_ends, index)
        group = epoch.group(which)
        inside = index - epoch.first_row(which)
        if group.permutation is not None:
            inside = group.permutation[inside]
        slot = int(np.searchsorted(group.ends, inside, side="right"))
        return number, RowPlace(int(group.shards[slot]), inside - (int(group.ends[slot - 1]) if slot else 0))

    def shards_from(self, index: int) -> Iterator[list[int]]:
        """Yield groups of shards in the order in which rows from ``index`` on need them, without end.

        The shards of a group are needed at the same time: a shuffle group if rows are shuffled, else a single shard.
        """
        number, index = divmod(index, self.total)
        while True:
            epoch = self._epoch(number)
            if self._shuffle:
                for which in range(bisect_right(epoch.group_ends, index), len(epoch.group_ends)):
                    yield [int(shard) for shard in epoch.group(which).shards if self.rows[shard]]
            else:
                first = int(np.searchsorted(epoch.sums, index, side="right"))
                for shard in range(first, len(self.rows)):
                    if self.rows[shard]:
                        yield [shard]
            number, index = number + 1, 0

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = _Epoch(self.rows, self._seed, number, self._group_size, self._shuffle)
            kept = {n: e for n, e in list(self._epochs.items()) if abs(n - number) == 1}
            self._epochs = kept | {number: epoch}
        return epoch


class LengthSchedule:
    """The length curriculum: row length by step; after the last stage it is ``seq_len``.

    A stage of shorter rows splits each row of ``seq_len`` into subrows. So it changes neither the number of tokens per
    step nor the order of the text, and every epoch visits every row once even if a stage ends within the epoch.
    """

    def __init__(self, seq_len: int, stages: Sequence[Sequence[int]] | None) -> None:
        """Prepare.

        Args:
            seq_len: final length of a row.
            stages: ``[row length, steps]`` each.

        Raises:
            ValueError: a stage's length does not divide ``seq_len``, or a stage has less than one step.
        """
        self.seq_len = seq_len
        self.stages = [(int(length), int(steps)) for length, steps in stages or []]
        for length, steps in self.stages:
            if length < 2 or steps < 1 or seq_len % length:
                raise ValueError(
                    f"curriculum stage [{length}, {steps}] needs a length of at least 2 that divides seq_len "
                    f"{seq_len}, and at least one step"
                )

    def length(self, step: int) -> int:
        """Return the row length of a step; the first step is 1."""
        for length, steps in self.stages:
            if step <= steps:
                return length
            step -= steps
        return self.seq_len
