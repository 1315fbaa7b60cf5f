"""Reference attention: all scores, a mask, a softmax. Memory grows with S x T; for tests and short rows.

Shape legend: B rows, S queries, T keys, H query heads, K key/value heads, D channels of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.documents import Documents


class AttentionInputs(NamedTuple):
    """Arguments of :func:`fusiontree.ops.attention.attention`, which describes them."""

    q_BSHD: Tensor
    k_BTKD: Tensor
    v_BTKD: Tensor
    window: int | None = None
    documents: Documents | None = None
    scale: float | None = None

    @property
    def before(self) -> int:
        """Number of keys before the first query."""
        return self.k_BTKD.shape[1] - self.q_BSHD.shape[1]

    @property
    def causal_rows(self) -> bool:
        """True if each row is one document with as many queries as keys, and no window hides a key."""
        whole = self.documents is None or self.documents.whole_rows
        return whole and self.before == 0 and (self.window is None or self.window >= self.k_BTKD.shape[1])

    def visible_keys(self) -> Tensor:
        """Return the mask of :func:`visible_keys` for these queries."""
        positions_BS = None if self.documents is None else self.documents.positions_BS
        queries, keys = self.q_BSHD.shape[1], self.k_BTKD.shape[1]
        return visible_keys(queries, keys, self.window, positions_BS, self.q_BSHD.device)


def visible_keys(
    queries: int, keys: int, window: int | None, positions_BS: Tensor | None, device: torch.device
) -> Tensor:
    """Return the mask of visible keys per query, [B or 1, S, T]."""
    index_S = torch.arange(queries, device=device) + keys - queries
    distance_ST = index_S.unsqueeze(1) - torch.arange(keys, device=device)
    visible_BST = (distance_ST >= 0).unsqueeze(0)
    if window is not None:
        visible_BST = visible_BST & (distance_ST < window)
    if positions_BS is not None:
        visible_BST = visible_BST & (distance_ST <= positions_BS.unsqueeze(-1))
    return visible_BST


def masked_attention(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, visible_BST: Tensor, scale: float | None
) -> Tensor:
    """Softmax attention under a boolean mask, scores in fp32 or better."""
    group = q_BSHD.shape[2] // k_BTKD.shape[2]
    compute = torch.promote_types(q_BSHD.dtype, torch.float32)
    k_BTHD = k_BTKD.repeat_interleave(group, dim=2)
    v_BTHD = v_BTKD.repeat_interleave(group, dim=2)
    scores_BHST = torch.einsum("bshd,bthd->bhst", q_BSHD.to(compute), k_BTHD.to(compute))
    scores_BHST = scores_BHST * (scale if scale is not None else 1.0 / math.sqrt(q_BSHD.shape[-1]))
    weights_BHST = scores_BHST.masked_fill(~visible_BST.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD.to(compute)).to(q_BSHD.dtype)


def attention_reference(inputs: AttentionInputs) -> Tensor:
    """Compute :func:`fusiontree.ops.attention.attention`."""
    return masked_attention(*inputs[:3], inputs.visible_keys(), inputs.scale)
