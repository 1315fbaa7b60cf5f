"""Rotary position encoding (Su et al. 2021, "RoFormer"). Shape legend: B rows, S tokens, H heads, D channels."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.elementwise import fused
from fusiontree.ops.rotary import reference
from fusiontree.ops.rotary.reference import rotary_tables

__all__ = ["apply_rotary", "rotary_tables", "rotate_and_cut"]


def apply_rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate channel i with channel i + D/2 by the tables' angles; same dtype out, rotation in fp32 or better."""
    return fused(reference.apply_rotary, backend, x_BSHD.device.type)(x_BSHD, cos_BSD, sin_BSD)


def rotate_and_cut(
    x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, first_heads: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return :func:`apply_rotary` of the first so many heads and of the others; backward they are put together."""
    heads = x_BSHD.shape[2]
    if first_heads in (0, heads):
        rotated, empty = apply_rotary(x_BSHD, cos_BSD, sin_BSD, backend=backend), x_BSHD[:, :, :0]
        return (rotated, empty) if first_heads else (empty, rotated)
    return fused(reference.rotate_and_cut, backend, x_BSHD.device.type)(x_BSHD, cos_BSD, sin_BSD, first_heads)
