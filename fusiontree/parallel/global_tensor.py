"""Which part of a parameter a rank holds, and that part as a piece of the whole for checkpoints.

Tensor parallelism cuts a parameter along one axis, block by block (a packed projection gives every rank a range of
each block); an engine cuts what is left into flat pieces. ``ShardSpec`` knows the first cut, ``GlobalTensor`` names the
result of both by its place in the whole parameter, so that any layout can save what any other loads.
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

Piece = tuple[tuple[int, ...], Tensor]
"""Offset in the whole parameter, and a view of the live values that lie there."""


@dataclass(frozen=True)
class ShardSpec:
    """The part of a parameter (of one or two axes) that one tensor parallel rank holds."""

    global_shape: tuple[int, ...]
    """Shape of the whole parameter."""
    axis: int | None = None
    """Axis that is cut; None means every rank holds the whole."""
    ranges: tuple[tuple[int, int], ...] = ()
    """``(start, stop)`` along ``axis`` of the whole, in the order in which the rank keeps them."""

    @property
    def is_split(self) -> bool:
        """True when tensor parallel ranks hold different parts."""
        return self.axis is not None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's part."""
        if self.axis is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.axis] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the rank's part of the whole parameter's values."""
        if self.axis is None:
            return whole
        return torch.cat([whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges], self.axis)

    def pieces(self, flat: Tensor, start: int = 0) -> list[Piece]:
        """Name consecutive elements of the rank's part by their place in the whole parameter.

        Args:
            flat: 1-D view of the elements ``start … start + flat.numel()`` of the part, in row-major order.
            start: of the first of them.

        Returns:
            Rectangles of the whole; their views share memory with ``flat``.
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
            else:  # as many whole rows as there are
                rows = (stop - at) // columns
                view = flat[at - start : at - start + rows * columns].view(rows, columns)
                at += rows * columns
            found += self._place(view, row, column)
        return found

    def _place(self, view: Tensor, row: int, column: int) -> list[Piece]:
        """Cut the rectangle at local (row, column) where the ranges of the cut axis end."""
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
    """A tensor of which this rank holds some rectangles; torch DCP saves and fills it by its place in the whole.

    DCP asks a tensor for the three methods below (its protocol for wrappers), so nothing of it needs to be a DTensor.
    It has the whole's shape and no values of its own: nothing can be computed with it.
    """

    pieces: list[Piece]

    @staticmethod
    def __new__(
        cls, global_shape: tuple[int, ...], pieces: list[Piece], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> GlobalTensor:
        """Name the rectangles this rank reads and writes.

        Args:
            global_shape: of the whole tensor.
            pieces: this rank's rectangles; an element that several ranks name must be equal on them.
            dtype: of the values; given because a rank may hold no rectangle.
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
