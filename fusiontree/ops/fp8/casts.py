"""Casts of matrices to FP8, of several side by side into one, as they are and transposed; and products of casts.

On GPUs a Triton kernel finds the greatest magnitudes in one pass over a matrix, and another writes both casts in a
second pass; or one pass does both with a scale that is guessed (:class:`Guess`). ``torch._scaled_mm`` multiplies. On
CPUs :mod:`fusiontree.ops.fp8.reference` computes the same values.

Shape legend: R rows, K columns of a matrix; M rows of a product, N its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader, triton_unavailable
from fusiontree.ops.fp8 import reference
from fusiontree.ops.fp8.reference import E4M3, E5M2, Cast

__all__ = ["E4M3", "E5M2", "Cast", "Greatest", "Guess", "Recipe", "Scaling"]
__all__ += ["cast_both", "cast_columns", "cast_rows", "find_and_cast", "greatest", "part_of", "product"]

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


class Guess:
    """The greatest magnitude that a matrix had last time, from which its next scale is guessed.

    Results do not depend on it: a wrong guess is found and repaired on the device. Scales are powers of two, so that
    a guess is right as long as the greatest magnitude stays between two of them.
    """

    def __init__(self) -> None:
        """Guess nothing: the first time is repaired."""
        self._bits: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """Return int32 ``[2]``: bits of the greatest magnitude, and the number of wrong guesses.

        The memory stays, as a recorded step reads it; memory that the recording itself makes is not kept.
        """
        if self._bits is not None and self._bits.device == device:
            return self._bits
        bits = torch.zeros(2, dtype=torch.int32, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._bits = bits
        return bits

    @property
    def wrong(self) -> int:
        """Number of wrong guesses; waits for the device."""
        return 0 if self._bits is None else int(self._bits[1])


def find_and_cast(
    parts: Sequence[Tensor],
    scaling: Scaling,
    dtype: torch.dtype,
    dim: int,
    *,
    both: bool,
    guess: Guess | None = None,
    into: tuple[Cast, Cast] | None = None,
) -> tuple[Greatest, Cast, Cast | None]:
    """Return greatest magnitudes, cast, and cast of the transpose or None, of the matrix that consists of ``parts``.

    Args:
        parts: matrices side by side along ``dim``.
        scaling: one scale for all, or one per row of each cast.
        dtype: of the casts.
        dim: 0 or 1.
        both: write the transpose's cast too.
        guess: of this matrix, updated; saves a pass on GPUs if there is one scale. None: no guess.
        into: casts of equal shapes that are overwritten.
    """
    *_, guessing = _kernels(parts[0])
    if guess is None or guessing is None or scaling == "row":
        found = greatest(parts, scaling, dim)
        if both:
            return found, *cast_both(parts, found, dtype, dim, into)
        return found, cast_rows(parts, found, dtype, dim), None
    bits = torch.zeros(2, dtype=torch.int32, device=parts[0].device)
    amax = bits[:1].view(torch.float32)
    found = Greatest(amax, amax)
    rows, columns = into or (
        _empty(parts, dim, amax, dtype),
        _empty(parts, dim, amax, dtype, transposed=True) if both else None,
    )
    guessed = guess.on(parts[0].device)
    windows = list(_windows(parts, found, dim, rows, columns))
    for kernel in guessing:
        for part, target, turned in windows:
            kernel(part, dtype, target, turned, bits, guessed)
    return found, rows, columns


def greatest(parts: Sequence[Tensor], scaling: Scaling, dim: int) -> Greatest:
    """Return the greatest magnitudes of the matrix that consists of ``parts`` side by side along ``dim``."""
    rows = sum(part.shape[0] for part in parts) if dim == 0 else parts[0].shape[0]
    columns = sum(part.shape[1] for part in parts) if dim == 1 else parts[0].shape[1]
    find, *_ = _kernels(parts[0])
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
    _, write, _ = _kernels(parts[0])
    for part, target, turned in _windows(parts, found, dim, rows, columns):
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


def _windows(
    parts: Sequence[Tensor], found: Greatest, dim: int, rows: Cast | None, columns: Cast | None
) -> Iterator[tuple[Tensor, Window | None, Window | None]]:
    """Yield each part and where its cast and transposed cast go; None for a cast that is None."""
    for part, (row, column) in zip(parts, _corners(parts, dim), strict=True):
        height, width = part.shape
        target = None if rows is None else _window(rows, found.rows, row, height, column, width)
        turned = None if columns is None else _window(columns, found.columns, column, width, row, height)
        yield part, target, turned


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
        Backend("reference", lambda: (_find, _write, None), anywhere),  # type: ignore[arg-type, return-value]
    ],
    shown="fp8 casts",
)


def _kernels(part: Tensor) -> Any:
    """Return, for the part's device, functions that find greatest magnitudes and write casts, and a pair or None.

    The pair writes casts by a guess, and repairs them.
    """
    return _KERNELS.choose("auto", part.device.type)
