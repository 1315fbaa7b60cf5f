"""Greatest magnitudes of a matrix, and its casts to FP8 as it is and transposed, as Triton kernels (GPU).

Shape legend: R rows, K columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.fp8.reference import GREATEST_POWER, TOP_EXPONENT

FIND = {"ROWS": 64, "COLUMNS": 128, "TILES": 4, "num_warps": 8}
"""A program reads 64 KiB of bf16: few atomic operations, and enough programs to fill a GPU."""
FIND_BY_ROW = FIND | {"TILES": 1}
"""More tiles would need too many registers."""
WRITE_ROWS = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}
WRITE_COLUMNS = {"ROWS": 128, "COLUMNS": 64, "num_warps": 8}
"""128 rows: the transposed cast is written in runs of 128 bytes, the bf16 matrix read in runs of 128 bytes."""
_REPAIRERS = 1024
"""Programs of a repair, which mostly find nothing to do."""
KNOWN, GUESSED, REPAIR = 0, 1, 2
"""How a kernel gets its scale: from the greatest magnitude; from a guess, and finds the magnitude; from the magnitude,
and only where the guess was wrong."""


@triton.jit
def _tile(matrix, rows, columns, stride, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows, columns, mask, and bf16 values of a tile."""
    across = tl.cdiv(columns, COLUMNS)
    r = index // across * ROWS + tl.arange(0, ROWS)
    c = index % across * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    return r, c, mask, tl.load(matrix + r[:, None].to(tl.int64) * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def _magnitude(values):
    """Return the bits of magnitudes, as integers: they are ordered alike, and NaN, which a maximum of fp32 values would
    lose, is above all."""
    return values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _greatest(
    matrix, rows_ptr, columns_ptr, rows, columns, stride, whole: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    # From the end to the start: the end was written last and is read from the cache; the cast then begins at the start.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first = program // across * TILES * across + program % across
    c = program % across * COLUMNS + tl.arange(0, COLUMNS)
    greatest = tl.zeros([ROWS, COLUMNS], tl.int32)
    for i in tl.static_range(TILES):
        r, _c, _mask, values = _tile(matrix, rows, columns, stride, first + i * across, ROWS, COLUMNS)
        bits = _magnitude(values)
        greatest = tl.maximum(greatest, bits)
        if not whole:
            tl.atomic_max(rows_ptr + r, tl.max(bits, 1), mask=r < rows, sem="relaxed")
    if whole:
        tl.atomic_max(rows_ptr, tl.max(tl.max(greatest, 1), 0), sem="relaxed")
    else:
        tl.atomic_max(columns_ptr + c, tl.max(greatest, 0), mask=c < columns, sem="relaxed")


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
def _write_tile(
    r, c, mask, values, row_scale, column_scale, row_values, row_stride, column_values, column_stride,
    has_rows: tl.constexpr, has_columns: tl.constexpr,
):  # fmt: skip
    """Write a tile's casts; scales of shapes ``[ROWS or 1, 1]`` and ``[COLUMNS or 1, 1]``."""
    if has_rows:
        scaled = values.to(tl.float32) * row_scale
        places = row_values + r[:, None].to(tl.int64) * row_stride + c[None, :]
        tl.store(places, scaled.to(row_values.dtype.element_ty), mask=mask)
    if has_columns:
        # Transposed as bf16: the hardware transposes elements of two bytes on the way through shared memory.
        scaled = tl.trans(values).to(tl.float32) * column_scale
        places = column_values + c[:, None].to(tl.int64) * column_stride + r[None, :]
        tl.store(places, scaled.to(column_values.dtype.element_ty), mask=tl.trans(mask))


@triton.jit
def _casts_by_row(
    matrix, rows, columns, stride,
    row_amax, row_values, row_inverse, row_stride,
    column_amax, column_values, column_inverse, column_stride,
    has_rows: tl.constexpr, has_columns: tl.constexpr,
    top: tl.constexpr, greatest_power: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Cast with a scale for each row of each cast."""
    r, c, mask, values = _tile(matrix, rows, columns, stride, tl.program_id(0), ROWS, COLUMNS)
    row_scale = 1.0
    column_scale = 1.0
    if has_rows:
        scale, inverse = _scale(tl.load(row_amax + r, mask=r < rows, other=0), top, greatest_power)
        if tl.program_id(0) % tl.cdiv(columns, COLUMNS) == 0:
            tl.store(row_inverse + r, inverse, mask=r < rows)
        row_scale = scale[:, None]
    if has_columns:
        scale, inverse = _scale(tl.load(column_amax + c, mask=c < columns, other=0), top, greatest_power)
        if tl.program_id(0) // tl.cdiv(columns, COLUMNS) == 0:
            tl.store(column_inverse + c, inverse, mask=c < columns)
        column_scale = scale[:, None]
    _write_tile(
        r, c, mask, values, row_scale, column_scale, row_values, row_stride, column_values, column_stride,
        has_rows, has_columns,
    )  # fmt: skip


@triton.jit
def _casts(
    matrix, rows, columns, stride, found, guess,
    row_values, row_inverse, row_stride, column_values, column_inverse, column_stride,
    has_rows: tl.constexpr, has_columns: tl.constexpr, mode: tl.constexpr,
    top: tl.constexpr, greatest_power: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Cast with one scale.

    ``found`` holds the bits of the greatest magnitude and, if there is a guess, those of the magnitude that was
    guessed; ``guess`` those of the magnitude to guess next, and the number of wrong guesses.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    if mode == 1:
        amax = tl.load(guess)
        if program == 0:
            tl.store(found + 1, amax)
    else:
        amax = tl.load(found)
    scale, inverse = _scale(amax, top, greatest_power)
    if mode != 1:
        if has_rows:
            tl.store(row_inverse, inverse, mask=program == 0)
        if has_columns:
            tl.store(column_inverse, inverse, mask=program == 0)
    if mode == 2:
        guessed, _inverse = _scale(tl.load(found + 1), top, greatest_power)
        wrong = guessed.to(tl.int32, bitcast=True) != scale.to(tl.int32, bitcast=True)
        if program == 0:
            tl.store(guess, amax)
            tl.store(guess + 1, tl.load(guess + 1) + wrong.to(tl.int32))
        for index in range(program, tl.where(wrong, tiles, 0), tl.num_programs(0)):
            r, c, mask, values = _tile(matrix, rows, columns, stride, index, ROWS, COLUMNS)
            _write_tile(
                r, c, mask, values, scale, scale, row_values, row_stride, column_values, column_stride,
                has_rows, has_columns,
            )  # fmt: skip
    else:
        # A first pass goes from the end, which was written last, to the start; see _greatest.
        index = tiles - 1 - program if mode == 1 else program
        r, c, mask, values = _tile(matrix, rows, columns, stride, index, ROWS, COLUMNS)
        if mode == 1:
            tl.atomic_max(found, tl.max(_magnitude(values)), sem="relaxed")
        _write_tile(
            r, c, mask, values, scale, scale, row_values, row_stride, column_values, column_stride,
            has_rows, has_columns,
        )  # fmt: skip


def find(part: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """Raise the greatest magnitudes to those of ``part``: of all elements if ``columns`` is None."""
    part = _readable(part)
    bits = rows.view(torch.int32)
    others = bits if columns is None else columns.view(torch.int32)
    whole: Any = columns is None
    height, width = part.shape
    tile = FIND if whole else FIND_BY_ROW
    grid = (triton.cdiv(height, tile["ROWS"] * tile["TILES"]) * triton.cdiv(width, tile["COLUMNS"]),)
    _greatest[grid](part, bits, others, height, width, part.stride(0), whole=whole, **tile)


def write(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any) -> None:
    """Write the cast of ``part`` and of its transpose to the given windows; either may be None."""
    if all(window is None or window.amax.numel() == 1 for window in (rows, columns)):
        amax = (rows or columns).amax.view(torch.int32)
        _write_with_one_scale(part, dtype, rows, columns, amax, amax, KNOWN)
        return
    part = _readable(part)
    tile = WRITE_ROWS if columns is None else WRITE_COLUMNS
    arguments: list[Any] = []
    for window in (rows, columns):
        one = window or rows or columns
        arguments += [one.amax.view(torch.int32), one.values, one.inverse, one.values.stride(0)]
    _casts_by_row[(_tiles(part, tile),)](
        part, *part.shape, part.stride(0), *arguments, **_settings(dtype, rows, columns), **tile
    )


def guess(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any, found: Tensor, guessed: Tensor) -> None:
    """Write the casts of ``part`` with a guessed scale, and find the greatest magnitude.

    Args:
        part: bf16 matrix.
        dtype: of the casts.
        rows: window of the cast, or None.
        columns: window of the transposed cast, or None.
        found: int32 ``[2]``: bits of the greatest magnitude, which are raised, and of the guessed one, which are set.
        guessed: int32 ``[2]``: bits of the magnitude to guess, and the number of wrong guesses.
    """
    _write_with_one_scale(part, dtype, rows, columns, found, guessed, GUESSED)


def repair(part: Tensor, dtype: torch.dtype, rows: Any, columns: Any, found: Tensor, guessed: Tensor) -> None:
    """Write inverse scales, and the casts again if the guess was wrong; the magnitude becomes the next guess.

    Arguments as in :func:`guess`, which must have been called for every part of the matrix.
    """
    _write_with_one_scale(part, dtype, rows, columns, found, guessed, REPAIR)


def _write_with_one_scale(
    part: Tensor, dtype: torch.dtype, rows: Any, columns: Any, found: Tensor, guessed: Tensor, mode: int
) -> None:
    part = _readable(part)
    tile = WRITE_ROWS if columns is None else WRITE_COLUMNS
    arguments: list[Any] = []
    for window in (rows, columns):
        one = window or rows or columns
        arguments += [one.values, one.inverse, one.values.stride(0)]
    programs = _tiles(part, tile)
    _casts[(min(programs, _REPAIRERS) if mode == REPAIR else programs,)](
        part, *part.shape, part.stride(0), found, guessed, *arguments,
        **_settings(dtype, rows, columns), mode=mode, **tile,
    )  # fmt: skip


def _settings(dtype: torch.dtype, rows: Any, columns: Any) -> dict[str, Any]:
    kinds = {"has_rows": rows is not None, "has_columns": columns is not None}
    return {**kinds, "top": TOP_EXPONENT[dtype], "greatest_power": GREATEST_POWER}


def _tiles(matrix_RK: Tensor, tile: dict[str, int]) -> int:
    rows, columns = matrix_RK.shape
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"])


def _readable(part: Tensor) -> Tensor:
    return part if part.stride(1) == 1 else part.contiguous()


KERNELS = (find, write, (guess, repair))
