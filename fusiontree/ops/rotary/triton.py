"""Rotation of queries and keys, split into local and global heads, as one Triton kernel (GPU).

Shape legend: B rows, S tokens, H query heads, K key heads, D channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.elementwise import compiled
from fusiontree.ops.rotary import reference

_TOKENS = 32  # tokens per program


@triton.jit
def _rotate(
    q_ptr, k_ptr, q_first_ptr, q_rest_ptr, k_first_ptr, k_rest_ptr, cos_ptr, sin_ptr,
    q_row, q_token, k_row, k_token, tables_row, length, heads, q_cut, k_cut, k_heads,
    back: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rotate one head of q or k into its part; backward: rotate by minus the angle, from the part into the head."""
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK)
    mask = (t[:, None] < length) & (d[None, :] < HALF)
    token = t.to(tl.int64)
    if head < heads:
        whole = q_ptr + row * q_row + head * (2 * HALF)
        stride = q_token
        if head < q_cut:
            part, count, place = q_first_ptr, q_cut, head
        else:
            part, count, place = q_rest_ptr, heads - q_cut, head - q_cut
    else:
        whole = k_ptr + row * k_row + (head - heads) * (2 * HALF)
        stride = k_token
        if head - heads < k_cut:
            part, count, place = k_first_ptr, k_cut, head - heads
        else:
            part, count, place = k_rest_ptr, k_heads - k_cut, head - heads - k_cut
    whole += token[:, None] * stride + d[None, :]
    part += ((row * length + token[:, None]) * count + place) * (2 * HALF) + d[None, :]
    angle = row * tables_row + token[:, None] * HALF + d[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if back:
        source, target, sin = part, whole, -sin
    else:
        source, target = whole, part
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (first * sin + second * cos).to(target.dtype.element_ty), mask=mask)


def rotate_and_cut(
    q_BSHD: Tensor, k_BSKD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, first: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute :func:`fusiontree.ops.rotary.reference.rotate_and_cut`; float64 uses the compiled formula."""
    if q_BSHD.dtype == torch.float64:
        return compiled(reference.rotate_and_cut)(q_BSHD, k_BSKD, cos_BSD, sin_BSD, first)
    q, k = _heads_together(q_BSHD), _heads_together(k_BSKD)
    (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
    counts = (first[0], heads - first[0], first[1], kv_heads - first[1])
    parts = tuple(torch.empty(rows, length, n, width, dtype=q.dtype, device=q.device) for n in counts)
    _launch(q, k, parts, cos_BSD, sin_BSD, back=False)
    return (parts[0], parts[1]), (parts[2], parts[3])


def rotate_back(
    q_first: Tensor, q_rest: Tensor, k_first: Tensor, k_rest: Tensor, cos_BSD: Tensor, sin_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.rotary.reference.rotate_back`; float64 uses the compiled formula."""
    if q_first.dtype == torch.float64:
        return compiled(reference.rotate_back)(q_first, q_rest, k_first, k_rest, cos_BSD, sin_BSD)
    parts = tuple(part.contiguous() for part in (q_first, q_rest, k_first, k_rest))
    rows, length, _, width = q_first.shape
    q, k = (
        torch.empty(rows, length, a.shape[2] + b.shape[2], width, dtype=a.dtype, device=a.device)
        for a, b in (parts[:2], parts[2:])
    )
    _launch(q, k, parts, cos_BSD, sin_BSD, back=True)
    return q, k


def _launch(q: Tensor, k: Tensor, parts: tuple[Tensor, ...], cos_BSD: Tensor, sin_BSD: Tensor, back: bool) -> None:
    (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
    cos, sin = cos_BSD.contiguous(), sin_BSD.contiguous()
    _rotate[(triton.cdiv(length, _TOKENS), heads + kv_heads, rows)](
        q, k, *parts, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0, length, heads, parts[0].shape[2], parts[2].shape[2], kv_heads,
        back=back, HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip


def _heads_together(x_BSHD: Tensor) -> Tensor:
    """Return ``x`` with contiguous heads and channels; a slice of a wider projection is not copied."""
    fits = x_BSHD.stride(3) == 1 and x_BSHD.stride(2) == x_BSHD.shape[3]
    return x_BSHD if fits else x_BSHD.contiguous()
