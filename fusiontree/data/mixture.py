"""Which source each row of the run comes from: by weight, evenly spread, computed for any row number.

Row n belongs to the source in whose interval frac(n phi + offset) falls, intervals as long as the weights, phi the
golden ratio's fraction: of all sequences the one that spreads most evenly. How many rows a source gave before row n
is a sum of floors, found in O(log) steps, so a resume anywhere needs no replay. Where the weights of a run were
changed, the counts of the parts before are added.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import isqrt
from typing import NamedTuple

from fusiontree.utils.hashing import stable_hash

_MODULUS = 1 << 62
_STEP = (isqrt(5 << 124) - _MODULUS) >> 1 | 1  # 2^62 (sqrt(5) - 1) / 2, made odd so that it meets every residue


class MixturePart(NamedTuple):
    """Rows of a run whose sources have the same weights."""

    row: int
    """The first of them."""
    weights: list[float]


class Mixture:
    """Assigns rows to sources."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Prepare; ``weights`` are relative to their sum."""
        total = sum(weights)
        self._ends = [round(_MODULUS * (end / total)) for end in accumulate(weights)]
        self._ends[-1] = _MODULUS
        self._offset = stable_hash("mixture", seed) % _MODULUS

    def source(self, row: int) -> int:
        """Return the source of row number ``row``."""
        return bisect_right(self._ends, (row * _STEP + self._offset) % _MODULUS)

    def repeats(self, rows: int) -> bool:
        """Return whether sources nearly repeat after ``rows`` rows: for Fibonacci numbers from 89 on and the like."""
        drift = rows * _STEP % _MODULUS
        return min(drift, _MODULUS - drift) * 128 < _MODULUS

    def rows_before(self, row: int) -> list[int]:
        """Return how many of the rows before ``row`` each source gave."""
        below = [0, *(self._count_below(row, end) for end in self._ends[:-1]), row]
        return [after - before for before, after in pairwise(below)]

    def _count_below(self, rows: int, end: int) -> int:
        """Count n < rows with (n STEP + offset) mod MODULUS < end."""
        upper = floor_sum(rows, _MODULUS, _STEP, self._offset)
        return upper - floor_sum(rows, _MODULUS, _STEP, self._offset - end)


class ChangingMixture:
    """A mixture whose weights change at given rows; each source then continues behind the rows it gave before."""

    def __init__(self, parts: Sequence[MixturePart], seed: int) -> None:
        """Prepare; ``parts`` are ascending, the first begins at row 0, and a later part may have more sources."""
        self.parts = tuple(parts)
        self._mixtures = [Mixture(part.weights, seed) for part in parts]
        self._given: list[list[int]] = []
        """Rows that each source gave before each part, less those that the part's own mixture counts there."""
        for number, part in enumerate(parts):
            counted = self._mixtures[number].rows_before(part.row)
            before = self._counts(number - 1, part.row) if number else []
            before += [0] * (len(counted) - len(before))
            self._given.append([given - own for given, own in zip(before, counted, strict=True)])

    def source(self, row: int) -> int:
        """Return the source of row number ``row``."""
        return self._mixtures[self._part(row)].source(row)

    def repeats(self, rows: int) -> bool:
        """Return whether sources nearly repeat after ``rows`` rows; see :meth:`Mixture.repeats`."""
        return self._mixtures[0].repeats(rows)

    def rows_before(self, row: int) -> list[int]:
        """Return how many of the rows before ``row`` each source of the last part gave."""
        counts = self._counts(self._part(row), row)
        return counts + [0] * (len(self.parts[-1].weights) - len(counts))

    def _part(self, row: int) -> int:
        return bisect_right(self.parts, row, key=lambda part: part.row) - 1

    def _counts(self, part: int, row: int) -> list[int]:
        own = self._mixtures[part].rows_before(row)
        return [count + given for count, given in zip(own, self._given[part], strict=True)]


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return the sum of floor((a i + b) / m) for i from 0 to n - 1, in O(log m) steps (Euclid's algorithm)."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b, m, a = last // m, last % m, a, m
    return total
