"""What one optimizer step sums over the ranks: records that pack themselves into one tensor and unpack by field name.

Shape legend: L layers, B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.utils.device import copy_to_host

_HALF = 1 << 32


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
    flops: int = 0
    """Model FLOPs of the rows, of a logged step; the documents of all ranks decide them."""

    def pack(self) -> Tensor:
        """Return the fields as an int64 vector on the CPU; the FLOPs of a large job exceed 63 bits and take two."""
        return torch.tensor([*self[:-1], *divmod(self.flops, _HALF)], dtype=torch.int64)

    @classmethod
    def unpack(cls, summed: list[int], ranks_per_row: int) -> StepCounts:
        """Return the counts of the global batch.

        Args:
            summed: the packed fields, summed over all ranks.
            ranks_per_row: ranks that read the same rows (cp x tp) and therefore count them alike. Requests to stop are
                counted per rank.
        """
        *counts, high, low = summed
        raw = cls(*counts, flops=high * _HALF + low)  # type: ignore[misc]  # as many as there are fields before
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
    divergence: float = 0.0
    """Divergence from the teacher, before its weight."""

    @staticmethod
    def pack(lm: Tensor, z: Tensor, divergence: Tensor) -> Tensor:
        """Return one micro-batch's addends as a detached fp32 vector."""
        return torch.stack([lm.detach(), z.detach(), divergence.detach()])


class RowSums(NamedTuple):
    """Sums over the rows of the global batch."""

    load_balance: float
    """Load balance loss, already divided by the number of rows."""
    entropy: float
    """Entropy loss, already divided by the number of rows."""
    layers: dict[str, list[float]]
    """Each row's mean per token and channel, summed over the rows: a list over layers for each name of the model's
    layer sums."""

    @staticmethod
    def pack(
        load_balance: Tensor, entropy: Tensor, sums_LB: dict[str, Tensor], count_B: Tensor, row_weight_B: Tensor
    ) -> Tensor:
        """Return one micro-batch's addends as a detached fp32 vector of 2 + L elements per name.

        Args:
            load_balance: loss term.
            entropy: loss term.
            sums_LB: sums over a row's tokens and channels, by name.
            count_B: number of summed elements per row and layer.
            row_weight_B: 0 for rows that do not count.
        """
        per_element_B = row_weight_B / count_B.clamp(min=1)
        sums_NL = (torch.stack(list(sums_LB.values())).detach() * per_element_B).sum(-1)
        return torch.cat([torch.stack([load_balance.detach(), entropy.detach()]), sums_NL.flatten()])

    @classmethod
    def unpack(cls, summed: list[float], names: Sequence[str]) -> RowSums:
        """Return the record of a packed vector that was summed over micro-batches and ranks.

        Args:
            summed: the vector.
            names: names of the model's layer sums, in the order in which they were packed.
        """
        load_balance, entropy, *sums = summed
        layers = len(sums) // len(names)
        by_name = {name: sums[index * layers : (index + 1) * layers] for index, name in enumerate(names)}
        return cls(load_balance, entropy, by_name)


def read_step_counts(summed: Tensor, ranks_per_row: int) -> Callable[[], StepCounts]:
    """Begin to copy packed counts to the host; the returned function waits for the copy."""
    read = copy_to_host(summed)
    return lambda: StepCounts.unpack(read(), ranks_per_row)
