"""What the loader hands to training.

Shape legend: B rows of a micro batch, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORED = -100
"""Label of a token whose successor does not count."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank computes in one pass, on the CPU."""

    input_ids_BS: Tensor
    """int64 tokens."""
    labels_BS: Tensor
    """int64, the token after each; IGNORED where that token starts another document, and in fillers."""
    positions_BS: Tensor
    """int64 position of each token in its document, or since the row began where the row begins inside one."""
    rows_B: Tensor
    """int64 number of each row in the run; the same row has the same number in every layout."""
    row_weight_B: Tensor
    """fp32, 0 for fillers that only keep the ranks in step, else 1."""
    sources_B: Tensor
    """int64 index of the source each row comes from."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch. All ranks have the same number of micro batches."""

    micro_batches: list[MicroBatch]
    seq_len: int
    skipped_rows: int
    """Damaged rows of this rank's part whose slots are kept without labels."""
    wait_s: float
    """How long training waited for this batch, in seconds."""
