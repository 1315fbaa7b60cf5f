"""Scores of single tokens: log-likelihood of the label, and whether greedy decoding would choose it.

Shape legend: N tokens, n tokens of a chunk, H channels, V vocabulary (v: this rank's shard), R ranks, M token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenScores(NamedTuple):
    """Scores of labels; tensors of equal shape, 0 and False where there is no label."""

    log_likelihood: Tensor
    """fp32, in nats."""
    chosen: Tensor
    """bool: the label is the most likely token, of several equally likely ones the first."""


@torch.no_grad()
def linear_token_scores(
    hidden_NH: Tensor,
    weight_vH: Tensor,
    labels_N: Tensor,
    never_M: Tensor,
    *,
    vocab_start: int = 0,
    gather_parts: Callable[[Tensor], Tensor] | None = None,
    chunk_tokens: int = 2048,
) -> TokenScores:
    """Return the scores of labels under the logits ``hidden @ weight.T``, without gradient.

    Computes logits of labelled tokens only, a chunk at a time.

    Args:
        hidden_NH: hidden states.
        weight_vH: the head.
        labels_N: int64; negative means the token has none.
        never_M: int64 ids that are never chosen, such as padding of the vocabulary; they keep their likelihood.
        vocab_start: token id of the first row of ``weight_vH``.
        gather_parts: set if ranks hold shards of the vocabulary: a collective that stacks a tensor of each rank,
            ``[…]`` to ``[R, …]``. The ranks must pass the same labels.
        chunk_tokens: tokens per chunk of logits in memory.
    """
    at_N = (labels_N >= 0).nonzero().squeeze(1)
    log_likelihood_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=labels_N.device)
    chosen_N = torch.zeros_like(labels_N, dtype=torch.bool)
    size = weight_vH.shape[0]
    never_M = never_M - vocab_start
    never_M = never_M[(never_M >= 0) & (never_M < size)]
    for at_n in at_N.split(chunk_tokens):
        logits_nv = (hidden_NH[at_n] @ weight_vH.t()).float()
        label_n = labels_N[at_n]
        index_n = label_n - vocab_start
        is_here_n = (index_n >= 0) & (index_n < size)
        target_n = logits_nv.gather(-1, index_n.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
        partition_n = logits_nv.logsumexp(-1)
        most_n, first_n = logits_nv.index_fill_(1, never_M, -torch.inf).max(-1)
        best_n = first_n + vocab_start
        target_n = target_n.masked_fill(~is_here_n, 0.0)
        if gather_parts is not None:
            partition_Rn, target_Rn, most_Rn = gather_parts(torch.stack([partition_n, target_n, most_n])).unbind(1)
            partition_n, target_n = partition_Rn.logsumexp(0), target_Rn.sum(0)
            rank_n = most_Rn.argmax(0)  # of equal logits the first
            best_n = gather_parts(best_n).gather(0, rank_n.unsqueeze(0)).squeeze(0)
        log_likelihood_N[at_n] = target_n - partition_n
        chosen_N[at_n] = best_n == label_n
    return TokenScores(log_likelihood_N, chosen_N)
