"""How a parameter can be cut over tensor parallel ranks.

A parameter consists of blocks along one axis (heads of q; z, x and dt of a packed projection). Each block is cut into
equal contiguous ranges of whole units (a head, a group); a rank takes its range of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.parallel.global_tensor import ShardSpec


class UnitBlock(NamedTuple):
    """A block of a parameter: its length along the cut axis, and how many indivisible units that is."""

    size: int
    units: int

    def range_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the rank's ``(start, stop)`` in the block; with fewer units than ranks, several ranks share one."""
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
    """Cut along ``axis``, block by block.

    Where a block has fewer units than there are ranks, no rank can own a part of it alone: the parameter then stays
    whole on every rank (``ShardSpec.axis`` is None), each reads its ranges, and the engine sums the gradients.
    """

    axis: int
    blocks: Blocks

    def ranges(self, config: ModelConfig, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
        """Return what the rank reads, as ``(start, stop)`` along the axis."""
        found, begin = [], 0
        for block in self.blocks(config):
            start, stop = block.range_of(rank, ranks)
            found.append((begin + start, begin + stop))
            begin += block.size
        return tuple(found)

    def owned(self, config: ModelConfig, ranks: int) -> bool:
        """True when every element belongs to one rank alone."""
        return all(block.units % ranks == 0 for block in self.blocks(config))

    def spec(self, shape: tuple[int, ...], config: ModelConfig, rank: int, ranks: int) -> ShardSpec:
        """Return the part the rank holds."""
        if not self.owned(config, ranks):
            return ShardSpec(shape)
        return ShardSpec(shape, self.axis, self.ranges(config, rank, ranks))


def column(blocks: Blocks) -> Split:
    """Outputs of a projection (rows of its weight) and what acts on them channel by channel."""
    return Split(0, blocks)


def row(blocks: Blocks) -> Split:
    """Inputs of a projection (columns of its weight): its outputs are summed over the ranks."""
    return Split(1, blocks)
