"""Counts of a step are exact integers, however large."""

from __future__ import annotations

import pytest
import torch

from fusiontree.training.step_sums import RowSums, StepCounts, read_step_counts

LARGE = StepCounts(tokens=(1 << 24) + 1, rows=513, skipped_rows=2, tokens_hash=0x88207A40 + 0x12345677, stop_requests=1)


@pytest.mark.parametrize("ranks_per_row", [1, 2, 8])
def test_counts_survive_the_sum_over_ranks(ranks_per_row: int) -> None:
    summed = LARGE.pack() * ranks_per_row  # each of these ranks counts the same rows
    assert read_step_counts(summed, ranks_per_row)() == LARGE._replace(stop_requests=ranks_per_row)


def test_a_single_rank_is_heard_when_it_asks_to_stop() -> None:
    quiet = LARGE._replace(stop_requests=0)
    summed = LARGE.pack() + 7 * quiet.pack()
    assert read_step_counts(summed, 8)() == LARGE


def test_denominators_are_never_zero() -> None:
    empty = StepCounts(0, 0, 0, 0, 0)
    assert torch.equal(StepCounts.denominators(empty.pack(), 4), torch.ones(2))
    assert torch.equal(StepCounts.denominators(StepCounts(80, 24, 0, 0, 0).pack(), 8), torch.tensor([10.0, 3.0]))


def test_row_sums_keep_their_names_on_the_way() -> None:
    """Distinct numbers per field: an exchanged order of gate, square and entropy would show."""
    sums_LB = {name: torch.full((2, 3), value) for name, value in (("gate", 2.0), ("square", 3.0), ("entropy", 5.0))}
    sums_LB["gate"][1] = 7.0
    packed = RowSums.pack(
        torch.tensor(0.25),
        torch.tensor(0.5),
        sums_LB,
        count_B=torch.tensor([2.0, 4.0, 1.0]),
        row_weight_B=torch.tensor([1.0, 1.0, 0.0]),
    )
    rows = 0.5 + 0.25
    expected = RowSums(
        0.25, 0.5, {"gate": [2.0 * rows, 7.0 * rows], "square": [3.0 * rows] * 2, "entropy": [5.0 * rows] * 2}
    )
    assert RowSums.unpack(packed.tolist(), list(sums_LB)) == expected
