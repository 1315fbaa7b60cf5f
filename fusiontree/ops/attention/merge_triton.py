"""Merges attention outputs over two disjoint sets of keys into one softmax, as a Triton kernel (GPU).

Shape legend: B rows, H heads, S tokens, D channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16  # tokens per program


@triton.jit
def _merge(
    first_ptr, second_ptr, lse_first_ptr, lse_second_ptr, out_ptr, lse_ptr,
    a_row, a_head, a_token, b_row, b_head, b_token, length, heads, D: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK)
    inside = t < length
    mask = inside[:, None] & (d[None, :] < D)
    token = t.to(tl.int64)
    place = (row * heads + head) * length + t
    lse_first = tl.load(lse_first_ptr + place, mask=inside, other=0.0)
    lse_second = tl.load(lse_second_ptr + place, mask=inside, other=0.0)
    most = tl.maximum(lse_first, lse_second)
    lse = most + tl.log(tl.exp(lse_first - most) + tl.exp(lse_second - most))
    tl.store(lse_ptr + place, lse, mask=inside)
    a = row * a_row + head * a_head + token[:, None] * a_token + d[None, :]
    b = row * b_row + head * b_head + token[:, None] * b_token + d[None, :]
    first = tl.load(first_ptr + a, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + b, mask=mask, other=0.0).to(tl.float32)
    out = first * tl.exp(lse_first - lse)[:, None] + second * tl.exp(lse_second - lse)[:, None]
    tl.store(out_ptr + a, out.to(out_ptr.dtype.element_ty), mask=mask)


def merged(out_0: Tensor, out_1: Tensor, lse_0: Tensor, lse_1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged output and lse; outputs ``[B, H, S, D]``, lse ``[B, H, S, 1]`` in fp32."""
    first, second = (out if out.stride(-1) == 1 else out.contiguous() for out in (out_0, out_1))
    rows, heads, length, width = first.shape
    out = torch.empty_like(first)  # with the strides of the first output
    assert out.stride() == first.stride()
    lse = torch.empty(lse_0.shape, dtype=torch.float32, device=lse_0.device)
    _merge[(triton.cdiv(length, _TOKENS), heads, rows)](
        first, second, lse_0.contiguous(), lse_1.contiguous(), out, lse, *first.stride()[:3], *second.stride()[:3],
        length, heads, D=width, BLOCK=triton.next_power_of_2(width), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip
    return out, lse
