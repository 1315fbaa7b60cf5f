"""Casts of matrices to FP8, of several side by side into one, as they are and transposed; and products of casts.

On GPUs a Triton kernel finds the greatest magnitudes in one pass over a matrix, and another writes both casts in a
second pass. ``torch._scaled_mm`` multiplies. On CPUs :mod:`fusiontree.ops.fp8.reference` computes the same values.

Shape legend: R rows, K columns of a matrix; M rows of a product, N its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader, triton_unavailable
from fusiontree.ops.fp8 import reference
from fusiontree.ops.fp8.reference import E4M3, E5M2, Cast

__all__ = ["E4M3", "E5M2", "Cast", "Greatest", "Recipe", "Scaling"]
__all__ += ["cast_both", "cast_columns", "cast_rows", "greatest", "part_of", "product"]

Scaling = Literal["tensor", "row"]


class Recipe(NamedTuple):
    """How products are computed in FP8. Inputs and weights are E4M3."""

    scaling: Scaling = "tensor"
    gradient: torch.dtype = E4M3
    """Type of the gradient of a product's result."""


class Greatest(NamedTuple):
    """Greatest magnitudes of a matrix, fp32: both are the same ``[1]`` if it has one scale."""

    rows: Tensor
    """``[R]`` or ``[1]``."""
    columns: Tensor
    """``[K]`` or ``[1]``."""


def greatest(parts: Sequence[Tensor], scaling: Scaling, dim: int) -> Greatest:
    """Return the greatest magnitudes of the matrix that consists of ``parts`` side by side along ``dim``."""
    rows = sum(part.shape[0] for part in parts) if dim == 0 else parts[0].shape[0]
    columns = sum(part.shape[1] for part in parts) if dim == 1 else parts[0].shape[1]
    find, _ = _kernels(parts[0])
    sizes = (1, 1) if scaling == "tensor" else (rows, columns)
    both = torch.zeros(sum(sizes), dtype=torch.float32, device=parts[0].device)
    found = Greatest(*both.split(sizes)) if scaling == "row" else Greatest(both[:1], both[:1])
    for part, (row, column) in zip(parts, _corners(parts, dim), strict=True):
        if scaling == "tensor":
            find(part, found.rows, None)
        else:
            rows_of_part = found.rows[row : row + part.shape[0]]
            find(part, rows_of_part, found.columns[column : column + part.shape[1]])
    return found


def cast_rows(parts: Sequence[Tensor], found: Greatest, dtype: torch.dtype, dim: int) -> Cast:
    """Return the cast of the matrix that consists of ``parts`` side by side along ``dim``."""
    return _cast(parts, found, dtype, dim, rows=_empty(parts, dim, found.rows, dtype))[0]


def cast_columns(parts: Sequence[Tensor], found: Greatest, dtype: torch.dtype, dim: int) -> Cast:
    """Return the cast of the matrix's transpose."""
    return _cast(parts, found, dtype, dim, columns=_empty(parts, dim, found.columns, dtype, transposed=True))[1]


def cast_both(
    parts: Sequence[Tensor], found: Greatest, dtype: torch.dtype, dim: int, into: tuple[Cast, Cast] | None = None
) -> tuple[Cast, Cast]:
    """Return the casts of :func:`cast_rows` and :func:`cast_columns`, by one pass over the parts.

    ``into`` are casts of equal shapes that are overwritten.
    """
    rows, columns = into or (
        _empty(parts, dim, found.rows, dtype),
        _empty(parts, dim, found.columns, dtype, transposed=True),
    )
    return _cast(parts, found, dtype, dim, rows, columns)


def product(a: Cast, b: Cast, *, fast: bool, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b.T`` in bf16, ``[M, N]``.

    Args:
        a: left factor.
        b: right factor, E4M3. All sizes but M must be multiples of 16.
        fast: on a GPU, sum up in the tensor cores' registers, which keep fewer bits than fp32; otherwise partial sums
            go to fp32 registers.
        out: memory for the result.
    """
    if not a.values_RK.is_cuda:
        found_MN = reference.product(a, b)
        return found_MN if out is None else out.copy_(found_MN)
    settings: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
    if out is not None:
        settings["out"] = out
    scales = (a.inverse, b.inverse.t())
    return torch._scaled_mm(a.values_RK, b.values_RK.t(), *scales, **settings)


def part_of(cast: Cast, start: int, stop: int) -> Cast:
    """Return consecutive rows of a cast."""
    inverse = cast.inverse if cast.inverse.numel() == 1 else cast.inverse[start:stop]
    return Cast(cast.values_RK[start:stop], inverse)


def _empty(parts: Sequence[Tensor], dim: int, amax: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Cast:
    """Return a cast without values for the matrix that consists of ``parts``."""
    sizes = [list(part.shape) for part in parts]
    shape = list(sizes[0])
    shape[dim] = sum(size[dim] for size in sizes)
    values = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=parts[0].device)
    return Cast(values, torch.empty(amax.numel(), 1, dtype=torch.float32, device=parts[0].device))


def _cast(
    parts: Sequence[Tensor],
    found: Greatest,
    dtype: torch.dtype,
    dim: int,
    rows: Cast | None = None,
    columns: Cast | None = None,
) -> tuple[Any, Any]:
    """Fill the casts that are given."""
    _, write = _kernels(parts[0])
    for part, (row, column) in zip(parts, _corners(parts, dim), strict=True):
        height, width = part.shape
        target = None if rows is None else _window(rows, found.rows, row, height, column, width)
        turned = None if columns is None else _window(columns, found.columns, column, width, row, height)
        write(part, dtype, target, turned)
    return rows, columns


class Window(NamedTuple):
    """Where the cast of a part goes."""

    values: Tensor
    inverse: Tensor
    amax: Tensor


def _window(cast: Cast, amax: Tensor, row: int, height: int, column: int, width: int) -> Window:
    values = cast.values_RK[row : row + height, column : column + width]
    if amax.numel() == 1:
        return Window(values, cast.inverse, amax)
    return Window(values, cast.inverse[row : row + height], amax[row : row + height])


def _corners(parts: Sequence[Tensor], dim: int) -> list[tuple[int, int]]:
    """Return row and column of each part's first element in the matrix of all parts."""
    corners, at = [], 0
    for part in parts:
        corners.append((at, 0) if dim == 0 else (0, at))
        at += part.shape[dim]
    return corners


def _find(part: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """Raise the greatest magnitudes to those of ``part``: of all elements if ``columns`` is None."""
    if columns is None:
        torch.maximum(rows, reference.greatest(part), out=rows)
        return
    torch.maximum(rows, reference.greatest(part, 1), out=rows)
    torch.maximum(columns, reference.greatest(part, 0), out=columns)


def _write(part: Tensor, dtype: torch.dtype, rows: Window | None, columns: Window | None) -> None:
    """Write the cast of ``part`` and of its transpose."""
    for window, matrix in ((rows, part), (columns, part.t())):
        if window is not None:
            values, inverse = reference.cast(matrix, window.amax, dtype)
            window.values.copy_(values)
            window.inverse.copy_(inverse)


_KERNELS = Operation(
    "elementwise",
    [
        Backend("triton", loader("fusiontree.ops.fp8.triton:KERNELS"), triton_unavailable),
        Backend("reference", lambda: (_find, _write), anywhere),  # type: ignore[arg-type, return-value]
    ],
    shown="fp8 casts",
)


def _kernels(part: Tensor) -> Any:
    """Return the functions that find greatest magnitudes and that write casts, on the part's device."""
    return _KERNELS.choose("auto", part.device.type)
