"""Reference cross entropy: computes all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    vocab_start: int = 0,
    gather_parts: Callable[[Tensor], Tensor] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.cross_entropy.linear_cross_entropy`.

    Raises:
        ValueError: the vocabulary is split over ranks.
    """
    if gather_parts is not None:
        raise ValueError("kernels.cross_entropy=reference cannot split the vocabulary over ranks; use auto or chunked")
    logits_NV = hidden_NH @ weight_VH.t()
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    valid_N = labels_N >= 0
    partition_N = logits_NV.logsumexp(-1)
    target_N = logits_NV.gather(-1, labels_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss_sum = ((partition_N - target_N) * valid_N).sum()
    return loss_sum, (partition_N.square() * valid_N).sum()
