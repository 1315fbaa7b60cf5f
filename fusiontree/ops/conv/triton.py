"""The convolution with four taps: one Triton kernel each for forward and backward (GPU), each value is read once.

A program processes a block of channels token by token and keeps the last three inputs (forward) and the incomplete
gradients (backward) in registers. The backward pass recomputes the activation's input from x, so only x is saved.
Offsets are 64-bit, so rows may have any length. Shape legend: B rows, S tokens, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.conv.reference import shifted_products
from fusiontree.ops.elementwise import compiled

_TAPS = 4
_FORWARD = {"TOKENS": 32, "BC": 128, "num_warps": 1}  # tokens and channels per program: fastest of those tried
_BACKWARD = {"TOKENS": 64, "BC": 64, "num_warps": 1}


def shifted_products_triton(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    positions_BS: Tensor | None,
    initial_BKC: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Compute :func:`shifted_products`; other numbers of taps and float64 use the compiled formula."""
    inputs = (x_BSC, weight_CK, bias_C, positions_BS, initial_BKC)
    if weight_CK.shape[1] != _TAPS or x_BSC.dtype == torch.float64:
        return compiled(shifted_products)(*inputs, activation)
    return _CausalConv.apply(*inputs, activation == "silu")


@triton.jit
def _load(x_ptr, initial_ptr, stride_token, t, c, length, channels, has_initial: tl.constexpr):
    """Load x[t] as fp32; before the first token, ``initial`` or 0."""
    inside = (t >= 0) & (t < length)
    x = tl.load(x_ptr + t * stride_token + c, mask=inside & (c < channels), other=0.0).to(tl.float32)
    if has_initial:
        x += tl.load(initial_ptr + (t + 3) * channels + c, mask=(t < 0) & (c < channels), other=0.0).to(tl.float32)
    return x


@triton.jit
def _position(position_ptr, t, length, packed: tl.constexpr):
    """Return how many previous tokens of its document token t has (packed rows); otherwise at least K-1."""
    reach = t * 0 + 3
    if packed:
        reach = tl.load(position_ptr + t, mask=t < length, other=0)
    return reach


@triton.jit
def _preactivation(x0, x1, x2, x3, reach, w0, w1, w2, w3, bias, packed: tl.constexpr):
    if packed:
        x1 = tl.where(reach >= 1, x1, 0.0)
        x2 = tl.where(reach >= 2, x2, 0.0)
        x3 = tl.where(reach >= 3, x3, 0.0)
    return bias + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3, x1, x2, x3


@triton.jit
def _weights(w_ptr, bias_ptr, c, channels, has_bias: tl.constexpr):
    inside = c < channels
    w0 = tl.load(w_ptr + c * 4, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(w_ptr + c * 4 + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(w_ptr + c * 4 + 2, mask=inside, other=0.0).to(tl.float32)
    w3 = tl.load(w_ptr + c * 4 + 3, mask=inside, other=0.0).to(tl.float32)
    bias = w0 * 0.0
    if has_bias:
        bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, bias


@triton.jit
def _forward_token(
    y_ptr, x0, x1, x2, x3, reach, t, c, length, channels, w0, w1, w2, w3, bias, packed: tl.constexpr, silu: tl.constexpr
):
    y, _, _, _ = _preactivation(x0, x1, x2, x3, reach, w0, w1, w2, w3, bias, packed)
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + t * channels + c, y.to(y_ptr.dtype.element_ty), mask=(t < length) & (c < channels))


@triton.jit
def _causal_conv_forward(
    x_ptr, w_ptr, bias_ptr, position_ptr, initial_ptr, y_ptr, stride_row, stride_token, length, channels,
    packed: tl.constexpr, has_bias: tl.constexpr, has_initial: tl.constexpr, silu: tl.constexpr,
    TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += row * stride_row
    y_ptr += row * length * channels
    position_ptr += row * length
    initial_ptr += row * 3 * channels
    w0, w1, w2, w3, bias = _weights(w_ptr, bias_ptr, c, channels, has_bias)
    b1 = _load(x_ptr, initial_ptr, stride_token, first - 1, c, length, channels, has_initial)
    b2 = _load(x_ptr, initial_ptr, stride_token, first - 2, c, length, channels, has_initial)
    b3 = _load(x_ptr, initial_ptr, stride_token, first - 3, c, length, channels, has_initial)
    for i in range(0, TOKENS, 4):
        t = first + i
        # Issue the loads of four tokens together, so that they overlap.
        xa = _load(x_ptr, initial_ptr, stride_token, t, c, length, channels, False)
        xb = _load(x_ptr, initial_ptr, stride_token, t + 1, c, length, channels, False)
        xc = _load(x_ptr, initial_ptr, stride_token, t + 2, c, length, channels, False)
        xd = _load(x_ptr, initial_ptr, stride_token, t + 3, c, length, channels, False)
        pa = _position(position_ptr, t, length, packed)
        pb = _position(position_ptr, t + 1, length, packed)
        pc = _position(position_ptr, t + 2, length, packed)
        pd = _position(position_ptr, t + 3, length, packed)
        _forward_token(y_ptr, xa, b1, b2, b3, pa, t, c, length, channels, w0, w1, w2, w3, bias, packed, silu)
        _forward_token(y_ptr, xb, xa, b1, b2, pb, t + 1, c, length, channels, w0, w1, w2, w3, bias, packed, silu)
        _forward_token(y_ptr, xc, xb, xa, b1, pc, t + 2, c, length, channels, w0, w1, w2, w3, bias, packed, silu)
        _forward_token(y_ptr, xd, xc, xb, xa, pd, t + 3, c, length, channels, w0, w1, w2, w3, bias, packed, silu)
        b1, b2, b3 = xd, xc, xb


@triton.jit
def _backward_token(
    dx_ptr, dinitial_ptr, x0, x1, x2, x3, dy, reach, t, first, last, c, length, channels, w0, w1, w2, w3, bias,
    a1, a2, a3, d0, d1, d2, d3, dbias,
    packed: tl.constexpr, has_initial: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Add token t's contribution to the gradients; the gradient of token t - 3 is then complete and is stored."""
    value, x1, x2, x3 = _preactivation(x0, x1, x2, x3, reach, w0, w1, w2, w3, bias, packed)
    if silu:
        sigmoid = tl.sigmoid(value)
        dy = dy * sigmoid * (1.0 + value * (1.0 - sigmoid))
    own = tl.where((t < last) & (t < length), dy, 0.0)  # tokens from ``last`` on belong to the next program
    d3 += own * x0
    d2 += own * x1
    d1 += own * x2
    d0 += own * x3
    dbias += own
    g1, g2, g3 = dy, dy, dy
    if packed:
        g1 = tl.where(reach >= 1, dy, 0.0)
        g2 = tl.where(reach >= 2, dy, 0.0)
        g3 = tl.where(reach >= 3, dy, 0.0)
    done = a3 + w0 * g3
    s = t - 3
    inside = (s >= first) & (s < last) & (s < length)
    tl.store(dx_ptr + s * channels + c, done.to(dx_ptr.dtype.element_ty), mask=inside & (c < channels))
    if has_initial:
        before = (s < 0) & (first == 0)
        target = dinitial_ptr + (s + 3) * channels + c
        tl.store(target, done.to(dinitial_ptr.dtype.element_ty), mask=before & (c < channels))
    return w3 * dy, a1 + w2 * g1, a2 + w1 * g2, d0, d1, d2, d3, dbias


@triton.jit
def _gradient_of(dy_ptr, dy_token, t, c, length, channels):
    return tl.load(dy_ptr + t * dy_token + c, mask=(t < length) & (c < channels), other=0.0).to(tl.float32)


@triton.jit
def _causal_conv_backward(
    x_ptr, w_ptr, bias_ptr, position_ptr, initial_ptr, dy_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    stride_row, stride_token, dy_row, dy_token, length, channels,
    packed: tl.constexpr, has_bias: tl.constexpr, has_initial: tl.constexpr, silu: tl.constexpr,
    TOKENS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    last = first + TOKENS
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    x_ptr += row * stride_row
    dy_ptr += row * dy_row
    dx_ptr += row * length * channels
    position_ptr += row * length
    initial_ptr += row * 3 * channels
    dinitial_ptr += row * 3 * channels
    w0, w1, w2, w3, bias = _weights(w_ptr, bias_ptr, c, channels, has_bias)
    b1 = _load(x_ptr, initial_ptr, stride_token, first - 1, c, length, channels, has_initial)
    b2 = _load(x_ptr, initial_ptr, stride_token, first - 2, c, length, channels, has_initial)
    b3 = _load(x_ptr, initial_ptr, stride_token, first - 3, c, length, channels, has_initial)
    zero = tl.zeros([BC], dtype=tl.float32)
    a1, a2, a3 = zero, zero, zero
    d0, d1, d2, d3, dbias = zero, zero, zero, zero, zero
    for i in range(0, TOKENS + 4, 4):  # the gradient of the last token needs the three tokens after it
        t = first + i
        xa = _load(x_ptr, initial_ptr, stride_token, t, c, length, channels, False)
        xb = _load(x_ptr, initial_ptr, stride_token, t + 1, c, length, channels, False)
        xc = _load(x_ptr, initial_ptr, stride_token, t + 2, c, length, channels, False)
        xd = _load(x_ptr, initial_ptr, stride_token, t + 3, c, length, channels, False)
        ga = _gradient_of(dy_ptr, dy_token, t, c, length, channels)
        gb = _gradient_of(dy_ptr, dy_token, t + 1, c, length, channels)
        gc = _gradient_of(dy_ptr, dy_token, t + 2, c, length, channels)
        gd = _gradient_of(dy_ptr, dy_token, t + 3, c, length, channels)
        pa = _position(position_ptr, t, length, packed)
        pb = _position(position_ptr, t + 1, length, packed)
        pc = _position(position_ptr, t + 2, length, packed)
        pd = _position(position_ptr, t + 3, length, packed)
        a1, a2, a3, d0, d1, d2, d3, dbias = _backward_token(
            dx_ptr, dinitial_ptr, xa, b1, b2, b3, ga, pa, t, first, last, c, length, channels, w0, w1, w2, w3, bias,
            a1, a2, a3, d0, d1, d2, d3, dbias, packed, has_initial, silu,
        )  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, dbias = _backward_token(
            dx_ptr, dinitial_ptr, xb, xa, b1, b2, gb, pb, t + 1, first, last, c, length, channels, w0, w1, w2, w3, bias,
            a1, a2, a3, d0, d1, d2, d3, dbias, packed, has_initial, silu,
        )  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, dbias = _backward_token(
            dx_ptr, dinitial_ptr, xc, xb, xa, b1, gc, pc, t + 2, first, last, c, length, channels, w0, w1, w2, w3, bias,
            a1, a2, a3, d0, d1, d2, d3, dbias, packed, has_initial, silu,
        )  # fmt: skip
        a1, a2, a3, d0, d1, d2, d3, dbias = _backward_token(
            dx_ptr, dinitial_ptr, xd, xc, xb, xa, gd, pd, t + 3, first, last, c, length, channels, w0, w1, w2, w3, bias,
            a1, a2, a3, d0, d1, d2, d3, dbias, packed, has_initial, silu,
        )  # fmt: skip
        b1, b2, b3 = xd, xc, xb
    # This program's part of the weight gradient, tap by tap, and of the bias gradient.
    partial = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 5 * channels + c
    tl.store(partial, d0, mask=c < channels)
    tl.store(partial + channels, d1, mask=c < channels)
    tl.store(partial + 2 * channels, d2, mask=c < channels)
    tl.store(partial + 3 * channels, d3, mask=c < channels)
    tl.store(partial + 4 * channels, dbias, mask=c < channels)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        positions_BS: Tensor | None,
        initial_BKC: Tensor | None,
        silu: bool,
    ) -> Tensor:
        x_BSC = x_BSC if x_BSC.stride(-1) == 1 else x_BSC.contiguous()
        weight_CK = weight_CK.contiguous()
        initial_BKC = None if initial_BKC is None else initial_BKC.to(x_BSC.dtype).contiguous()
        rows, length, channels = x_BSC.shape
        y_BSC = torch.empty(rows, length, channels, dtype=x_BSC.dtype, device=x_BSC.device)
        grid = (triton.cdiv(channels, _FORWARD["BC"]), triton.cdiv(length, _FORWARD["TOKENS"]), rows)
        _causal_conv_forward[grid](
            x_BSC, weight_CK, weight_CK if bias_C is None else bias_C, x_BSC if positions_BS is None else positions_BS,
            x_BSC if initial_BKC is None else initial_BKC, y_BSC, x_BSC.stride(0), x_BSC.stride(1), length, channels,
            packed=positions_BS is not None, has_bias=bias_C is not None, has_initial=initial_BKC is not None,
            silu=silu, **_FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(x_BSC, weight_CK, bias_C, positions_BS, initial_BKC)
        ctx.silu = silu
        return y_BSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSC, weight_CK, bias_C, positions_BS, initial_BKC = ctx.saved_tensors
        dy_BSC = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        rows, length, channels = x_BSC.shape
        programs = triton.cdiv(length, _BACKWARD["TOKENS"])
        dx_BSC = torch.empty(rows, length, channels, dtype=x_BSC.dtype, device=x_BSC.device)
        dinitial_BKC = None if initial_BKC is None else torch.empty_like(initial_BKC)
        partial = torch.empty(rows * programs, _TAPS + 1, channels, dtype=torch.float32, device=x_BSC.device)
        _causal_conv_backward[(triton.cdiv(channels, _BACKWARD["BC"]), programs, rows)](
            x_BSC, weight_CK, weight_CK if bias_C is None else bias_C, x_BSC if positions_BS is None else positions_BS,
            x_BSC if initial_BKC is None else initial_BKC, dy_BSC, dx_BSC,
            x_BSC if dinitial_BKC is None else dinitial_BKC, partial,
            x_BSC.stride(0), x_BSC.stride(1), dy_BSC.stride(0), dy_BSC.stride(1), length, channels,
            packed=positions_BS is not None, has_bias=bias_C is not None, has_initial=initial_BKC is not None,
            silu=ctx.silu, **_BACKWARD,
        )  # fmt: skip
        sums = partial.sum(0)
        dbias_C = None if bias_C is None else sums[_TAPS].to(bias_C.dtype)
        return dx_BSC, sums[:_TAPS].t().to(weight_CK.dtype), dbias_C, None, dinitial_BKC, None
