"""Positions of parameters in flat buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

ALIGNMENT = 64
"""Elements: each parameter and each shard starts at a multiple, as vector loads and matrix products need it."""


class FlatSlice(NamedTuple):
    """Consecutive elements of a parameter (of its tensor parallel shard) in one rank's shard of a flat buffer."""

    name: str
    group: int
    """Index of the flat buffer."""
    offset: int
    """In the rank's shard of the buffer."""
    start: int
    """In the parameter, row-major."""
    length: int
    """Elements; 0 where this rank holds none of the parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """Return the elements; they share memory with ``flat``."""
        return flat.narrow(0, self.offset, self.length)


def slice_between(begin: int, end: int, name: str, group: int, first: int, count: int) -> FlatSlice:
    """Return the slice of a parameter of ``count`` elements from ``first`` on that lies in the shard [begin, end)."""
    low, high = max(begin, first), min(end, first + count)
    return (
        FlatSlice(name, group, low - begin, low - first, high - low) if low < high else FlatSlice(name, group, 0, 0, 0)
    )


class FlatLayout:
    """Order and offsets of parameters in a buffer of which each of ``ranks`` ranks owns an equal shard.

    Parameters with weight decay come first, so that a shard has at most two parts for the optimizer.
    """

    def __init__(self, counts: dict[str, int], decays: Callable[[str], bool], ranks: int) -> None:
        """Lay out parameters.

        Args:
            counts: elements of each parameter by name.
            decays: tells whether weight decay applies to the parameter of a name.
            ranks: number of equal shards.
        """
        self.names = sorted(counts, key=lambda name: not decays(name))
        self.starts: dict[str, int] = {}
        end = border = 0
        for name in self.names:
            self.starts[name] = end
            end = _round_up(end + counts[name])
            border = end if decays(name) else border
        self.counts = counts
        self.shard = _round_up(-(-end // ranks))
        """Elements of each rank's shard."""
        self.size = ranks * self.shard
        """Elements of the buffer."""
        self._border = border
        after = [*list(self.starts.values())[1:], self.size]
        gaps = [stop - self.starts[name] - counts[name] for name, stop in zip(self.names, after, strict=True)]
        self.sizes = [size for name, gap in zip(self.names, gaps, strict=True) for size in (counts[name], gap)]
        """Elements of each parameter and of the gap behind it, in turn."""

    def border(self, rank: int) -> int:
        """Return the number of elements of a rank's shard to which weight decay applies; they come first."""
        return min(max(self._border - rank * self.shard, 0), self.shard)

    def slices(self, rank: int, group: int) -> list[FlatSlice]:
        """Return a rank's slice of each parameter, in the buffer's order; ``group`` is the buffer's index."""
        begin, end = rank * self.shard, (rank + 1) * self.shard
        return [slice_between(begin, end, name, group, self.starts[name], self.counts[name]) for name in self.names]


def _round_up(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT
