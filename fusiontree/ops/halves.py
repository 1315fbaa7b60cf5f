"""Split of channels into halves whose gradients may lie side by side. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def halves(x_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the second half of the channels as views, each ``[B, S, C/2]``.

    The backward pass of ``x.chunk(2, dim=-1)`` copies both gradients into one tensor. This one does not if they lie
    side by side in memory, as an operation leaves them that computes both; otherwise it copies, too.
    """
    return _Halves.apply(x_BSC)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor) -> tuple[Tensor, Tensor]:
        first_BSC, second_BSC = x_BSC.chunk(2, dim=-1)
        return first_BSC, second_BSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first, second = grads
        size, strides = first.shape[-1], first.stride()
        side_by_side = (
            strides == second.stride()
            and strides[-1] == 1
            and second.storage_offset() == first.storage_offset() + size
            and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        )
        return first.as_strided((*first.shape[:-1], 2 * size), strides) if side_by_side else torch.cat(grads, dim=-1)
