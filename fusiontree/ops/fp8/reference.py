"""The FP8 recipe in plain PyTorch: scales, casts and products. It defines what the kernels compute.

A matrix is cast to E4M3 or E5M2 after multiplication by a scale that is computed from its current values: one scale per
matrix (``tensor``), or one per row (``row``). Scales are powers of two, so scaling is exact and the cast rounds each
element to the same value under every scale, unless the scaled element is subnormal in FP8. Ranks that hold different
shards of a matrix therefore need not agree on its greatest value.

Shape legend: R rows, K columns of a matrix; M rows of a product, N its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP_EXPONENT = {E4M3: 8, E5M2: 15}
"""The greatest values are 448 = 1.75 · 2^8 and 57344 = 1.75 · 2^15."""
GREATEST_POWER = 60
"""Bound of a scale's exponent, so that a scale is finite where all values are zero."""
_MANTISSA, _OF_1_75 = 0x7FFFFF, 0x600000
"""Bits of the mantissa of an fp32 value, and their value in 1.75."""


class Cast(NamedTuple):
    """A matrix in FP8; products contract along its columns."""

    values_RK: Tensor
    inverse: Tensor
    """Inverse scales in fp32, ``[1, 1]`` or one per row, ``[R, 1]``."""


def greatest(matrix_RK: Tensor, dim: int | None = None) -> Tensor:
    """Return the greatest magnitude in fp32 of all elements, ``[1]``, or along ``dim``; NaN if an element is NaN."""
    magnitude = matrix_RK.detach().abs()
    return (magnitude.amax().view(1) if dim is None else magnitude.amax(dim)).float()


def scales_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the greatest power of two that scales ``amax`` into the range of ``dtype``; NaN if it is not finite.

    Args:
        amax: greatest magnitudes, fp32; zero gives a finite scale.
        dtype: E4M3 or E5M2.
    """
    bits = amax.view(torch.int32)
    exponent = (bits >> 23) - 127
    power = TOP_EXPONENT[dtype] - exponent - ((bits & _MANTISSA) > _OF_1_75).int()
    power = power.clamp(max=GREATEST_POWER)
    return torch.where(amax.isfinite(), ((power + 127) << 23).view(torch.float32), torch.nan)


def cast(matrix_RK: Tensor, amax: Tensor, dtype: torch.dtype) -> Cast:
    """Cast a matrix.

    Args:
        matrix_RK: values; a transposed view is allowed.
        amax: greatest magnitude of the matrix, ``[1]``, or of each row, ``[R]``.
        dtype: E4M3 or E5M2.

    Returns:
        The cast, in row-major order; all NaN where ``amax`` is not finite.
    """
    scale = scales_of(amax, dtype).unsqueeze(-1)
    return Cast((matrix_RK.float() * scale).to(dtype).contiguous(), scale.reciprocal())


def product(a: Cast, b: Cast) -> Tensor:
    """Return ``a @ b.T`` in bf16, ``[M, N]``, accumulated in fp32."""
    found_MN = a.values_RK.float() @ b.values_RK.float().t()
    return (found_MN * a.inverse * b.inverse.t()).to(torch.bfloat16)
