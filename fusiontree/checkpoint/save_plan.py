"""Assigns the rectangles of a checkpoint to the ranks that write them.

Every rank tells rank 0 the rectangles that it holds. A rectangle held by several ranks (replicated parameters, copies
under ``shard_size``) is written by one of them, chosen so that all ranks write about equally much. Rank 0 alone sees
all rectangles, some tensors at a time, and answers each rank which of its own it writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontree.checkpoint.exchange import Rounds, first_of, numbered, rank_of, ranks_of, sum_of
from fusiontree.checkpoint.rows import Tensors, in_order, place_type, rows_of, volumes
from fusiontree.parallel.global_tensor import GlobalTensor, Piece

Rectangle = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Tensor name, offset in the full tensor, shape."""

Holdings = dict[str, tuple[tuple[int, ...], torch.dtype, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]]
"""Per tensor: global shape, dtype, and ``(offset, shape)`` of each rectangle that a rank holds."""


@dataclass(frozen=True)
class SavePlan:
    """The rectangles that this rank writes."""

    holdings: Holdings
    """This rank's rectangles, from which the plan was made."""
    mine: tuple[Rectangle, ...]
    tensors: Tensors
    """Shape and dtype of every tensor, in the order of rank 0."""
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
    own = {name: (shape, dtype) for name, (shape, dtype, _) in holdings.items()}
    tensors = first_of(own if rank_of(group) == 0 else None, group)
    assert tensors is not None
    _agree(
        None if own == tensors else f"rank {rank_of(group)} differs from rank 0 in {_differing(own, tensors)}", group
    )
    held = [(name, offset, size) for name in tensors for offset, size in holdings[name][2]]
    rounds = Rounds(places_of(held, tensors), len(tensors), group)
    assignment = Assignment(tensors, ranks_of(group))
    written = rounds.answered(assignment.take(rows) for rows in rounds.gathered())
    _agree(assignment.problem() if rank_of(group) == 0 else None, group)
    mine = tuple(rectangle for rectangle, writes in zip(held, written, strict=True) if writes)
    size = sum(math.prod(shape) * tensors[name][1].itemsize for name, _, shape in mine)
    return SavePlan(holdings, mine, tensors, sum_of(size, group))


def places_of(held: list[Rectangle], tensors: Tensors) -> np.ndarray:
    """Return a rank's rectangles, which are in the order of ``tensors``, as rows."""
    numbers = {name: number for number, name in enumerate(tensors)}
    kind = place_type(shape for shape, _ in tensors.values())
    return rows_of([(numbers[name], offset, size) for name, offset, size in held], kind)


def _agree(problem: str | None, group: dist.ProcessGroup | None) -> None:
    problem = first_of(problem, group)
    assert problem is None, problem


def _differing(own: Tensors, tensors: Tensors) -> str:
    names = [name for name in [*tensors, *own] if own.get(name) != tensors.get(name)]
    return f"shape or type of '{names[0]}': {own.get(names[0])}, there {tensors.get(names[0])}"


class Assignment:
    """Chooses the writer of each rectangle, on rank 0."""

    def __init__(self, tensors: Tensors, ranks: int) -> None:
        """Begin with no rank writing anything."""
        self._names = list(tensors)
        self._sizes = np.array([math.prod(shape) for shape, _ in tensors.values()], np.int64)
        self._itemsizes = np.array([dtype.itemsize for _, dtype in tensors.values()], np.int64)
        self._covered = np.zeros(len(tensors), np.int64)
        self._load = np.zeros(ranks, np.int64)

    def take(self, rows: np.ndarray | None) -> np.ndarray | None:
        """Return for each row of a round 1 if its rank writes it, else 0; None if there are no rows, as elsewhere.

        Args:
            rows: ``[ranks, longest]`` places; all that any rank holds of their tensors.
        """
        if rows is None:
            return None
        places, holder = numbered(rows)
        order = in_order(places)
        places, holder = places[order], holder[order]
        new = np.ones(len(places), bool)
        raw = places.view(np.uint8).reshape(len(places), places.dtype.itemsize)
        new[1:] = (raw[1:] != raw[:-1]).any(axis=1)
        starts = np.flatnonzero(new)
        writes = np.zeros(len(places), np.uint8)
        writes[self._choose(places[starts], starts, holder)] = 1
        answer = np.zeros(len(places), np.uint8)
        answer[order] = writes
        whole = np.zeros(rows.shape, np.uint8)
        whole[rows["tensor"] < len(self._names)] = answer
        return whole

    def _choose(self, places: np.ndarray, starts: np.ndarray, holder: np.ndarray) -> np.ndarray:
        """Return the row of the chosen holder of each distinct rectangle; row ``starts[i]`` is rectangle i's first."""
        values = volumes(places)
        np.add.at(self._covered, places["tensor"], values)
        size = values * self._itemsizes[places["tensor"]]
        counts = np.diff(np.append(starts, len(holder)))
        chosen = starts.copy()
        # First assign rectangles that only one rank holds; then the others, largest first, to the least busy holder.
        alone = counts == 1
        np.add.at(self._load, holder[starts[alone]], size[alone])
        load = self._load.tolist()
        shared = np.flatnonzero(~alone)
        for index in shared[np.argsort(-size[shared], kind="stable")].tolist():
            holders = holder[starts[index] : starts[index] + counts[index]].tolist()
            least = min(holders, key=load.__getitem__)
            load[least] += int(size[index])
            chosen[index] += holders.index(least)
        self._load = np.array(load, np.int64)
        return chosen

    def problem(self) -> str | None:
        """Return what is wrong with the rectangles of all ranks together, or None."""
        for number in np.flatnonzero(self._covered != self._sizes).tolist():
            held, whole = int(self._covered[number]), int(self._sizes[number])
            return f"the ranks hold {held} of {whole} values of '{self._names[number]}', each place counted once"
        return None
