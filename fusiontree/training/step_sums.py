"""What one optimizer step sums over the ranks: records that pack themselves into one tensor and unpack by field name.

Shape legend: L layers, B rows of a micro-batch.
"""

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


class TokenSums(NamedTuple):
    """Loss terms of the global batch that are sums over tokens, divided by the global number of tokens."""

    lm: float
    """Cross entropy."""
    z: float
    """Squared log-partition, before its coefficient."""

    @staticmethod
    def pack(lm: Tensor, z: Tensor) -> Tensor:
        """Return one micro-batch's addends as a detached fp32 vector."""
        return torch.stack([lm.detach(), z.detach()])


class RowSums(NamedTuple):
    """Sums over the rows of the global batch."""

    load_balance: float
    """Load balance loss, already divided by the number of rows."""
    entropy: float
    """Entropy loss, already divided by the number of rows."""
    gate_L: list[float]
    """Each row's mean gate, summed over the rows."""
    square_L: list[float]
    """Each row's mean squared gate, summed over the rows."""
    entropy_L: list[float]
    """Each row's mean gate entropy in nats, summed over the rows."""

    @staticmethod
    def pack(
        load_balance: Tensor,
        entropy: Tensor,
        *,
        gate_LB: Tensor,
        square_LB: Tensor,
        entropy_LB: Tensor,
        count_B: Tensor,
        row_weight_B: Tensor,
    ) -> Tensor:
        """Return one micro-batch's addends as a detached fp32 vector of 2 + 3 L elements.

        Args:
            load_balance: loss term.
            entropy: loss term.
            gate_LB: gates summed over a row's tokens and channels.
            square_LB: squared gates, summed in the same way.
            entropy_LB: entropies of gates, summed in the same way.
            count_B: gates per row and layer.
            row_weight_B: 0 for rows that do not count.
        """
        per_gate_B = row_weight_B / count_B.clamp(min=1)
        sums_3L = (torch.stack([gate_LB, square_LB, entropy_LB]).detach() * per_gate_B).sum(-1)
        return torch.cat([torch.stack([load_balance.detach(), entropy.detach()]), sums_3L.flatten()])

    @classmethod
    def unpack(cls, summed: list[float]) -> RowSums:
        """Return the record of a packed vector that was summed over micro-batches and ranks."""
        load_balance, entropy, *gates = summed
        layers = len(gates) // 3
        return cls(load_balance, entropy, gates[:layers], gates[layers : 2 * layers], gates[2 * layers :])


def read_step_counts(summed: Tensor, ranks_per_row: int) -> Callable[[], StepCounts]:
    """Begin to copy packed counts to the host; the returned function waits for the copy."""
    read = copy_to_host(summed)
    return lambda: StepCounts.unpack(read(), ranks_per_row)
