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

from fusiontree.ops.step.early_start import early_start

_KEYS = 64  # per step of a program's loop
_PROGRAMS = 256  # that keep a large GPU busy
_MOST_PARTS = 128
_CHANNELS = 32  # of a program that merges


class Store(NamedTuple):
    """Keys, values and positions of the heads of one kind, in the memory layout [B, K, T, D]."""

    k_BTKD: Tensor
    v_BTKD: Tensor
    positions_BT: Tensor


@triton.jit
def _turn(source_ptr, at, partner, cos, sin, mask):
    """Return rotated channels in the input's dtype; ``sin`` has the sign of the partner's part."""
    x = tl.load(source_ptr + at, mask=mask, other=0.0)
    y = tl.load(source_ptr + partner, mask=mask, other=0.0)
    return (x.to(tl.float32) * cos + y.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _attend_to_part(
    qkv_ptr, cos_ptr, sin_ptr, local_k, local_v, local_positions, global_k, global_v, global_positions,
    positions_ptr, column_ptr, out_ptr, lse_ptr, qkv_stride, table_stride, heads, kv_heads, local_kv, slots, capacity,
    window, parts, scale, rotates_global: tl.constexpr, signals: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one key/value head to one part of its keys; store the new key and value.

    The program whose part has the slot of the new token rotates and stores its key and value, and is the only one that
    reads them.
    """
    part = tl.program_id(0)
    row = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = kv_heads - 1 - tl.program_id(1) % kv_heads  # global heads have more keys and start first
    position = tl.load(positions_ptr + row)
    is_local = kv < local_kv
    length = tl.where(is_local, slots, capacity)
    place = tl.where(is_local, row * local_kv + kv, row * (kv_heads - local_kv) + kv - local_kv)
    column = tl.load(column_ptr)
    used = tl.where(is_local, tl.minimum(position + 1, slots), column + 1).to(tl.int32)
    oldest = tl.where(is_local, position - window, -1)
    if is_local:
        keys, values, table = local_k, local_v, local_positions
    else:
        keys, values, table = global_k, global_v, global_positions
    each = tl.maximum(tl.cdiv(tl.cdiv(used, parts), 16) * 16, BT)
    begin = part * each
    end = tl.minimum(begin + each, used)
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    inside = (r[:, None] < R) & (d[None, :] < D)
    head = kv * R + r
    low = d < D // 2
    partner = tl.where(low, d + D // 2, d - D // 2)
    angle = row * table_stride + tl.where(low, d, d - D // 2)
    turned = is_local | rotates_global
    cos = tl.load(cos_ptr + angle, mask=(d < D) & turned, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=(d < D) & turned, other=0.0)
    sin = tl.where(low, -sin, sin)
    token = qkv_ptr + row * qkv_stride
    q = _turn(token, head[:, None] * D + d[None, :], head[:, None] * D + partner[None, :], cos, sin, inside)
    slot = tl.where(is_local, position % slots, column).to(tl.int32)
    if (slot >= begin) & (slot < end):
        start = (heads + kv) * D
        target = (place * length + slot) * D + d
        key = _turn(token, start + d, start + partner, cos, sin, d < D)
        tl.store(keys + target, key.to(keys.dtype.element_ty), mask=d < D)
        value = tl.load(token + start + kv_heads * D + d, mask=d < D, other=0.0)
        tl.store(values + target, value.to(values.dtype.element_ty), mask=d < D)
        tl.store(table + row * length + slot, position)  # equal for all heads
        tl.debug_barrier()  # other threads of the program read them below
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
    if signals:
        tl.extra.cuda.gdc_launch_dependents()
    place_out = (row * heads + head) * parts + part
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + place_out[:, None] * D + d[None, :], out, mask=inside)
    lse = tl.where(total > 0.0, most + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + place_out, lse, mask=r < R)


@triton.jit
def _merge_parts(
    parts_ptr, lse_ptr, out_ptr, parts,
    signals: tl.constexpr, waits: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """Merge some channels of the parts of one head: their mean, weighed by the exponential of their log-sum-exp."""
    if waits:
        tl.extra.cuda.gdc_wait()
    if signals:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, PP), tl.program_id(1) * BD + tl.arange(0, BD)
    lse = tl.load(lse_ptr + head * parts + p, mask=p < parts, other=float("-inf"))
    weight = tl.exp(lse - tl.max(lse, axis=0))
    mask = (lse > float("-inf"))[:, None] & (d[None, :] < D)
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
    parts = parts_for(rows * max(1, kv_heads - local_kv), capacity if everything is not None else slots)
    partial = torch.empty(rows, queries, parts, width, dtype=torch.float32, device=qkv_BM.device)
    lse = torch.empty(rows, queries, parts, dtype=torch.float32, device=qkv_BM.device)
    signals, options = early_start(qkv_BM.device, True)
    _attend_to_part[(parts, rows * kv_heads)](
        qkv_BM, cos_BD, sin_BD, *a, *b, positions_B, column_1, partial, lse, qkv_BM.stride(0),
        width // 2 if cos_BD.shape[0] > 1 else 0, queries, kv_heads, local_kv, slots, capacity, window, parts,
        width**-0.5, rotates_global=rotates_global, signals=signals, R=group, D=width,
        RP=max(16, triton.next_power_of_2(group)), DP=max(16, triton.next_power_of_2(width)), BT=_KEYS, num_warps=4,
    )  # fmt: skip
    out = qkv_BM.new_empty(rows, queries * width)
    channels = min(_CHANNELS, triton.next_power_of_2(width))
    _merge_parts[(rows * queries, triton.cdiv(width, channels))](
        partial, lse, out, parts, signals=signals, waits=bool(options), D=width, BD=channels,
        PP=triton.next_power_of_2(parts), num_warps=4, **options,
    )  # fmt: skip
    return out


def parts_for(heads: int, keys: int) -> int:
    """Return the parts to split ``keys`` into, for ``heads`` key/value heads of all rows together."""
    return max(1, min(_PROGRAMS // heads, _MOST_PARTS, keys // _KEYS))
