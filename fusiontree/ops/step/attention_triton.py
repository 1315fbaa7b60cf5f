"""Attention of one new token per row to its cached keys, split over the keys (GPU).

A row has too few heads to occupy a GPU, so several programs share the keys of a head: each computes softmax and sum of
its part, and a second kernel merges the parts by their log-sum-exp, which is exact (Dao et al. 2023, "Flash-Decoding").
Lengths are read on the device, so that a recorded step can be replayed while the texts grow.

Shape legend: B rows, H query heads, K key/value heads, R query heads of each, D channels of a head, T slots of a cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64  # per step of a program's loop
_PROGRAMS = 256  # that keep a large GPU busy
_MOST_PARTS = 128


class Store(NamedTuple):
    """Keys, values and positions of the heads of one kind, in the memory layout [B, K, T, D]."""

    k_BTKD: Tensor
    v_BTKD: Tensor
    positions_BT: Tensor


@triton.jit
def _rotate_and_store(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, local_k, local_v, local_positions, global_k, global_v, global_positions,
    positions_ptr, column_ptr, qkv_stride, table_stride, heads, kv_heads, local_heads, local_kv, slots, capacity,
    rotates_global: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate a head of q or k, or take a head of v; write it to the queries or to its slot of the cache."""
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < HALF
    source = qkv_ptr + row * qkv_stride + head * (2 * HALF) + d
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    is_query = head < heads
    is_value = head >= heads + kv_heads
    kv = tl.where(is_value, head - heads - kv_heads, head - heads)
    is_local = tl.where(is_query, head < local_heads, kv < local_kv)
    turned = head < heads + kv_heads
    if not rotates_global:
        turned = turned & is_local
    if turned:
        cos = tl.load(cos_ptr + row * table_stride + d, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + row * table_stride + d, mask=mask, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = (x * cos - y * sin).to(first.dtype)
        second = (x * sin + y * cos).to(second.dtype)
    position = tl.load(positions_ptr + row)
    if is_query:
        query = q_ptr + (row * heads + head) * (2 * HALF) + d
        tl.store(query, first, mask=mask)
        tl.store(query + HALF, second, mask=mask)
    else:
        length = tl.where(is_local, slots, capacity)
        slot = tl.where(is_local, position % slots, tl.load(column_ptr))
        place = tl.where(is_local, row * local_kv + kv, row * (kv_heads - local_kv) + kv - local_kv)
        if is_local:
            keys, values, table = local_k, local_v, local_positions
        else:
            keys, values, table = global_k, global_v, global_positions
        target = (place * length + slot) * (2 * HALF) + d
        if is_value:
            tl.store(values + target, first.to(values.dtype.element_ty), mask=mask)
            tl.store(values + target + HALF, second.to(values.dtype.element_ty), mask=mask)
        else:
            tl.store(keys + target, first.to(keys.dtype.element_ty), mask=mask)
            tl.store(keys + target + HALF, second.to(keys.dtype.element_ty), mask=mask)
            if (kv == 0) | (kv == local_kv):
                tl.store(table + row * length + slot, position)


@triton.jit
def _attend_to_part(
    q_ptr, local_k, local_v, local_positions, global_k, global_v, global_positions, positions_ptr, column_ptr,
    out_ptr, lse_ptr, heads, kv_heads, local_kv, slots, capacity, window, parts, scale,
    R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one key/value head to one part of its keys."""
    part = tl.program_id(0)
    row = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = tl.program_id(1) % kv_heads
    position = tl.load(positions_ptr + row)
    is_local = kv < local_kv
    length = tl.where(is_local, slots, capacity)
    place = tl.where(is_local, row * local_kv + kv, row * (kv_heads - local_kv) + kv - local_kv)
    used = tl.where(is_local, tl.minimum(position + 1, slots), tl.load(column_ptr) + 1).to(tl.int32)
    oldest = tl.where(is_local, position - window, -1)
    if is_local:
        keys, values, table = local_k, local_v, local_positions
    else:
        keys, values, table = global_k, global_v, global_positions
    each = tl.cdiv(tl.cdiv(used, parts), BT) * BT
    begin = part * each
    end = tl.minimum(begin + each, used)
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    inside = (r[:, None] < R) & (d[None, :] < D)
    head = kv * R + r
    q = tl.load(q_ptr + (row * heads + head[:, None]) * D + d[None, :], mask=inside, other=0.0)
    base = place * length
    most = tl.full([RP], float("-inf"), dtype=tl.float32)
    total = tl.zeros([RP], dtype=tl.float32)
    out = tl.zeros([RP, DP], dtype=tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        tile = (base + t[:, None]) * D + d[None, :]
        tile_mask = (t[:, None] < end) & (d[None, :] < D)
        k = tl.load(keys + tile, mask=tile_mask, other=0.0)
        at = tl.load(table + row * length + t, mask=t < end, other=-1)
        visible = (at >= 0) & (at <= position) & (at > oldest)
        scores = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        newest = tl.maximum(most, tl.max(scores, axis=1))
        safe = tl.where(newest == float("-inf"), 0.0, newest)
        weights = tl.exp(scores - safe[:, None])
        kept = tl.exp(most - safe)
        total = total * kept + tl.sum(weights, axis=1)
        v = tl.load(values + tile, mask=tile_mask, other=0.0)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = newest
    place_out = (row * heads + head) * parts + part
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + place_out[:, None] * D + d[None, :], out, mask=inside)
    lse = tl.where(total > 0.0, most + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + place_out, lse, mask=r < R)


@triton.jit
def _merge_parts(parts_ptr, lse_ptr, out_ptr, parts, D: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr):
    """Merge the parts of one head: their mean, weighed by the exponential of their log-sum-exp."""
    head = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, PP), tl.arange(0, DP)
    lse = tl.load(lse_ptr + head * parts + p, mask=p < parts, other=float("-inf"))
    weight = tl.exp(lse - tl.max(lse, axis=0))
    mask = (p[:, None] < parts) & (d[None, :] < D)
    part = tl.load(parts_ptr + (head * parts + p[:, None]) * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def attend(
    qkv_BM: Tensor,
    tables_BD: tuple[Tensor, Tensor],
    local: Store | None,
    everything: Store | None,
    positions_B: Tensor,
    column_1: Tensor,
    *,
    heads: tuple[int, int],
    window: int,
    rotates_global: bool,
) -> Tensor:
    """Rotate one token's queries and keys, store keys and values, and attend; returns ``[B, H*D]``.

    Args:
        qkv_BM: the projections of one token: local then global heads of q, of k, of v.
        tables_BD: rotary cosines and sines [B, D/2], fp32.
        local: ring of the local heads, or None if there are none; position p is in slot ``p % T``. Written to.
        everything: all keys of the global heads, or None if there are none. Written to.
        positions_B: the token's position in each text.
        column_1: the token's column in ``everything``.
        heads: query heads, and query heads per key/value head.
        window: tokens that local heads see.
        rotates_global: whether global heads are rotated.
    """
    a, b = local or everything, everything or local
    assert a is not None and b is not None and qkv_BM.stride(1) == 1, "one kind of heads must exist"
    assert all(t.transpose(1, 2).is_contiguous() for kept in (a, b) for t in kept[:2]), (
        "the layout must be [B, K, T, D]"
    )
    rows, slots, a_heads, width = a.k_BTKD.shape
    capacity, b_heads = b.k_BTKD.shape[1:3]
    local_kv = a_heads if local is not None else 0
    kv_heads = local_kv + (b_heads if everything is not None else 0)
    queries, group = heads
    cos_BD, sin_BD = (table.contiguous() for table in tables_BD)
    q = qkv_BM.new_empty(rows, queries, width)
    _rotate_and_store[(queries + 2 * kv_heads, rows)](
        qkv_BM, cos_BD, sin_BD, q, *a, *b, positions_B, column_1, qkv_BM.stride(0),
        width // 2 if cos_BD.shape[0] > 1 else 0, queries, kv_heads, local_kv * group, local_kv, slots, capacity,
        rotates_global=rotates_global, HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    parts = parts_for(rows * max(1, kv_heads - local_kv), capacity if everything is not None else slots)
    partial = torch.empty(rows, queries, parts, width, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, queries, parts, dtype=torch.float32, device=q.device)
    block = max(16, triton.next_power_of_2(width))
    _attend_to_part[(parts, rows * kv_heads)](
        q, *a, *b, positions_B, column_1, partial, lse, queries, kv_heads, local_kv, slots, capacity, window, parts,
        width**-0.5, R=group, D=width, RP=max(16, triton.next_power_of_2(group)), DP=block, BT=_KEYS, num_warps=4,
    )  # fmt: skip
    out = qkv_BM.new_empty(rows, queries * width)
    _merge_parts[(rows * queries,)](
        partial, lse, out, parts, D=width, DP=block, PP=triton.next_power_of_2(parts), num_warps=8
    )
    return out


def parts_for(heads: int, keys: int) -> int:
    """Return the parts to split ``keys`` into, for ``heads`` key/value heads of all rows together."""
    return max(1, min(_PROGRAMS // heads, _MOST_PARTS, keys // _KEYS))
