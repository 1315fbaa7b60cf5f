"""The convolution as one Triton kernel a direction (GPU): every input is read from memory once.

The backward pass computes the activation's input again from x, so nothing but x is kept. Offsets are 64-bit: rows of
any length. Shape legend: B rows, S tokens, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.conv.compiled import causal_conv1d_compiled
from fusiontree.ops.documents import Documents

_TOKENS, _CHANNELS, _BLOCKS = 32, 64, 8  # tile of a program; tiles of tokens that one backward program adds up


def causal_conv1d_triton(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    *,
    documents: Documents | None = None,
    initial_BKC: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Compute :func:`fusiontree.ops.conv.causal_conv1d`.

    A piece with inputs on its left (decoding, context parallelism) goes through the compiled formula.
    """
    if initial_BKC is not None or x_BSC.dtype == torch.float64:
        return causal_conv1d_compiled(
            x_BSC, weight_CK, bias_C, documents=documents, initial_BKC=initial_BKC, activation=activation
        )
    masked = documents is not None and not documents.whole_rows
    positions_BS = documents.positions_BS if masked and documents is not None else None
    return _CausalConv.apply(x_BSC, weight_CK, bias_C, positions_BS, activation == "silu")


@triton.jit
def _input(x_ptr, stride_token, position, t, c, length, channels, k: tl.constexpr, packed: tl.constexpr):
    """x[t - k] as fp32 where token t may look k back, else 0; ``position`` is t's position in its document."""
    reach = (t >= k) & (t < length)
    if packed:
        reach = reach & (position >= k)
    mask = reach[:, None] & (c < channels)[None, :]
    return tl.load(x_ptr + (t - k)[:, None] * stride_token + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before_activation(
    x_ptr, w_ptr, stride_token, position, bias, t, c, length, channels, K: tl.constexpr, packed: tl.constexpr
):
    total = tl.zeros([t.shape[0], c.shape[0]], dtype=tl.float32) + bias[None, :]
    for k in tl.static_range(K):
        weight = tl.load(w_ptr + c * K + (K - 1 - k), mask=c < channels, other=0.0).to(tl.float32)
        total += weight[None, :] * _input(x_ptr, stride_token, position, t, c, length, channels, k, packed)
    return total


@triton.jit
def _causal_conv_forward(
    x_ptr, w_ptr, bias_ptr, position_ptr, y_ptr, stride_row, stride_token, length, channels,
    K: tl.constexpr, packed: tl.constexpr, has_bias: tl.constexpr, silu: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    position = t
    if packed:
        position = tl.load(position_ptr + row * length + t, mask=t < length, other=0)
    bias = tl.zeros([BC], dtype=tl.float32)
    if has_bias:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    y = _before_activation(
        x_ptr + row * stride_row, w_ptr, stride_token, position, bias, t, c, length, channels, K, packed
    )
    if silu:
        y = y * tl.sigmoid(y)
    mask = (t < length)[:, None] & (c < channels)[None, :]
    target = y_ptr + (row * length + t)[:, None] * channels + c[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _causal_conv_backward(
    x_ptr, w_ptr, bias_ptr, position_ptr, dy_ptr, dx_ptr, partial_ptr, stride_row, stride_token, dy_row, dy_token,
    length, channels, K: tl.constexpr, packed: tl.constexpr, has_bias: tl.constexpr, silu: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += row * stride_row
    dy_ptr += row * dy_row
    bias = tl.zeros([BC], dtype=tl.float32)
    if has_bias:
        bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    # Tap k of the weight's gradient gathers in row k of this program's partial sums, the bias's in row K.
    partial = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * channels
    for block in range(BLOCKS):
        first = (tl.program_id(1).to(tl.int64) * BLOCKS + block) * BT + tl.arange(0, BT)
        dx = tl.zeros([BT, BC], dtype=tl.float32)
        for ahead in tl.static_range(K):
            t = first + ahead
            position = t
            if packed:
                position = tl.load(position_ptr + row * length + t, mask=t < length, other=0)
            mask = (t < length)[:, None] & (c < channels)[None, :]
            grad = tl.load(dy_ptr + t[:, None] * dy_token + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if silu:
                value = _before_activation(
                    x_ptr, w_ptr, stride_token, position, bias, t, c, length, channels, K, packed
                )
                sigmoid = tl.sigmoid(value)
                grad = grad * sigmoid * (1.0 + value * (1.0 - sigmoid))
            if ahead == 0:
                for k in tl.static_range(K):
                    seen = _input(x_ptr, stride_token, position, t, c, length, channels, k, packed)
                    slot = partial + (K - 1 - k) * channels + c
                    before = tl.load(slot, mask=c < channels, other=0.0)
                    tl.store(slot, before + tl.sum(grad * seen, axis=0), mask=c < channels)
                slot = partial + K * channels + c
                before = tl.load(slot, mask=c < channels, other=0.0)
                tl.store(slot, before + tl.sum(grad, axis=0), mask=c < channels)
            if packed:
                grad = tl.where((position >= ahead)[:, None], grad, 0.0)
            weight = tl.load(w_ptr + c * K + (K - 1 - ahead), mask=c < channels, other=0.0).to(tl.float32)
            dx += weight[None, :] * grad
        target = dx_ptr + (row * length + first)[:, None] * channels + c[None, :]
        mask = (first < length)[:, None] & (c < channels)[None, :]
        tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, positions_BS: Tensor | None, silu: bool
    ) -> Tensor:
        x_BSC = x_BSC if x_BSC.stride(-1) == 1 else x_BSC.contiguous()
        weight_CK = weight_CK.contiguous()
        rows, length, channels = x_BSC.shape
        y_BSC = torch.empty(rows, length, channels, dtype=x_BSC.dtype, device=x_BSC.device)
        grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _TOKENS), rows)
        _causal_conv_forward[grid](
            x_BSC, weight_CK, bias_C, positions_BS, y_BSC, x_BSC.stride(0), x_BSC.stride(1), length, channels,
            K=weight_CK.shape[1], packed=positions_BS is not None, has_bias=bias_C is not None, silu=silu,
            BT=_TOKENS, BC=_CHANNELS,
        )  # fmt: skip
        ctx.save_for_backward(x_BSC, weight_CK, bias_C, positions_BS)
        ctx.silu = silu
        return y_BSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSC, weight_CK, bias_C, positions_BS = ctx.saved_tensors
        dy_BSC = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        rows, length, channels = x_BSC.shape
        taps = weight_CK.shape[1]
        programs = triton.cdiv(length, _TOKENS * _BLOCKS)
        dx_BSC = torch.empty(rows, length, channels, dtype=x_BSC.dtype, device=x_BSC.device)
        partial = torch.zeros(rows * programs, taps + 1, channels, dtype=torch.float32, device=x_BSC.device)
        _causal_conv_backward[(triton.cdiv(channels, _CHANNELS), programs, rows)](
            x_BSC, weight_CK, bias_C, positions_BS, dy_BSC, dx_BSC, partial, x_BSC.stride(0), x_BSC.stride(1),
            dy_BSC.stride(0), dy_BSC.stride(1), length, channels,
            K=taps, packed=positions_BS is not None, has_bias=bias_C is not None, silu=ctx.silu,
            BT=_TOKENS, BC=_CHANNELS, BLOCKS=_BLOCKS,
        )  # fmt: skip
        sums = partial.sum(0)
        dbias_C = None if bias_C is None else sums[taps].to(bias_C.dtype)
        return dx_BSC, sums[:taps].t().to(weight_CK.dtype), dbias_C, None, None
