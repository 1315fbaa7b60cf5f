"""What the ranks tell each other about a checkpoint. Rank 0 gathers alone: no other rank receives every rank's part.

Descriptions of rectangles travel as rows of a numpy record type, some tensors at a time (a round), so that rank 0 holds
a few megabytes of them however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_ROWS = 1 << 16
"""Rows that rank 0 holds at a time, if every rank has one row per tensor."""
_FILLER = np.iinfo(np.uint32).max
"""Tensor number of rows that only fill up a message: all messages of a round have one length."""


def rank_of(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in ``group``; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of ``group``; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def first_of(mine: T | None, group: dist.ProcessGroup | None) -> T | None:
    """Return the object of the lowest rank that has one, or None if no rank has; a collective call.

    Costs one number per rank as long as nobody has an object.
    """
    if group is None:
        return mine
    ranks = ranks_of(group)
    first = torch.tensor(ranks if mine is None else rank_of(group))
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    if int(first) == ranks:
        return None
    found = [mine]
    dist.broadcast_object_list(found, src=dist.get_global_rank(group, int(first)), group=group)
    return found[0]


def sum_of(value: int, group: dist.ProcessGroup | None) -> int:
    """Return the sum of the ranks' values; a collective call."""
    total = torch.tensor(value)
    if group is not None:
        dist.all_reduce(total, group=group)
    return int(total)


def gather_to_first(mine: T, group: dist.ProcessGroup | None) -> list[T] | None:
    """Return every rank's object, in rank order, on rank 0, and None elsewhere; a collective call."""
    if group is None:
        return [mine]
    everyone: list[Any] | None = [None] * ranks_of(group) if rank_of(group) == 0 else None
    dist.gather_object(mine, everyone, dst=dist.get_global_rank(group, 0), group=group)
    return everyone


def numbered(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a round without fillers, and the rank of each.

    Args:
        rows: ``[ranks, longest]``, as :meth:`Rounds.gathered` yields them.
    """
    real = rows["tensor"] != _FILLER
    return rows[real], np.nonzero(real)[0]


class Rounds:
    """Sends rows to rank 0 in rounds, each for the next tensors. All ranks make one and iterate together."""

    def __init__(self, rows: np.ndarray, tensors: int, group: dist.ProcessGroup | None) -> None:
        """Agree on the length of each round's messages.

        Args:
            rows: this rank's rows, in order of their field ``tensor``, a number below ``tensors``.
            tensors: number of tensors.
            group: a gloo group of all ranks; None for a single process.
        """
        self._rows, self._group = rows, group
        step = max(1, _ROWS // ranks_of(group))
        self._bounds = np.searchsorted(rows["tensor"], [*range(0, tensors, step), tensors])
        longest = torch.from_numpy(np.diff(self._bounds))
        if group is not None:
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
        self._longest: list[int] = longest.tolist()

    def gathered(self) -> Iterator[np.ndarray | None]:
        """Yield for each round the ranks' rows ``[ranks, longest]`` with fillers on rank 0, and None elsewhere."""
        for number, longest in enumerate(self._longest):
            mine = np.zeros(longest, self._rows.dtype)
            mine["tensor"] = _FILLER
            held = self._rows[self._bounds[number] : self._bounds[number + 1]]
            mine[: len(held)] = held
            if longest:
                yield self._gather(mine)

    def _gather(self, mine: np.ndarray) -> np.ndarray | None:
        if self._group is None:
            return mine[None]
        first = rank_of(self._group) == 0
        sent = torch.from_numpy(mine.view(np.uint8))
        whole = torch.empty(ranks_of(self._group) if first else 0, sent.numel(), dtype=torch.uint8)
        parts: list[Tensor] | None = list(whole.unbind()) if first else None
        dist.gather(sent, parts, dst=dist.get_global_rank(self._group, 0), group=self._group)
        return whole.numpy().view(mine.dtype) if first else None

    def answered(self, answers: Iterator[np.ndarray | None]) -> np.ndarray:
        """Send rank 0's answers to the ranks; return the answers to this rank's rows, uint8.

        Args:
            answers: on rank 0 one uint8 array ``[ranks, longest]`` for each round that :meth:`gathered` yields, and
                None elsewhere; it is asked for the next only after the last was sent.
        """
        found = []
        for number, longest in enumerate(self._longest):
            if longest:
                count = self._bounds[number + 1] - self._bounds[number]
                found.append(self._scatter(next(answers), longest)[:count])
        return np.concatenate([np.zeros(0, np.uint8), *found])

    def _scatter(self, answers: np.ndarray | None, longest: int) -> np.ndarray:
        if self._group is None:
            assert answers is not None
            return answers[0]
        mine = torch.empty(longest, dtype=torch.uint8)
        parts = None if answers is None else list(torch.from_numpy(answers).unbind())
        dist.scatter(mine, parts, src=dist.get_global_rank(self._group, 0), group=self._group)
        return mine.numpy()
