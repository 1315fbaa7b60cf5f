"""Batches that the loader gives to training.

Shape legend: B rows of a micro-batch, S tokens of a row, R rows of ``seq_len`` in a step, P subrows of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that does not count in the loss."""
FILLER = -1
"""Number of a filler row, which gives every rank the same number of micro-batches."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank computes in one forward and backward pass; tensors are on the CPU."""

    input_ids_BS: Tensor
    """int64 tokens."""
    labels_BS: Tensor
    """int64, the next token; IGNORED where the next token starts another document, in fillers and in skipped rows."""
    positions_BS: Tensor
    """int64 position of each token in its document; if the row begins inside a document, counted from the row start."""
    rows_B: Tensor
    """int64 running number of each row in the run, the same in every layout; FILLER for fillers."""
    row_weight_B: Tensor
    """fp32, 0 for fillers and for damaged rows that were skipped, else 1."""
    sources_B: Tensor
    """int16 index of the source each row comes from."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch. All ranks have the same number of micro-batches."""

    micro_batches: list[MicroBatch]
    seq_len: int
    skipped_rows: int
    """Number of damaged rows (of ``seq_len``) in this rank's part, which were replaced by rows without labels."""
    wait_s: float
    """Time that training waited for this batch, in seconds."""
    epochs: tuple[float, ...] = ()
    """Epochs of each source after this step (such as 1.25); the same on every rank."""
    tokens_hash: int = 0
    """32-bit hash of this rank's rows and their numbers; its sum over the ranks, modulo 2^32, is the global batch's."""
    damage: tuple[str, ...] = ()
    """One message per skipped row."""


class RowArrays(NamedTuple):
    """Output arrays of one row of ``seq_len``: views of int64 arrays."""

    input_ids_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray


class RowsOfStep:
    """Rows of ``seq_len`` of one step, to be split into rows of a curriculum stage's length and into micro-batches."""

    def __init__(self, rows: int, seq_len: int, length: int) -> None:
        """Allocate ``rows`` rows of ``seq_len``, to be split into rows of ``length``; all rows are fillers at first."""
        assert seq_len % length == 0
        self.length, self.subrows = length, seq_len // length
        # One array per field; micro-batches are views, not copies.
        self._tensors_RS = [torch.empty(rows, seq_len, dtype=torch.int64) for _ in range(3)]
        self._arrays_RS = [tensor.numpy() for tensor in self._tensors_RS]
        self._numbers, self._weights, self._sources = [FILLER] * rows, [0.0] * rows, [0] * rows

    def place(self, index: int) -> RowArrays:
        """Return the output arrays of row ``index``."""
        return RowArrays(*(array[index] for array in self._arrays_RS))

    def describe(self, index: int, number: int, source: int, weight: float = 1.0) -> None:
        """Set the number of the first curriculum row in row ``index``, its source and its weight."""
        self._numbers[index], self._sources[index], self._weights[index] = number, source, weight

    def blank(self, index: int) -> None:
        """Replace row ``index`` by a row without labels, with one document per curriculum row."""
        row = self.place(index)
        row.input_ids_S[:] = 0
        row.labels_S[:] = IGNORED
        row.positions_S.reshape(self.subrows, self.length)[:] = np.arange(self.length)

    def micro_batches(self, size: int) -> list[MicroBatch]:
        """Return micro-batches of ``size`` rows of ``seq_len``, which are ``size * seq_len / length`` rows each."""
        numbers_RP = np.asarray(self._numbers, np.int64)[:, None] + np.arange(self.subrows)
        numbers_RP[np.asarray(self._numbers) == FILLER] = FILLER
        columns = [
            *(tensor.view(-1, self.length) for tensor in self._tensors_RS),
            torch.from_numpy(numbers_RP.reshape(-1)),
            torch.from_numpy(np.repeat(np.asarray(self._weights, np.float32), self.subrows)),
            torch.from_numpy(np.repeat(np.asarray(self._sources, np.int16), self.subrows)),
        ]
        return [MicroBatch(*fields) for fields in zip(*(c.split(size * self.subrows) for c in columns), strict=True)]
