"""Attention by torch's scaled_dot_product_attention; windows are computed in blocks, at linear cost in row length.

Shape legend: B rows, S queries, T keys, n blocks of W tokens, H query heads, K key/value heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.attention.reference import AttentionInputs


def attention_sdpa(inputs: AttentionInputs) -> Tensor:
    """Compute :func:`fusiontree.ops.attention.attention`."""
    if inputs.window is not None and 2 * inputs.window < inputs.k_BTKD.shape[1]:
        return _blockwise(inputs, inputs.window)
    mask = None if inputs.causal_rows else inputs.visible_keys().unsqueeze(1)
    return sdpa(*inputs[:3], mask, inputs.scale)


def sdpa(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Call torch's function; without a mask, attention is causal and there are as many queries as keys."""
    grouped = q_BSHD.shape[2] != k_BTKD.shape[2]
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_BHSD.transpose(1, 2)


def _blockwise(inputs: AttentionInputs, window: int) -> Tensor:
    """Compute attention of each block of ``window`` queries to its own and the previous block of keys.

    These two blocks contain all visible keys.
    """
    q_BSHD, k_BTKD, v_BTKD, _, documents, scale = inputs
    rows, queries = q_BSHD.shape[:2]
    offset = inputs.before
    before = -offset % window  # aligns the blocks of queries with those of keys
    blocks = -(-queries // window)
    after = blocks * window - queries
    skipped = (offset + before) // window - 1  # blocks of keys that no query sees

    def key_blocks(x_BTKD: Tensor) -> Tensor:
        padded = F.pad(x_BTKD, (0, 0, 0, 0, before + (window if skipped < 0 else 0), after))
        first = max(0, skipped) * window
        padded = padded[:, first : first + (blocks + 1) * window]
        pairs = padded.unfold(1, 2 * window, window)  # [B, n, K, D, 2W]
        return pairs.permute(0, 1, 4, 2, 3).reshape(rows * blocks, 2 * window, *x_BTKD.shape[2:])

    q_nWHD = F.pad(q_BSHD, (0, 0, 0, 0, 0, after)).reshape(rows * blocks, window, *q_BSHD.shape[2:])
    device = q_BSHD.device
    index_W = torch.arange(window, device=device)
    distance_W2W = (index_W + window).unsqueeze(1) - torch.arange(2 * window, device=device)
    visible_W2W = (distance_W2W >= 0) & (distance_W2W < window)
    # The first visible key of each token: its document's start, or the first key.
    index_S = torch.arange(queries, device=device)
    if documents is None:
        reach_BS = (index_S + offset).expand(rows, -1)
    else:
        reach_BS = torch.minimum(documents.positions_BS, index_S + offset)
    reach_nW = F.pad(reach_BS, (0, after)).reshape(rows * blocks, window)
    visible_nW2W = visible_W2W & (distance_W2W <= reach_nW.unsqueeze(-1))
    out_nWHD = sdpa(q_nWHD, key_blocks(k_BTKD), key_blocks(v_BTKD), visible_nW2W.unsqueeze(1), scale)
    return out_nWHD.reshape(rows, blocks * window, *q_BSHD.shape[2:])[:, :queries]
