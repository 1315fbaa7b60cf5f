from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.supervision.replica_check import find_differences, hash_values


class Ranks:
    """Pretended ranks in threads, with the one collective that the check uses."""

    def __init__(self, parts: list[list[tuple[str, tuple[int, ...], Tensor]]]) -> None:
        self.parts = parts
        self.texts = [""] * len(parts)
        self.barrier = threading.Barrier(len(parts), timeout=10)

    def run(self, check: Callable[[Any], list[str]] = find_differences) -> list[list[str]]:
        results: list[Any] = [None] * len(self.parts)

        def one(rank: int) -> None:
            results[rank] = check(Rank(self, rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def parameter_pieces(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        yield from self.ranks.parts[self.rank]

    def gather_text(self, text: str) -> list[str]:
        self.ranks.barrier.wait()
        self.ranks.texts[self.rank] = text
        self.ranks.barrier.wait()
        return list(self.ranks.texts)


def layout(change: tuple[int, str] | None = None) -> list[list[tuple[str, tuple[int, ...], Tensor]]]:
    """Four ranks: a norm that all hold, and a matrix in halves, each of which two ranks hold."""
    ranks = []
    for rank in range(4):
        torch.manual_seed(0)
        norm, matrix = torch.randn(16), torch.randn(8, 16)
        half = rank % 2
        pieces = [("norm.weight", (0,), norm), ("q.weight", (4 * half, 0), matrix[4 * half : 4 * half + 4].clone())]
        if change and change[0] == rank:
            next(values for name, _, values in pieces if name == change[1]).view(-1)[5] += 1e-7
        ranks.append(pieces)
    return ranks


def test_equal_copies_are_fine_and_other_parts_are_not_compared() -> None:
    assert Ranks(layout()).run() == [[]] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((2, "norm.weight"), "norm.weight differs on rank 2 from the other 3"),
        ((3, "q.weight"), "q.weight from [4, 0] differs on ranks 1, 3, and no majority tells which is right"),
    ],
)
def test_rank_and_parameter_are_named_on_every_rank(change: tuple[int, str], said: str) -> None:
    assert Ranks(layout(change)).run() == [[said]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_one_bit_and_any_exchange_changes_the_hash(dtype: torch.dtype) -> None:
    values = torch.randn(257).to(dtype)
    before = hash_values(values)
    assert hash_values(values.clone()) == before
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    for place in (0, 100, 256):
        for bit in range(0, 8 * values.element_size(), 5):
            changed = values.clone()
            changed.view(integers)[place] ^= 1 << bit if bit < 8 * values.element_size() - 1 else -(1 << bit)
            assert hash_values(changed) != before
    swapped = values.clone()
    swapped[[3, 7]] = swapped[[7, 3]]
    assert hash_values(swapped) != before
