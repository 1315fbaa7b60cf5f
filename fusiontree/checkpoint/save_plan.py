"""Assigns the rectangles of a checkpoint to the ranks that write them.

Every rank lists the rectangles that it holds. A rectangle held by several ranks (replicated parameters, copies under
``shard_size``) is written by one of them, chosen so that all ranks write about equally much. Every rank computes the
same plan from the same lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontree.parallel.global_tensor import GlobalTensor, Piece
from fusiontree.parallel.layout import gather_objects

Rectangle = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Tensor name, offset in the full tensor, shape."""

Holdings = dict[str, tuple[tuple[int, ...], torch.dtype, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]]
"""Per tensor: global shape, dtype, and ``(offset, shape)`` of each rectangle that a rank holds."""


@dataclass(frozen=True)
class SavePlan:
    """The rectangles that this rank writes, and the content of the full checkpoint."""

    holdings: Holdings
    """This rank's rectangles, from which the plan was made."""
    mine: tuple[Rectangle, ...]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of every tensor, in order."""
    total_bytes: int
    """Bytes of all ranks together."""

    def nbytes(self, rectangle: Rectangle) -> int:
        """Bytes of a rectangle's values."""
        return math.prod(rectangle[2]) * self.tensors[rectangle[0]][1].itemsize


def pieces_of(tensor: Tensor) -> list[Piece]:
    """Return ``(offset in the full tensor, view of the values in use)`` of this rank's non-empty rectangles.

    Args:
        tensor: a plain tensor (replicated), a DTensor (its local shard), or a :class:`GlobalTensor`.
    """
    if isinstance(tensor, GlobalTensor):
        pieces = tensor.pieces
    elif isinstance(tensor, DTensor):
        local = tensor.to_local().detach()
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        pieces = [(tuple(offset), local)]
    else:
        pieces = [((0,) * tensor.ndim, tensor.detach())]
    return [(offset, view) for offset, view in pieces if view.numel()]


def holdings_of(tensors: dict[str, Tensor]) -> Holdings:
    """Return the rectangles that this rank holds."""
    return {
        name: (
            tuple(tensor.shape),
            tensor.dtype,
            tuple((tuple(offset), tuple(view.shape)) for offset, view in pieces_of(tensor)),
        )
        for name, tensor in tensors.items()
    }


def make_plan(holdings: Holdings, group: dist.ProcessGroup | None) -> SavePlan:
    """Compute the plan; a collective call of all ranks of ``group`` (None: a single process)."""
    everyone = gather_objects(holdings, group)
    rank = 0 if group is None else dist.get_rank(group)

    tensors = {name: (shape, dtype) for held in everyone for name, (shape, dtype, _) in held.items()}
    holders: dict[Rectangle, list[int]] = {}
    for holder, held in enumerate(everyone):
        for name, (shape, dtype, pieces) in held.items():
            assert tensors[name] == (shape, dtype), f"ranks differ in shape or type of '{name}'"
            for offset, size in pieces:
                holders.setdefault((name, offset, size), []).append(holder)
    _check_cover(tensors, list(holders))
    load = [0] * len(everyone)
    writer: dict[Rectangle, int] = {}
    # First assign rectangles that only one rank holds; then the others, largest first, to the least busy holder.
    size_of = {r: math.prod(r[2]) * tensors[r[0]][1].itemsize for r in holders}
    for rectangle in sorted(holders, key=lambda r: (len(holders[r]) > 1, -size_of[r], r)):
        chosen = min(holders[rectangle], key=lambda holder: load[holder])
        load[chosen] += size_of[rectangle]
        writer[rectangle] = chosen
    mine = tuple(r for r in holders if writer[r] == rank)
    return SavePlan(holdings, mine, tensors, sum(size_of.values()))


def _check_cover(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], rectangles: list[Rectangle]) -> None:
    held = dict.fromkeys(tensors, 0)
    for name, _, shape in rectangles:
        held[name] += math.prod(shape)
    for name, (shape, _) in tensors.items():
        assert held[name] >= math.prod(shape), f"the ranks hold {held[name]} of {math.prod(shape)} values of '{name}'"
