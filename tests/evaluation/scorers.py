"""Scorers without a model: each computes logits by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.ops.cross_entropy import TokenScores


class LogitsScorer:
    """Scores labels by the logits that a subclass computes for each row."""

    dp_rank, dp_size = 0, 1

    def logits(self, text: list[int]) -> Tensor:
        """Return the logits ``[S, V]`` of the tokens after each token of a row."""
        raise NotImplementedError

    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels."""
        logits_BSV = torch.stack([self.logits(text) for text in micro.input_ids_BS.tolist()])
        asked_BS = micro.labels_BS >= 0
        labels_BS = micro.labels_BS.clamp(min=0)
        likelihood_BS = logits_BSV.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
        return TokenScores(likelihood_BS.masked_fill(~asked_BS, 0), (logits_BSV.argmax(-1) == labels_BS) & asked_BS)

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Return ``values``: one process has all rows."""
        return values
