"""How a parameter is split over tensor parallel ranks.

A parameter consists of blocks along one axis (heads of q; z, x and dt of a packed projection). Each block is split into
equal contiguous ranges that contain complete units (a head, a group); a rank takes one range of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.parallel.global_tensor import ShardSpec


class UnitBlock(NamedTuple):
    """A block of a parameter: its length along the split axis, and the number of indivisible units in it."""

    size: int
    units: int

    def range_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the rank's ``(start, stop)`` in the block; with fewer units than ranks, several ranks share a unit."""
        width = self.size // self.units
        if self.units % ranks == 0:
            count = self.units // ranks
            return rank * count * width, (rank + 1) * count * width
        assert ranks % self.units == 0, f"{self.units} units over {ranks} ranks"
        unit = rank * self.units // ranks
        return unit * width, (unit + 1) * width


Blocks = Callable[[ModelConfig], Sequence[UnitBlock]]


@dataclass(frozen=True)
class Split:
    """A split along ``axis``, block by block.

    If a block has fewer units than there are ranks, the parameter is replicated (``ShardSpec.axis`` is None): each rank
    reads only its ranges, and the engine sums the gradients.
    """

    axis: int
    blocks: Blocks

    def ranges(self, config: ModelConfig, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges that the rank reads, as ``(start, stop)`` along the axis."""
        found, begin = [], 0
        for block in self.blocks(config):
            start, stop = block.range_of(rank, ranks)
            found.append((begin + start, begin + stop))
            begin += block.size
        return tuple(found)

    def owned(self, config: ModelConfig, ranks: int) -> bool:
        """True if every element belongs to exactly one rank."""
        return all(block.units % ranks == 0 for block in self.blocks(config))

    def spec(self, shape: tuple[int, ...], config: ModelConfig, rank: int, ranks: int) -> ShardSpec:
        """Return the shard that the rank holds."""
        if not self.owned(config, ranks):
            return ShardSpec(shape)
        return ShardSpec(shape, self.axis, self.ranges(config, rank, ranks))


def column(blocks: Blocks) -> Split:
    """Split the outputs of a projection (rows of its weight), or per-channel parameters applied to these outputs."""
    return Split(0, blocks)


def row(blocks: Blocks) -> Split:
    """Split the inputs of a projection (columns of its weight); its outputs must be summed over the ranks."""
    return Split(1, blocks)
