"""Which source each row of the run comes from: by weight, evenly spread, computed for any row number.

Row n belongs to the source in whose interval frac(n phi + offset) falls, intervals as long as the weights, phi the
golden ratio's fraction: of all sequences the one that spreads most evenly. How many rows a source gave before row n
is a sum of floors, found in O(log) steps, so a resume anywhere needs no replay.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import isqrt

from fusiontree.utils.hashing import stable_hash

_MODULUS = 1 << 62
_STEP = (isqrt(5 << 124) - _MODULUS) >> 1 | 1  # 2^62 (sqrt(5) - 1) / 2, made odd so that it meets every residue


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
