"""The norms: one Triton kernel each for forward and backward (GPU). Each value is read once; only inputs are saved.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.elementwise import compiled
from fusiontree.ops.norm import reference

_WIDEST = 8192  # maximum channels per group that fit into registers
_PROGRAMS = 2048  # that keep a large GPU busy


def gated_rms_norm_triton(y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float) -> Tensor:
    """Compute :func:`fusiontree.ops.norm.gated_rms_norm`; very wide groups and float64 use the compiled formula."""
    if y_BSC.shape[-1] // groups > _WIDEST or y_BSC.dtype == torch.float64:
        return compiled(reference.gated_rms_norm)(y_BSC, z_BSC, weight_C, groups=groups, eps=eps)
    return _GatedNorm.apply(y_BSC, z_BSC, weight_C, groups, eps)


@triton.jit
def _gated_norm_forward(
    y_ptr, z_ptr, w_ptr, out_ptr, y_stride, z_stride, tokens, channels, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    groups = channels // WIDTH  # on one axis with the tokens: a grid's others end at 65,535
    within = tl.arange(0, BLOCK)
    c = tl.program_id(0) % groups * WIDTH + within
    weight = tl.load(w_ptr + c, mask=within < WIDTH, other=0.0).to(tl.float32)
    first = (tl.program_id(0) // groups).to(tl.int64) * TOKENS
    for i in range(TOKENS):
        t = first + i
        mask = within < tl.where(t < tokens, WIDTH, 0)
        y = tl.load(y_ptr + t * y_stride + c, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + t * z_stride + c, mask=mask, other=0.0).to(tl.float32)
        gated = y * z * tl.sigmoid(z)
        scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / WIDTH + eps)
        tl.store(out_ptr + t * channels + c, (gated * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_backward(
    y_ptr, z_ptr, w_ptr, dout_ptr, dy_ptr, dz_ptr, dw_ptr, y_stride, z_stride, dout_stride, tokens, channels, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    groups = channels // WIDTH  # on one axis with the tokens: a grid's others end at 65,535
    within = tl.arange(0, BLOCK)
    c = tl.program_id(0) % groups * WIDTH + within
    weight = tl.load(w_ptr + c, mask=within < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = (tl.program_id(0) // groups).to(tl.int64) * TOKENS
    for i in range(TOKENS):
        t = first + i
        mask = within < tl.where(t < tokens, WIDTH, 0)
        y = tl.load(y_ptr + t * y_stride + c, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + t * z_stride + c, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + t * dout_stride + c, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        silu = z * sigmoid
        gated = y * silu
        scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / WIDTH + eps)
        normed = gated * scale
        dweight += dout * normed
        dnormed = dout * weight
        dgated = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / WIDTH))
        dz = dgated * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dy_ptr + t * channels + c, (dgated * silu).to(dy_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + t * channels + c, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_ptr + (tl.program_id(0) // groups).to(tl.int64) * channels + c, dweight, mask=within < WIDTH)


@triton.jit
def _norm_forward(
    x_ptr, w_ptr, out_ptr, x_stride, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    weight = tl.load(w_ptr + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for i in range(TOKENS):
        t = first + i
        mask = c < tl.where(t < tokens, WIDTH, 0)
        x = tl.load(x_ptr + t * x_stride + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        tl.store(out_ptr + t * WIDTH + c, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    x_ptr, w_ptr, dout_ptr, dsecond_ptr, dstream_ptr, dx_ptr, dw_ptr,
    x_stride, dout_stride, dsecond_stride, dstream_stride, tokens, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SECOND: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    weight = tl.load(w_ptr + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for i in range(TOKENS):
        t = first + i
        mask = c < tl.where(t < tokens, WIDTH, 0)
        x = tl.load(x_ptr + t * x_stride + c, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + t * dout_stride + c, mask=mask, other=0.0).to(tl.float32)
        if SECOND:
            dout += tl.load(dsecond_ptr + t * dsecond_stride + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        normed = x * scale
        dweight += dout * normed
        dnormed = dout * weight
        dx = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / WIDTH))
        if STREAM:
            dx += tl.load(dstream_ptr + t * dstream_stride + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t * WIDTH + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * WIDTH + c, dweight, mask=c < WIDTH)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute :func:`fusiontree.ops.norm.rms_norm` by the residual norm's kernel, without the stream's gradient."""
    return residual_rms_norm_triton(x, weight, eps)[0]


def residual_rms_norm_triton(x: Tensor, weight: Tensor, eps: float, uses: int = 1) -> tuple[Tensor, ...]:
    """Compute :func:`fusiontree.ops.norm.residual_rms_norm`; many channels and float64 use the compiled formula."""
    if x.shape[-1] > _WIDEST or x.dtype == torch.float64:
        return *[compiled(reference.rms_norm)(x, weight, eps)] * uses, x
    assert uses in (1, 2), f"the kernel adds the gradients of one or two uses, not of {uses}"
    return _Norm.apply(x, weight, eps, uses)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float, uses: int) -> tuple[Tensor, ...]:
        rows = _rows(x)
        tokens, channels = rows.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        each = _tokens_per_program(tokens, most=16)
        _norm_forward[(triton.cdiv(tokens, each),)](
            rows, weight_C, out, rows.stride(0), tokens, eps, TOKENS=each, **_shape(channels)
        )
        ctx.save_for_backward(x, weight_C)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return out, *(out.detach() for _ in range(uses - 1)), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_C = ctx.saved_tensors
        *uses, dstream = grads
        dnormed = [grad for grad in uses if grad is not None]
        if not dnormed:
            return dstream, None, None, None
        rows, dout = _rows(x), _rows(dnormed[0])
        second = _rows(dnormed[1]) if len(dnormed) > 1 else dout
        added = dout if dstream is None else _rows(dstream)
        tokens, channels = rows.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        each = _tokens_per_program(tokens, most=64)
        programs = triton.cdiv(tokens, each)
        partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
        _norm_backward[(programs,)](
            rows, weight_C, dout, second, added, dx, partial,
            rows.stride(0), dout.stride(0), second.stride(0), added.stride(0), tokens, ctx.eps,
            TOKENS=each, SECOND=len(dnormed) > 1, STREAM=dstream is not None, **_shape(channels),
        )  # fmt: skip
        return dx, partial.sum(0).to(weight_C.dtype), None, None


def _tokens_per_program(tokens: int, most: int) -> int:
    """Return a power of two from 8 to ``most`` that gives about :data:`_PROGRAMS` programs.

    A program loops over its tokens and writes one partial sum of the weight's gradient: fewer tokens keep more programs
    in flight, more tokens make fewer partial sums. One H100, 768 channels, backward pass with its sum: 8,192 tokens
    take 23 us by 8 and 72 us by 64, 32,768 tokens 79 us by 16 and 112 us by 64.
    """
    return min(most, max(8, triton.next_power_of_2(triton.cdiv(tokens, _PROGRAMS))))


def _rows(tensor: Tensor) -> Tensor:
    """Return ``[tokens, C]`` with contiguous channels; a slice of a wider projection is not copied."""
    tensor = tensor.flatten(0, -2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, groups: int, eps: float) -> Tensor:
        y, z = _rows(y_BSC), _rows(z_BSC)
        tokens, channels = y.shape
        out_BSC = torch.empty(y_BSC.shape, dtype=y_BSC.dtype, device=y_BSC.device)
        each = _tokens_per_program(tokens, most=16)
        _gated_norm_forward[(groups * triton.cdiv(tokens, each),)](
            y, z, weight_C, out_BSC, y.stride(0), z.stride(0), tokens, channels, eps,
            TOKENS=each, **_shape(channels // groups),
        )  # fmt: skip
        ctx.save_for_backward(y_BSC, z_BSC, weight_C)
        ctx.groups, ctx.eps = groups, eps
        return out_BSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_BSC, z_BSC, weight_C = ctx.saved_tensors
        y, z, dout = _rows(y_BSC), _rows(z_BSC), _rows(grads[0])
        tokens, channels = y.shape
        dy_BSC = torch.empty(y_BSC.shape, dtype=y_BSC.dtype, device=y_BSC.device)
        dz_BSC = torch.empty(z_BSC.shape, dtype=z_BSC.dtype, device=z_BSC.device)
        each = _tokens_per_program(tokens, most=64)
        programs = triton.cdiv(tokens, each)
        partial = torch.empty(programs, channels, dtype=torch.float32, device=y_BSC.device)
        _gated_norm_backward[(ctx.groups * programs,)](
            y, z, weight_C, dout, dy_BSC, dz_BSC, partial, y.stride(0), z.stride(0), dout.stride(0), tokens, channels,
            ctx.eps, TOKENS=each, **_shape(channels // ctx.groups),
        )  # fmt: skip
        return dy_BSC, dz_BSC, partial.sum(0).to(weight_C.dtype), None, None


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
