"""The named blocks of a parameter, and how each block is split over tensor parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusiontree.models import weight_layout
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.tp_plan import split_of

_PACKED = {
    "in_proj": weight_layout.in_proj_rows,
    "bc_proj": weight_layout.bc_proj_rows,
    "conv_bc": weight_layout.bc_proj_rows,
    "q_proj": weight_layout.q_proj_rows,
    "k_proj": weight_layout.kv_proj_rows,
    "v_proj": weight_layout.kv_proj_rows,
    "o_proj": weight_layout.o_proj_columns,
}


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
    split = split_of(name)
    if split is None:
        return [BlockPlace(None, 0, 0, shape, 1)]
    parts = tp if split.owned(config, tp) else 1
    packed = _PACKED.get(name.split(".")[-2])
    names = [block.name for block in packed(config) if block.size] if packed else [None]
    found, start = [], 0
    for block_name, block in zip(names, split.blocks(config), strict=True):
        block_shape = (*shape[: split.axis], block.size, *shape[split.axis + 1 :])
        found.append(BlockPlace(block_name if len(names) > 1 else None, split.axis, start, block_shape, parts))
        start += block.size
    assert start == shape[split.axis], f"blocks of {name} make {start} of {shape}"
    return found
