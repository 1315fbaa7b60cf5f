"""The named blocks of a parameter, and how each block is split over tensor parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.parallel.tp_plan import split_of


class BlockPlace(NamedTuple):
    """One block of a parameter, of which each tensor parallel rank holds an equal contiguous part."""

    name: str | None
    """None if the parameter has only one block."""
    axis: int
    start: int
    """First row (or column) in the parameter."""
    shape: tuple[int, ...]
    parts: int
    """Number of parts that the block is split into; 1 if it is replicated."""

    def of(self, parameter: Tensor) -> Tensor:
        """Return a view of the block in the full parameter."""
        return parameter.narrow(self.axis, self.start, self.shape[self.axis])

    def chunks(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return offset and shape of each part in the block."""
        length = self.shape[self.axis] // self.parts
        shape = (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])
        zeros = (0,) * len(self.shape)
        return {(*zeros[: self.axis], part * length, *zeros[self.axis + 1 :]): shape for part in range(self.parts)}


def blocks_of(name: str, shape: tuple[int, ...], config: ModelConfig, tp: int) -> list[BlockPlace]:
    """Return the blocks of a parameter (its name without ``model.``) in order."""
    split = split_of(name, config)
    if split is None:
        return [BlockPlace(None, 0, 0, shape, 1)]
    parts = tp if split.is_owned(tp) else 1
    found, start = [], 0
    for block in split.blocks:
        block_shape = (*shape[: split.axis], block.size, *shape[split.axis + 1 :])
        found.append(BlockPlace(block.name if len(split.blocks) > 1 else None, split.axis, start, block_shape, parts))
        start += block.size
    assert start == shape[split.axis], f"blocks of {name} make {start} of {shape}"
    return found
