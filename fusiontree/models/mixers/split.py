"""How a mixer's weights are laid out and how tensor parallelism splits them, as data.

A parameter consists of blocks along one axis: heads of q; z, x and dt of a packed projection. Each block is split into
equal contiguous ranges that contain complete units (a head, a group); a rank takes one range of every block. Tensor
parallelism, the memory estimate and the checkpoint converters all read these definitions.

Parameters with heads or vocabulary are split. A block's norms, alignment, gate, output projection and MLP process only
the rank's own tokens (sequence parallel), so tp does not split them: the engine shards them over all ranks and sums
their gradients.
"""

from __future__ import annotations

from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import config_of, mixer_of

Ranges = tuple[tuple[int, int], ...]
"""``(start, stop)`` along an axis of a parameter."""


class Block(NamedTuple):
    """Consecutive rows (outputs) or columns (inputs) of a weight."""

    name: str
    """Short name, unique among the blocks of the parameter; converters use it."""
    size: int
    """Length along the split axis."""
    units: int
    """Number of indivisible units in the block."""

    def range_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the rank's ``(start, stop)`` in the block; with fewer units than ranks, several ranks share a unit."""
        width = self.size // self.units
        if self.units % ranks == 0:
            count = self.units // ranks
            return rank * count * width, (rank + 1) * count * width
        assert ranks % self.units == 0, f"{self.units} units over {ranks} ranks"
        unit = rank * self.units // ranks
        return unit * width, (unit + 1) * width


class Split(NamedTuple):
    """A split along ``axis``, block by block.

    If a block has fewer units than there are ranks, the parameter is replicated: each rank reads only its ranges, and
    the engine sums the gradients.
    """

    axis: int
    blocks: tuple[Block, ...]

    def ranges(self, rank: int, ranks: int) -> Ranges:
        """Return the ranges that the rank reads, along the axis."""
        found, begin = [], 0
        for block in self.blocks:
            start, stop = block.range_of(rank, ranks)
            found.append((begin + start, begin + stop))
            begin += block.size
        return tuple(found)

    def is_owned(self, ranks: int) -> bool:
        """Return True if every element belongs to exactly one rank."""
        return all(block.units % ranks == 0 for block in self.blocks)


def column(*blocks: Block) -> Split:
    """Split the outputs of a projection (rows of its weight), or per-channel parameters applied to these outputs.

    Blocks of size 0 are left out.
    """
    return Split(0, tuple(block for block in blocks if block.size))


def row(*blocks: Block) -> Split:
    """Split the inputs of a projection (columns of its weight); its outputs must be summed over the ranks.

    Blocks of size 0 are left out.
    """
    return Split(1, tuple(block for block in blocks if block.size))


def split_of(name: str, config: ModelConfig) -> Split | None:
    """Return the split of a parameter of the model, or None if tensor parallelism does not split it."""
    if name in ("embed.weight", "head.weight"):
        return column(Block("vocabulary", config.vocab_size, config.vocab_size))
    owner = mixer_of(name, config)
    return owner[0].tp_plan(config_of(name, config)).get(owner[1]) if owner else None
