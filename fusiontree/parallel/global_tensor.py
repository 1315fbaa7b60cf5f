"""Shards of a parameter, and their position in the full parameter for checkpoints.

Tensor parallelism splits a parameter along one axis, block by block (each rank gets a range of every block of a packed
projection); an engine shards the result into flat slices. ``ShardSpec`` describes the tensor parallel split;
``GlobalTensor`` describes the final shard by offsets in the full parameter, so that a checkpoint saved under one layout
loads under any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from fusiontree.models.mixers.split import Split

Piece = tuple[tuple[int, ...], Tensor]
"""A rectangle of a parameter: its offset in the full parameter, and a view of the values in use."""


@dataclass(frozen=True)
class ShardSpec:
    """The shard of a parameter (of one or two axes) that one tensor parallel rank holds."""

    global_shape: tuple[int, ...]
    """Shape of the full parameter."""
    axis: int | None = None
    """Axis that is split; None means the parameter is replicated."""
    ranges: tuple[tuple[int, int], ...] = ()
    """``(start, stop)`` along ``axis`` of the full parameter, in the order in which the rank stores them."""

    @classmethod
    def of(cls, split: Split, shape: tuple[int, ...], rank: int, ranks: int) -> ShardSpec:
        """Return the rank's shard of a parameter of ``shape``; a replicated parameter if units are too few."""
        return cls(shape, split.axis, split.ranges(rank, ranks)) if split.is_owned(ranks) else cls(shape)

    @property
    def is_split(self) -> bool:
        """True if tensor parallel ranks hold different shards."""
        return self.axis is not None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's shard."""
        if self.axis is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.axis] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the rank's shard of the full parameter's values."""
        if self.axis is None:
            return whole
        return torch.cat([whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges], self.axis)

    def pieces(self, flat: Tensor, start: int = 0) -> list[Piece]:
        """Locate consecutive elements of the rank's shard in the full parameter.

        Args:
            flat: 1-D view of the elements ``start … start + flat.numel()`` of the shard, in row-major order.
            start: index of the first element in the shard.

        Returns:
            Rectangles of the full parameter; their views share memory with ``flat``.
        """
        columns = self.local_shape[1] if len(self.local_shape) > 1 else 1
        stop = start + flat.numel()
        found: list[Piece] = []
        at = start
        while at < stop:
            row, column = divmod(at, columns)
            if column or stop - at < columns:  # part of one row
                end = min(stop, (row + 1) * columns)
                view = flat[at - start : end - start].view(1, -1)
                at = end
            else:  # all complete rows that remain
                rows = (stop - at) // columns
                view = flat[at - start : at - start + rows * columns].view(rows, columns)
                at += rows * columns
            found += self._place(view, row, column)
        return found

    def _place(self, view: Tensor, row: int, column: int) -> list[Piece]:
        """Split the rectangle at local (row, column) at the ends of the ranges of the split axis."""
        parts: list[Piece] = [((row, column), view)]
        if self.axis is not None:
            parts.clear()
            local = 0
            first = (row, column)[self.axis]
            last = first + view.shape[self.axis]
            for start, stop in self.ranges:
                begin, end = max(first, local), min(last, local + stop - start)
                if begin < end:
                    there = start + begin - local
                    offset = (there, column) if self.axis == 0 else (row, there)
                    parts.append((offset, view.narrow(self.axis, begin - first, end - begin)))
                local += stop - start
        if len(self.global_shape) == 1:
            return [(offset[:1], part.view(-1)) for offset, part in parts]
        return parts


class GlobalTensor(torch.Tensor):
    """A tensor of which this rank holds some rectangles; torch DCP saves and loads them by their global offsets.

    It implements the three methods of DCP's protocol for wrapper tensors, so it need not be a DTensor. It has the shape
    of the full tensor and stores no values: nothing can be computed with it.
    """

    pieces: list[Piece]

    @staticmethod
    def __new__(
        cls, global_shape: tuple[int, ...], pieces: list[Piece], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> GlobalTensor:
        """Declare the rectangles that this rank reads and writes.

        Args:
            global_shape: of the full tensor.
            pieces: this rank's rectangles; an element held by several ranks must be equal on all of them.
            dtype: of the values; an argument because a rank may hold no rectangle.
            device: of the values.
        """
        wrapper = torch.Tensor._make_wrapper_subclass(cls, global_shape, dtype=dtype, device=torch.device(device))
        wrapper.pieces = pieces
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"{func} cannot be computed on rectangles of a tensor; use their views in .pieces")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        held = [(offset, tuple(view.shape)) for offset, view in self.pieces]
        return f"GlobalTensor(shape={tuple(self.shape)}, dtype={self.dtype}, pieces={held})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), view.shape) for offset, view in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, view in self.pieces:
            if torch.Size(offset) == index.offset:
                return view
        raise KeyError(f"no rectangle at {index.offset} among {[offset for offset, _ in self.pieces]}")
