"""Results of several linear maps side by side in one memory, without a concatenation.

Shape legend: B rows, S tokens, C input channels, D output channels, N tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_plain(module: nn.Module) -> bool:
    """Return whether the module is a linear map without bias, with a weight that is not sharded now."""
    return type(module) is nn.Linear and module.bias is None and type(module.weight) is nn.Parameter


def product_in(x_BSC: Tensor, module: nn.Module, place_BSD: Tensor | None) -> Tensor:
    """Return ``module(x)``; in the memory of ``place`` if it has the dtype of ``x`` and the weight is not sharded now.

    Args:
        x_BSC: input.
        module: linear map.
        place_BSD: part of the channels of a wider tensor, which is of no other use. None: anywhere.
    """
    if place_BSD is None or place_BSD.dtype != x_BSC.dtype or not is_plain(module):
        return module(x_BSC)
    return _ProductIn.apply(x_BSC, module.weight, place_BSD)


def joined(parts: Sequence[Tensor], memory_BSD: Tensor | None) -> Tensor:
    """Return ``parts`` concatenated along the channels: ``memory`` if they lie there in order, else a copy.

    Args:
        parts: each ``[B, S, D / number of parts]``.
        memory_BSD: tensor whose channels, in equal parts, were the places of :func:`product_in`; or None.
    """
    if memory_BSD is not None:
        begin, step = memory_BSD.data_ptr(), parts[0].shape[-1] * memory_BSD.element_size()
        if [part.data_ptr() for part in parts] == [begin + index * step for index in range(len(parts))]:
            return _Joined.apply(memory_BSD, *parts)
    return torch.cat(list(parts), dim=-1)


class _ProductIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, weight_DC: Tensor, place_BSD: Tensor) -> Tensor:
        ctx.save_for_backward(x_BSC, weight_DC)
        out_BSD = place_BSD.detach()
        torch.mm(x_BSC.flatten(0, -2), weight_DC.t(), out=out_BSD.view(-1, out_BSD.shape[-1]))
        return out_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BSC, weight_DC = ctx.saved_tensors
        g_ND = grads[0].flatten(0, -2)
        return (g_ND @ weight_DC).view(x_BSC.shape), g_ND.t() @ x_BSC.flatten(0, -2), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory_BSD: Tensor, *parts: Tensor) -> Tensor:
        ctx.parts = len(parts)
        return memory_BSD.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads[0].chunk(ctx.parts, dim=-1)
