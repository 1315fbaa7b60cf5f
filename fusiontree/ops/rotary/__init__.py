"""Rotary position encoding (Su et al. 2021, "RoFormer"). Shape legend: B rows, S tokens, H heads, D channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.elementwise import fused, with_kernel
from fusiontree.ops.rotary import reference
from fusiontree.ops.rotary.reference import rotary_tables

__all__ = ["apply_rotary", "rotary_tables", "rotate_and_cut"]

_KERNELS = "fusiontree.ops.rotary.triton"
ROTATE = with_kernel("rotation", reference.rotate_and_cut, f"{_KERNELS}:rotate_and_cut")
ROTATE_BACK = with_kernel("rotation, backward", reference.rotate_back, f"{_KERNELS}:rotate_back")


def apply_rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate channels i and i + D/2 by the tables' angles, in fp32 or better; returns the dtype of ``x``."""
    return fused(reference.apply_rotary, backend, x_BSHD.device.type)(x_BSHD, cos_BSD, sin_BSD)


def rotate_and_cut(
    q_BSHD: Tensor, k_BSKD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, first: tuple[int, int], *, backend: str = "auto"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return :func:`apply_rotary` of queries and keys, each split into its first heads and the rest.

    ``first`` has the number of first heads for queries and for keys. The backward concatenates the parts. Queries and
    keys share a call because it costs the host more than the device.
    """
    q_first, q_rest, k_first, k_rest = _RotateAndCut.apply(q_BSHD, k_BSKD, cos_BSD, sin_BSD, first, backend)
    return (q_first, q_rest), (k_first, k_rest)


class _RotateAndCut(torch.autograd.Function):
    """Explicit forward and backward: a compiled call with autograd costs the host more than a call without, and copies
    gradients with strides that differ from its outputs'.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, first: tuple[int, int], backend: str
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos_BSD, sin_BSD)
        ctx.backend = backend
        rotate = ROTATE.choose(backend, q_BSHD.device.type)
        queries, keys = rotate(q_BSHD, k_BSKD, cos_BSD, sin_BSD, first)
        return *queries, *keys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rotate_back = ROTATE_BACK.choose(ctx.backend, grads[0].device.type)
        return *rotate_back(*grads, *ctx.saved_tensors), None, None, None, None
