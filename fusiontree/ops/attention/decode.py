"""Attention of one new token per row to its cached keys, without copying the keys in any dtype.

Query heads that share a key/value head form the rows of one matrix product with it. For 16-bit inputs, scores and
softmax are fp32, as in the reference. The last product sums over all keys; for long caches it is split into parts, so
that many of the GPU's multiprocessors work on it.

Shape legend: B rows, S = 1 query, T keys, K key/value heads, R query heads of each, H = K R, n = B K products,
p parts of t keys, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PART = 256  # keys of a part
_CUT_FROM = 2048  # number of keys from which the last product is split into parts
_HALF = (torch.bfloat16, torch.float16)


def roomy(keys: int) -> int:
    """Round a number of keys up to a number of slots that :func:`decode_attention` can split into parts."""
    return keys if keys < _CUT_FROM else -(-keys // _PART) * _PART


def key_bias(key_positions_BT: Tensor, query_positions_BS: Tensor, window: int | None) -> Tensor:
    """Return the additive mask for one query per row: 0 for visible keys, minus infinity for other keys.

    Args:
        key_positions_BT: each slot's position in its row's text; -1 marks an empty slot.
        query_positions_BS: the queries' positions, S = 1.
        window: number of tokens that a query sees, including its own token; None means all.

    Returns:
        fp32 [B, T].
    """
    visible_BT = (key_positions_BT >= 0) & (key_positions_BT <= query_positions_BS)
    if window is not None:
        visible_BT = visible_BT & (key_positions_BT > query_positions_BS - window)
    return torch.zeros_like(key_positions_BT, dtype=torch.float32).masked_fill(~visible_BT, -math.inf)


def decode_attention(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BT: Tensor, scale: float | None = None
) -> Tensor:
    """Compute attention of one query per row; for inference (no gradients for 16-bit dtypes on GPUs).

    Args:
        q_BSHD: queries, S = 1; query head h reads key/value head h // R.
        k_BTKD: keys, in any order; fastest if contiguous as [B, K, T, D].
        v_BTKD: values, in the order and layout of the keys.
        bias_BT: from :func:`key_bias`. Every query must see at least one key, otherwise its output is NaN.
        scale: factor on the scores; None means 1 / sqrt(D).

    Returns:
        Outputs [B, 1, H, D] in the queries' dtype, equal to :func:`fusiontree.ops.attention.cached_attention`.
    """
    rows, length, heads, width = q_BSHD.shape
    assert length == 1, f"{length} queries per row; use cached_attention for more than one"
    keys, kv_heads = k_BTKD.shape[1:3]
    q_nRD = q_BSHD.reshape(rows * kv_heads, heads // kv_heads, width)
    k_nTD, v_nTD = (t.transpose(1, 2).reshape(rows * kv_heads, keys, width) for t in (k_BTKD, v_BTKD))
    scores_BKRT = _product(q_nRD, k_nTD.transpose(1, 2)).view(rows, kv_heads, -1, keys)
    factor = scale if scale is not None else 1.0 / math.sqrt(width)
    weights_nRT = torch.add(bias_BT[:, None, None], scores_BKRT, alpha=factor).softmax(-1).flatten(0, 1)
    parts = keys // _PART if keys >= _CUT_FROM and keys % _PART == 0 and v_nTD.is_contiguous() else 1
    if parts > 1:  # the sum over parts is fp32
        weights_npRt = weights_nRT.unflatten(-1, (parts, -1)).transpose(1, 2).flatten(0, 1)
        out_nRD = _product(weights_npRt, v_nTD.view(-1, keys // parts, width)).unflatten(0, (-1, parts)).sum(1)
    else:
        out_nRD = _product(weights_nRT, v_nTD, q_BSHD.dtype)
    return out_nRD.view(q_BSHD.shape).to(q_BSHD.dtype)


def _product(a_nXY: Tensor, b_nYZ: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the products in ``dtype`` or better; on GPUs, 16-bit inputs are not converted, as sums are fp32 anyway."""
    if b_nYZ.dtype not in _HALF:
        return torch.bmm(a_nXY.to(b_nYZ.dtype), b_nYZ)
    if b_nYZ.device.type != "cpu":
        a_nXY = a_nXY.to(b_nYZ.dtype)
        return torch.bmm(a_nXY, b_nYZ) if dtype == b_nYZ.dtype else torch.bmm(a_nXY, b_nYZ, out_dtype=dtype)
    return torch.bmm(a_nXY.float(), b_nYZ.float())
