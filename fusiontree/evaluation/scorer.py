"""What a task asks of a model: scores of every label of a batch of rows, on any layout.

Shape legend: B rows, S tokens of a row, R rows of a task, K columns of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fusiontree.data.batch import FILLER, IGNORED, MicroBatch
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.cross_entropy import TokenScores
from fusiontree.parallel.batch_sharding import fill_up_rows, gather_scores, shard_inputs
from fusiontree.parallel.layout import Layout

__all__ = ["ModelScorer", "Scorer", "TokenScores"]


class Scorer(Protocol):
    """A model on its layout. All ranks make the same calls in the same order."""

    dp_rank: int
    """Which share of the rows this rank computes."""
    dp_size: int
    """Number of shares."""

    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels, ``[B, S]`` on the CPU.

        Args:
            micro: full rows of any length, on the CPU, equal on all ranks with the same ``dp_rank``. Labels may be on
                any tokens; positions restart where a document starts.
        """
        ...

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Return ``values`` (fp64 on the CPU) summed over the ``dp_size`` ranks that compute different rows."""
        ...


class ModelScorer:
    """A model held entirely by each rank, or one whose mixers were given a layout's context parallelism."""

    def __init__(self, model: FusionTreeModel, never: Sequence[int] = (), layout: Layout | None = None) -> None:
        """Score with ``model``, on its device.

        Args:
            model: in evaluation mode; with a ``layout`` of cp > 1 after ``apply_context_parallel``.
            never: ids of tokens that generation never draws.
            layout: process groups; None means this process alone.
        """
        self.model, self.layout = model, layout
        self.device = model.embed.weight.device
        self.dp_rank, self.dp_size = (0, 1) if layout is None else (layout.dp_rank, layout.dp_size)
        self._never_M = torch.tensor(list(never), dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels, ``[B, S]`` on the CPU."""
        length = micro.input_ids_BS.shape[1]
        cp_size = 1 if self.layout is None else self.layout.cp_size
        inputs = shard_inputs(fill_up_rows(micro, cp_size), None, (), self.layout).to(self.device)
        scores = self.model(**inputs._asdict(), never_M=self._never_M).token_scores
        assert scores is not None, "a micro-batch has labels"
        return gather_scores(scores, length, self.layout)

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over the ranks that compute different rows."""
        if self.layout is None or self.dp_size == 1:
            return values
        return self.layout.sum_over_rows(values.to(self.device)).cpu()


def micro_batch(input_ids_BS: Tensor, labels_BS: Tensor, numbers: Sequence[int] | None = None) -> MicroBatch:
    """Return rows of one document each, as the micro-batch of rows ``numbers`` (FILLER: without weight)."""
    rows, length = input_ids_BS.shape
    rows_B = torch.tensor(list(range(rows)) if numbers is None else list(numbers), dtype=torch.int64)
    weight_B = (rows_B != FILLER).to(torch.float32)
    return MicroBatch(
        input_ids_BS=input_ids_BS,
        labels_BS=labels_BS.masked_fill(weight_B[:, None] == 0, IGNORED),
        positions_BS=torch.arange(length).repeat(rows, 1),
        rows_B=rows_B,
        row_weight_B=weight_B,
        sources_B=torch.zeros(rows, dtype=torch.int16),
    )


def shares(count: int, batch_size: int, scorer: Scorer) -> Iterator[list[int]]:
    """Yield this rank's row numbers per batch; FILLER gives every rank equally many batches and rows."""
    size = max(1, min(batch_size, -(-count // scorer.dp_size)))
    for first in range(0, count, size * scorer.dp_size):
        begin = first + scorer.dp_rank * size
        yield [number if number < count else FILLER for number in range(begin, begin + size)]


def row_table(
    scorer: Scorer,
    batches: Iterable[MicroBatch],
    rows: int,
    columns: int,
    measure: Callable[[MicroBatch, TokenScores], Tensor],
) -> Tensor:
    """Return a table of numbers per row, fp64 ``[rows, columns]``, complete and bit-identical on every rank.

    Every entry is computed on one rank and added to zeros, so the table does not depend on the number of ranks but for
    the rounding of the scores.

    Args:
        scorer: the model.
        batches: this rank's share; every rank has as many.
        rows: of all ranks' shares.
        columns: numbers per row.
        measure: returns ``[B, columns]`` for a batch.
    """
    table_RK = torch.zeros(rows, columns, dtype=torch.float64)
    for micro in batches:
        counts_B = micro.row_weight_B > 0
        values_BK = measure(micro, scorer.score(micro)).to(torch.float64)
        table_RK[micro.rows_B[counts_B]] = values_BK[counts_B]
    return scorer.sum_over_rows(table_RK)
