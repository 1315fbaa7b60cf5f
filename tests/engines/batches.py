"""Micro-batches of given tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch


def micro_batch(ids_BS: Tensor, positions_BS: Tensor | None = None, labels_BS: Tensor | None = None) -> MicroBatch:
    """Return a micro-batch; the label of a token is the next token of its row unless ``labels_BS`` says otherwise."""
    rows = len(ids_BS)
    if positions_BS is None:
        positions_BS = torch.arange(ids_BS.shape[1]).expand(rows, -1)
    labels_BS = ids_BS.roll(-1, 1) if labels_BS is None else labels_BS
    return MicroBatch(
        ids_BS, labels_BS, positions_BS, torch.arange(rows), torch.ones(rows), torch.zeros(rows, dtype=torch.int16)
    )
