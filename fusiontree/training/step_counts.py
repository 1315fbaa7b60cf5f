"""Integer counts of one optimizer step, summed over the ranks by one collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.utils.device import copy_to_host


class StepCounts(NamedTuple):
    """What one rank counts in its part of a step, or the sum over the global batch.

    Counts travel as int64: a 32-bit hash and a count of more than 2^24 tokens are not representable in float32.
    """

    tokens: int
    """Labels that count."""
    rows: int
    """Rows with weight, fillers and skipped rows excluded."""
    skipped_rows: int
    """Damaged rows."""
    tokens_hash: int
    """Sum of 32-bit hashes; the global batch's hash is this modulo 2^32."""
    stop_requests: int
    """Ranks that were asked to stop."""

    def pack(self) -> Tensor:
        """Return the fields as an int64 vector on the CPU."""
        return torch.tensor(self, dtype=torch.int64)

    @classmethod
    def unpack(cls, summed: list[int], ranks_per_row: int) -> StepCounts:
        """Return the counts of the global batch.

        Args:
            summed: the packed fields, summed over all ranks.
            ranks_per_row: ranks that read the same rows (cp x tp) and therefore count them alike. The request to stop
                is each rank's own.
        """
        raw = cls(*summed)
        once = cls(*(value // ranks_per_row for value in raw))
        return once._replace(stop_requests=raw.stop_requests)

    @staticmethod
    def denominators(summed: Tensor, ranks_per_row: int) -> Tensor:
        """Return tokens and rows of the global batch, each at least 1, as fp32 on the device of ``summed``."""
        return (summed[:2] // ranks_per_row).clamp(min=1).float()


def read_step_counts(summed: Tensor, ranks_per_row: int) -> Callable[[], StepCounts]:
    """Begin to copy packed counts to the host; the returned function waits for the copy."""
    read = copy_to_host(summed)
    return lambda: StepCounts.unpack(read(), ranks_per_row)
