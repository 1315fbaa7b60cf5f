"""Convolution and state update of one token as Triton kernels that update the cache in place (GPU).

Shape legend: B rows, H state space heads, P channels of a head, G groups of B and C, N size of the state, C channels of
a convolution, K its width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.step.early_start import early_start

_CHANNELS = 256  # of a program of the convolution
_HEAD_CHANNELS = 16  # of a program of the state update


@triton.jit
def _convolve(
    input_ptr, x_weight_ptr, x_bias_ptr, x_state_ptr, bc_weight_ptr, bc_bias_ptr, bc_state_ptr, out_ptr,
    input_stride, x_start, bc_start, x_channels, bc_channels, TAPS: tl.constexpr, BC: tl.constexpr,
    signals: tl.constexpr,
):  # fmt: skip
    """Convolve a block of channels of x or of B and C, and move their window on by one token."""
    if signals:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    x_blocks = tl.cdiv(x_channels, BC)
    block = tl.program_id(0)
    is_x = block < x_blocks
    channels = tl.where(is_x, x_channels, bc_channels)
    start, target = tl.where(is_x, x_start, bc_start), tl.where(is_x, 0, x_channels)
    if is_x:
        weight, bias, state = x_weight_ptr, x_bias_ptr, x_state_ptr
    else:
        weight, bias, state = bc_weight_ptr, bc_bias_ptr, bc_state_ptr
    c = tl.where(is_x, block, block - x_blocks) * BC + tl.arange(0, BC)
    mask = c < channels
    new = tl.load(input_ptr + row * input_stride + start + c, mask=mask, other=0.0)
    y = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    y += new.to(tl.float32) * tl.load(weight + c * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    window = state + row * (TAPS - 1) * channels + c
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(window + tap * channels, mask=mask, other=0.0)
        y += old.to(tl.float32) * tl.load(weight + c * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(window + (tap - 1) * channels, old, mask=mask)
    tl.store(window + (TAPS - 2) * channels, new, mask=mask)
    y *= tl.sigmoid(y)
    total = x_channels + bc_channels
    tl.store(out_ptr + row * total + target + c, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _update_state(
    convolved_ptr, dt_ptr, A_log_ptr, D_ptr, dt_bias_ptr, state_ptr, y_ptr, dt_stride, inner, groups, heads,
    dt_min, dt_max, low: tl.constexpr, high: tl.constexpr, waits: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the state of some channels of a head and return their outputs."""
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BLOCK)
    place = state_ptr + ((row * heads + head) * P + p)[:, None] * N + n[None, :]
    mask = (p[:, None] < P) & (n[None, :] < N)
    state = tl.load(place, mask=mask, other=0.0)  # of the token before: written before the convolution started
    if waits:
        tl.extra.cuda.gdc_wait()
    step = tl.load(dt_ptr + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head)
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))
    if low:
        step = tl.maximum(step, dt_min)
    if high:
        step = tl.minimum(step, dt_max)
    decay = tl.exp(-tl.exp(tl.load(A_log_ptr + head)) * step)
    row_ptr = convolved_ptr + row * (inner + 2 * groups * N)
    x = tl.load(row_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    B_ptr = row_ptr + inner + head // (heads // groups) * N + n
    B = tl.load(B_ptr, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(B_ptr + groups * N, mask=n < N, other=0.0).to(tl.float32)
    state = decay * state + (step * x)[:, None] * B[None, :]
    tl.store(place, state, mask=mask)
    y = tl.sum(state * C[None, :], axis=1) + tl.load(D_ptr + head) * x
    tl.store(y_ptr + row * inner + head * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def convolve_and_update(
    zxdt_bc_BM: Tensor,
    convolutions: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    kept: tuple[Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float | None, float | None],
) -> Tensor:
    """Convolve x, B and C of one token, update the state, and return y ``[B, H*P]`` before the gated norm.

    Args:
        zxdt_bc_BM: the projections of one token: z, x, dt, then B and C.
        convolutions: weight [C, K] and bias of the convolution of x, and of that of B and C.
        kept: the tensors of the cache: the last K-1 inputs [B, K-1, C] of both convolutions, and the state
            [B, H, P, N] in fp32. Updated in place.
        parameters: A_log, D and dt_bias, [H] in fp32.
        limits: of the step sizes; None means no limit.
    """
    (x_weight, x_bias), (bc_weight, bc_bias) = convolutions
    x_state, bc_state, state = kept
    assert all(tensor.is_contiguous() for tensor in (*kept, x_weight, bc_weight)), "the cache must be fixed"
    rows, heads, width, size = state.shape
    inner, bc = heads * width, bc_weight.shape[0]
    convolved = zxdt_bc_BM.new_empty(rows, inner + bc)
    # The update starts early behind the convolution, which itself starts when all work ahead has ended.
    signals, options = early_start(state.device, True)
    blocks = triton.cdiv(inner, _CHANNELS) + triton.cdiv(bc, _CHANNELS)
    _convolve[(blocks, rows)](
        zxdt_bc_BM, x_weight, x_bias, x_state, bc_weight, bc_bias, bc_state, convolved,
        zxdt_bc_BM.stride(0), inner, 2 * inner + heads, inner, bc, TAPS=x_weight.shape[1], BC=_CHANNELS,
        signals=signals, num_warps=2,
    )  # fmt: skip
    y = zxdt_bc_BM.new_empty(rows, inner)
    part = min(_HEAD_CHANNELS, triton.next_power_of_2(width))
    _update_state[(triton.cdiv(width, part), heads, rows)](
        convolved, zxdt_bc_BM[:, 2 * inner :], *parameters, state, y, zxdt_bc_BM.stride(0), inner, bc // (2 * size),
        heads, limits[0] or 0.0, limits[1] or 0.0, low=limits[0] is not None, high=limits[1] is not None,
        waits=bool(options), P=width, N=size, BP=part, BLOCK=triton.next_power_of_2(size), num_warps=4, **options,
    )  # fmt: skip
    return y
