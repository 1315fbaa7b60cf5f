"""Greatest magnitudes of a matrix, and its casts to FP8 as it is and transposed: one Triton kernel each (GPU).

Shape legend: R rows, K columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.fp8.reference import GREATEST_POWER, TOP_EXPONENT

_TILE = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}


@triton.jit
def _tile(matrix, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's rows, columns, mask, and values in fp32."""
    across = tl.cdiv(columns, COLUMNS)
    r = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    values = tl.load(matrix + r[:, None].to(tl.int64) * stride + c[None, :], mask=mask, other=0.0)
    return r, c, mask, values.to(tl.float32)


@triton.jit
def _greatest(
    matrix, rows_ptr, columns_ptr, rows, columns, stride, whole: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    r, c, _mask, values = _tile(matrix, rows, columns, stride, ROWS, COLUMNS)
    # Magnitudes are ordered as their bits are, and NaN is above all: a maximum of fp32 values would lose it.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if whole:
        tl.atomic_max(rows_ptr, tl.max(tl.max(bits, 1), 0))
    else:
        tl.atomic_max(rows_ptr + r, tl.max(bits, 1), mask=r < rows)
        tl.atomic_max(columns_ptr + c, tl.max(bits, 0), mask=c < columns)


@triton.jit
def _scale(amax_bits, top: tl.constexpr, greatest_power: tl.constexpr):
    """Return scale and inverse for the bits of a greatest magnitude; see :func:`reference.scales_of`."""
    power = top - ((amax_bits >> 23) - 127) - ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.minimum(power, greatest_power)
    finite = amax_bits < 0x7F800000
    scale = tl.where(finite, (power + 127) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (127 - power) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def _casts(
    matrix, rows, columns, stride,
    row_amax, row_values, row_inverse, row_stride,
    column_amax, column_values, column_inverse, column_stride,
    has_rows: tl.constexpr, has_columns: tl.constexpr, whole: tl.constexpr,
    top: tl.constexpr, greatest_power: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r, c, mask, values = _tile(matrix, rows, columns, stride, ROWS, COLUMNS)
    if has_rows:
        if whole:
            scale, inverse = _scale(tl.load(row_amax), top, greatest_power)
            scaled = values * scale
            if tl.program_id(0) == 0:
                tl.store(row_inverse, inverse)
        else:
            scale, inverse = _scale(tl.load(row_amax + r, mask=r < rows, other=0), top, greatest_power)
            scaled = values * scale[:, None]
            if tl.program_id(0) % tl.cdiv(columns, COLUMNS) == 0:
                tl.store(row_inverse + r, inverse, mask=r < rows)
        places = row_values + r[:, None].to(tl.int64) * row_stride + c[None, :]
        tl.store(places, scaled.to(row_values.dtype.element_ty), mask=mask)
    if has_columns:
        if whole:
            scale, inverse = _scale(tl.load(column_amax), top, greatest_power)
            scaled = values * scale
            if tl.program_id(0) == 0:
                tl.store(column_inverse, inverse)
        else:
            scale, inverse = _scale(tl.load(column_amax + c, mask=c < columns, other=0), top, greatest_power)
            scaled = values * scale[None, :]
            if tl.program_id(0) // tl.cdiv(columns, COLUMNS) == 0:
                tl.store(column_inverse + c, inverse, mask=c < columns)
        places = column_values + c[:, None].to(tl.int64) * column_stride + r[None, :]
        tl.store(places, tl.trans(scaled.to(column_values.dtype.element_ty)), mask=tl.trans(mask))


def _grid(matrix_RK: Tensor) -> tuple[int]:
    rows, columns = matrix_RK.shape
    return (triton.cdiv(rows, _TILE["ROWS"]) * triton.cdiv(columns, _TILE["COLUMNS"]),)


def find(part: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """Raise the greatest magnitudes to those of ``part``: of all elements if ``columns`` is None."""
    part = _readable(part)
    bits = rows.view(torch.int32)
    others = bits if columns is None else columns.view(torch.int32)
    whole: Any = columns is None
    _greatest[_grid(part)](part, bits, others, *part.shape, part.stride(0), whole=whole, **_TILE)


def write(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any) -> None:
    """Write the cast of ``part`` and of its transpose to the given windows; either may be None."""
    part = _readable(part)
    arguments: list[Any] = []
    for window in (rows, columns):
        one = window or rows or columns
        arguments += [one.amax.view(torch.int32), one.values, one.inverse, one.values.stride(0)]
    kinds: Any = {"has_rows": rows is not None, "has_columns": columns is not None}
    kinds["whole"] = all(window is None or window.amax.numel() == 1 for window in (rows, columns))
    _casts[_grid(part)](
        part, *part.shape, part.stride(0), *arguments, **kinds,
        top=TOP_EXPONENT[dtype], greatest_power=GREATEST_POWER, **_TILE,
    )  # fmt: skip


def _readable(part: Tensor) -> Tensor:
    return part if part.stride(1) == 1 else part.contiguous()


KERNELS = (find, write)
