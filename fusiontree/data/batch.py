"""What the loader hands to training.

Shape legend: B rows of a micro batch, S tokens of a row, R rows of seq_len that are put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of a token whose successor does not count."""
FILLER = -1
"""Number of a row that only keeps the ranks in step."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank computes in one pass, on the CPU."""

    input_ids_BS: Tensor
    """int64 tokens."""
    labels_BS: Tensor
    """int64, the token after each; IGNORED where that token starts another document, in fillers and skipped rows."""
    positions_BS: Tensor
    """int64 position of each token in its document, or since the row began where the row begins inside one."""
    rows_B: Tensor
    """int64 running number of each row in the run, the same in every layout; FILLER for fillers."""
    row_weight_B: Tensor
    """fp32, 0 for fillers and for damaged rows that were skipped, else 1."""
    sources_B: Tensor
    """int16 index of the source each row comes from."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch. All ranks have the same number of micro batches."""

    micro_batches: list[MicroBatch]
    seq_len: int
    skipped_rows: int
    """Damaged rows (of seq_len) of this rank's part whose slots are kept without labels."""
    wait_s: float
    """How long training waited for this batch, in seconds."""
    epochs: tuple[float, ...] = ()
    """How often each source has been gone through after this step, 1.25 say; the same on every rank."""
    tokens_hash: int = 0
    """32-bit hash of this rank's rows and their numbers; its sum over the ranks, modulo 2^32, is the global batch's."""
    damage: tuple[str, ...] = ()
    """What was wrong with the skipped rows."""


class RowArrays(NamedTuple):
    """Where one row of seq_len is written: views of int64 arrays."""

    input_ids_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray


class RowsOfStep:
    """Rows of seq_len on their way to micro batches, each cut into pieces of a stage's length."""

    def __init__(self, rows: int, seq_len: int, length: int) -> None:
        """Make room for ``rows`` rows of ``seq_len``, to be cut into rows of ``length``; all are fillers at first."""
        assert seq_len % length == 0
        self.length, self.pieces = length, seq_len // length
        # One array each: micro batches are views of it, nothing is copied again.
        self._tensors_RS = [torch.empty(rows, seq_len, dtype=torch.int64) for _ in range(3)]
        self._arrays_RS = [tensor.numpy() for tensor in self._tensors_RS]
        self._numbers, self._weights, self._sources = [FILLER] * rows, [0.0] * rows, [0] * rows

    def place(self, index: int) -> RowArrays:
        """Return where row ``index`` is to be written."""
        return RowArrays(*(array[index] for array in self._arrays_RS))

    def describe(self, index: int, number: int, source: int, weight: float = 1.0) -> None:
        """Say what row ``index`` is: the number of its first piece, its source, its weight."""
        self._numbers[index], self._sources[index], self._weights[index] = number, source, weight

    def blank(self, index: int) -> None:
        """Make row ``index`` one without labels; its pieces are a document each."""
        row = self.place(index)
        row.input_ids_S[:] = 0
        row.labels_S[:] = IGNORED
        row.positions_S.reshape(self.pieces, self.length)[:] = np.arange(self.length)

    def micro_batches(self, size: int) -> list[MicroBatch]:
        """Return micro batches of ``size`` rows of seq_len, that is ``size * pieces`` rows of the stage's length."""
        numbers_RP = np.asarray(self._numbers, np.int64)[:, None] + np.arange(self.pieces)
        numbers_RP[np.asarray(self._numbers) == FILLER] = FILLER
        columns = [
            *(tensor.view(-1, self.length) for tensor in self._tensors_RS),
            torch.from_numpy(numbers_RP.reshape(-1)),
            torch.from_numpy(np.repeat(np.asarray(self._weights, np.float32), self.pieces)),
            torch.from_numpy(np.repeat(np.asarray(self._sources, np.int16), self.pieces)),
        ]
        return [MicroBatch(*parts) for parts in zip(*(c.split(size * self.pieces) for c in columns), strict=True)]
