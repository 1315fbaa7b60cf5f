"""Product of a few rows with a matrix, with the operations before and after it, as one Triton kernel (GPU).

A decoding step reads each weight once for a few rows, so memory limits it, and each launch costs it a few microseconds.
One or two rows are multiplied elementwise, each by its own programs (those of the second row find the weights in the L2
cache); more rows are padded to 16, 32 or 64 and multiplied by tensor cores.

Shape legend: B rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.step import reference
from fusiontree.ops.step.early_start import early_start
from fusiontree.ops.step.reference import Activation, Mix, Norm, Second, Shift, Weight

_ACTIVATIONS = {"none": 0, "gelu": 1, "tanh": 2, "swiglu": 3}
_GIVEN = {"both": 1, "first": 2, "second": 3}
_FEW = 2  # rows up to which elementwise products are faster than padded tensor core products
_MOST = 64  # rows of one program
_REGISTERS = 128  # of a thread at most: four programs per multiprocessor hold a product of 2,048 outputs at once


@triton.jit
def _load(x_ptr, stride, row, k, rows, inputs, activation: tl.constexpr):
    """Return a tile of activated inputs in fp32; zeros outside."""
    place = row.to(tl.int64)[:, None] * stride + k[None, :]
    mask = (row[:, None] < rows) & (k[None, :] < inputs)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if activation == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == 2:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif activation == 3:
        x = x * tl.sigmoid(x) * tl.load(x_ptr + place + inputs, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _times(x, w, like_ptr):
    """Return x w^T in fp32 by tensor cores."""
    dtype = like_ptr.dtype.element_ty
    return tl.dot(x.to(dtype), tl.trans(w.to(dtype)), input_precision="ieee")


@triton.jit
def _channels(start, BK: tl.constexpr):
    """Return channels as vectors of 8, so that weights of one and of two bytes get the threads of the inputs."""
    return start + tl.max_contiguous(tl.multiple_of(tl.arange(0, BK), 8), 8)


@triton.jit
def _load_weights(w_ptr, n, k, outputs, inputs):
    """Return a tile of weights; zeros outside."""
    mask = (n[:, None] < outputs) & (k[None, :] < inputs)
    return tl.load(w_ptr + n.to(tl.int64)[:, None] * inputs + k[None, :], mask=mask, other=0.0)


@triton.jit
def _accumulate(
    sums, w, x_ptr, x_stride, w_ptr, norm_ptr, factor, shift_ptr, shift_stride, shifted, first, row, n, rows, outputs,
    inputs, activation: tl.constexpr, normed: tl.constexpr, has_shift: tl.constexpr,
    BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add the products of one row to ``sums``, of each output and each channel modulo BK; ``w`` is the first tile.

    Every tile has the shape of the weights' (another would pass through shared memory), sums over threads are left to
    the caller, and the loop is unrolled: nothing waits between the loads.
    """
    for tile in tl.static_range(TILES):
        k = _channels(tile * BK, BK)
        if tile > 0:
            w = _load_weights(w_ptr, n, k, outputs, inputs)
        x = _load(x_ptr, x_stride, row, k, rows, inputs, activation)
        if normed:
            weight = tl.load(norm_ptr + k[None, :], mask=(k < inputs)[None, :], other=0.0)
            x *= factor[:, None] * weight.to(tl.float32)
        if has_shift:
            seen_by = tl.where(first < shifted, inputs, 0)  # without shifted outputs nothing is loaded
            shift = _load(shift_ptr, shift_stride, row, k, rows, seen_by, 0)
            sums += (x + tl.where((n < shifted)[:, None], shift, 0.0)) * w.to(tl.float32)
        else:
            sums += x * w.to(tl.float32)
    return sums


@triton.jit
def _step_product(
    x_ptr, w_ptr, scale_ptr, norm_ptr, shift_ptr, x2_ptr, w2_ptr, scale2_ptr, add_ptr, branches_ptr, out_ptr,
    x_stride, shift_stride, x2_stride, add_stride, branches_stride, out_stride,
    rows, outputs, inputs, inputs2, shifted, eps,
    normed: tl.constexpr, has_shift: tl.constexpr, activation: tl.constexpr, second: tl.constexpr,
    activation2: tl.constexpr, scaled: tl.constexpr, scaled2: tl.constexpr, added: tl.constexpr, given: tl.constexpr,
    signals: tl.constexpr, waits: tl.constexpr, dot: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BK2: tl.constexpr, STATS: tl.constexpr, TILES: tl.constexpr, TILES2: tl.constexpr,
):  # fmt: skip
    # Rows vary fastest: programs of the same weights run together.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BN
    n = first + tl.arange(0, BN)
    there = n < outputs
    if not dot:
        # Weights do not depend on the kernel before: their loads begin while it ends.
        w = _load_weights(w_ptr, n, _channels(0, BK), outputs, inputs)
        if second:
            w2 = _load_weights(w2_ptr, n, _channels(0, BK2), outputs, inputs2)
    if waits:
        tl.extra.cuda.gdc_wait()
    if signals:
        tl.extra.cuda.gdc_launch_dependents()
    if normed:
        squares = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, inputs, STATS):
            x = _load(x_ptr, x_stride, row, start + tl.arange(0, STATS), rows, inputs, 0)
            squares += tl.sum(x * x, axis=1)
        factor = tl.rsqrt(squares / inputs + eps)
    else:
        factor = tl.full([ROWS], 1.0, dtype=tl.float32)
    result = tl.zeros([ROWS, BN], dtype=tl.float32)
    result2 = tl.zeros([ROWS, BN], dtype=tl.float32)
    if dot:
        extra = tl.zeros([ROWS, BN], dtype=tl.float32)
        for start in range(0, inputs, BK):
            k = start + tl.arange(0, BK)
            w = _load_weights(w_ptr, n, k, outputs, inputs)
            x = _load(x_ptr, x_stride, row, k, rows, inputs, activation)
            if normed:
                x *= factor[:, None] * tl.load(norm_ptr + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :]
            result += _times(x, w, x_ptr)
            if has_shift:  # noqa: SIM102  known when compiled
                if first < shifted:
                    extra += _times(_load(shift_ptr, shift_stride, row, k, rows, inputs, 0), w, x_ptr)
        if has_shift:
            result += tl.where(n[None, :] < shifted, extra, 0.0)
        if second:
            for start in range(0, inputs2, BK2):
                k = start + tl.arange(0, BK2)
                w2 = _load_weights(w2_ptr, n, k, outputs, inputs2)
                result2 += _times(_load(x2_ptr, x2_stride, row, k, rows, inputs2, activation2), w2, x_ptr)
    else:
        sums = _accumulate(
            tl.zeros([BN, BK], dtype=tl.float32), w, x_ptr, x_stride, w_ptr, norm_ptr, factor, shift_ptr, shift_stride,
            shifted, first, row, n, rows, outputs, inputs, activation, normed, has_shift, BK, TILES,
        )  # fmt: skip
        if second:
            start_sums = tl.zeros([BN, BK2], dtype=tl.float32)
            joint: tl.constexpr = not scaled and not scaled2 and BK == BK2  # one set of registers
            if joint:
                start_sums = sums
            sums2 = _accumulate(
                start_sums, w2, x2_ptr, x2_stride, w2_ptr, norm_ptr, factor, shift_ptr, shift_stride,
                0, first, row, n, rows, outputs, inputs2, activation2, False, False, BK2, TILES2,
            )  # fmt: skip
            if joint:
                sums = sums2
            else:
                result2 = tl.sum(sums2, axis=1)[None, :]
        result = tl.sum(sums, axis=1)[None, :]
    if scaled:
        result *= tl.load(scale_ptr + n, mask=there, other=0.0)[None, :]
    if second:
        if scaled2:
            result2 *= tl.load(scale2_ptr + n, mask=there, other=0.0)[None, :]
        result += result2
    mask = (row[:, None] < rows) & there[None, :]
    token = row.to(tl.int64)[:, None]
    if added:
        result += tl.load(add_ptr + token * add_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if given > 0:
        gate = tl.sigmoid(result)
        pair = branches_ptr + token * branches_stride + n[None, :]
        branch = tl.load(pair, mask=mask, other=0.0).to(tl.float32)
        if given == 1:
            result = gate * branch + (1.0 - gate) * tl.load(pair + outputs, mask=mask, other=0.0).to(tl.float32)
        elif given == 2:
            result = gate * branch
        else:
            result = (1.0 - gate) * branch
    tl.store(out_ptr + token * out_stride + n[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


def product(
    x_BK: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    shift: Shift | None = None,
    activation: Activation = "none",
    second: Second | None = None,
    add_BN: Tensor | None = None,
    mixed: Mix | None = None,
    out_BN: Tensor | None = None,
    follows: bool = False,
) -> Tensor:
    """Compute :func:`fusiontree.ops.step.product`; float64 uses the reference."""
    if x_BK.dtype == torch.float64:
        return reference.product(
            x_BK, weight, norm=norm, shift=shift, activation=activation, second=second, add_BN=add_BN, mixed=mixed,
            out_BN=out_BN,
        )  # fmt: skip
    rows, (outputs, inputs) = x_BK.shape[0], weight.values_NK.shape
    out = x_BK.new_empty(rows, outputs) if out_BN is None else out_BN
    other = second or Second(x_BK, weight)
    inputs2 = other.weight.values_NK.shape[1]
    shifted = shift.values_BK.expand(rows, -1) if shift is not None else x_BK
    branches = out if mixed is None else mixed.branches_BC
    added = out if add_BN is None else add_BN
    tensors = (x_BK, other.x_BK, shifted, branches, added, out)
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "channels of a step must be contiguous"
    assert weight.values_NK.is_contiguous() and other.weight.values_NK.is_contiguous(), "weights must be contiguous"
    tile = _tile(rows, outputs, inputs)
    width2 = _tile(rows, outputs, inputs2)["BK"]
    signals, options = early_start(x_BK.device, follows)
    waits = bool(options)
    if signals and not tile["dot"]:
        options["maxnreg"] = _REGISTERS
    _step_product[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(outputs, tile["BN"]))](
        x_BK, weight.values_NK, weight.values_NK if weight.scale_N is None else weight.scale_N,
        x_BK if norm is None else norm.weight_K, shifted, other.x_BK, other.weight.values_NK,
        other.weight.values_NK if other.weight.scale_N is None else other.weight.scale_N, added, branches, out,
        x_BK.stride(0), shifted.stride(0), other.x_BK.stride(0), added.stride(0), branches.stride(0), out.stride(0),
        rows, outputs, inputs, inputs2, 0 if shift is None else shift.outputs, 0.0 if norm is None else norm.eps,
        normed=norm is not None, has_shift=shift is not None, activation=_ACTIVATIONS[activation],
        second=second is not None, activation2=_ACTIVATIONS[other.activation], scaled=weight.scale_N is not None,
        scaled2=other.weight.scale_N is not None, added=add_BN is not None,
        given=0 if mixed is None else _GIVEN[mixed.given], signals=signals, waits=waits, BK2=width2,
        TILES=triton.cdiv(inputs, tile["BK"]), TILES2=triton.cdiv(inputs2, width2), **tile, **options,
    )  # fmt: skip
    return out


def _tile(rows: int, outputs: int, inputs: int) -> dict[str, int]:
    """Return the sizes of a program: many programs, each of which loads 4,096 to 8,192 weights at once or more."""
    if rows <= _FEW:
        width = max(16, min(1024, triton.next_power_of_2(inputs)))
        few = max(4, 2048 // width)
        return {
            "ROWS": 1, "BN": 2 * few if outputs >= 8192 else few, "BK": width,
            "STATS": min(4096, triton.next_power_of_2(inputs)), "dot": False, "num_warps": 4,
        }  # fmt: skip
    padded = min(_MOST, max(16, triton.next_power_of_2(rows)))
    width = max(16, min(128, triton.next_power_of_2(inputs)))
    return {
        "ROWS": padded,
        "BN": 16 if outputs < 8192 else 32,
        "BK": width,
        "STATS": width,
        "dot": True,
        "num_warps": 4,
    }
