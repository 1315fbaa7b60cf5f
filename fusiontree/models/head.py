"""The language model head. Shape legend: B rows, S tokens, C channels, V tokens of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.ops.cross_entropy import linear_cross_entropy


class LanguageModelHead(nn.Module):
    """Logits of hidden states, or their summed loss without ever holding all logits in memory.

    With a tied embedding, ``weight`` is the embedding's parameter.
    """

    def __init__(self, vocab_size: int, channels: int, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, channels))
        self.backend = backend

    def forward(self, hidden_BSC: Tensor, labels_BS: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits ``[B, S, V]``, or with labels ``(loss_sum, z_sum)``.

        Both sums are fp32 scalars over the tokens whose label is not negative: cross entropy in nats, and squared
        log-partition.
        """
        if labels_BS is None:
            return F.linear(hidden_BSC, self.weight)
        return linear_cross_entropy(hidden_BSC.flatten(0, 1), self.weight, labels_BS.flatten(), backend=self.backend)
