"""GELU followed by a linear map. Shape legend: B rows, S tokens, C input channels, D output channels, N tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.ops.elementwise import with_kernel
from fusiontree.ops.gelu import reference
from fusiontree.ops.linear import add_product
from fusiontree.ops.linear.side_by_side import is_plain
from fusiontree.ops.recompute import recomputed, recomputing

AGAIN_AND_GRADIENT = with_kernel(
    "gelu, again and backward", reference.again_and_gradient, "fusiontree.ops.gelu.triton:again_and_gradient"
)


def gelu_product(
    x_BSC: Tensor, module: nn.Module, sum_BSD: Tensor | None = None, *, joint: bool, backend: str = "auto"
) -> Tensor:
    """Return ``module(gelu(x))``, or its sum with ``sum``.

    The GELU is recomputed where results are; then the kernel of its gradient computes it too, and reads x once.

    Args:
        x_BSC: input.
        module: linear map; a parallel plan may have replaced it by a module of another type.
        sum_BSD: as in :func:`fusiontree.ops.linear.add_product`, which may overwrite it.
        joint: as in :func:`fusiontree.ops.linear.project`.
        backend: a name of :data:`AGAIN_AND_GRADIENT` or "auto".
    """
    if joint and recomputing() and is_plain(module) and not torch.is_autocast_enabled(x_BSC.device.type):
        return _GeluProduct.apply(x_BSC, module.weight, sum_BSD, backend)
    gelu_BSC = recomputed(F.gelu, x_BSC)
    return module(gelu_BSC) if sum_BSD is None else add_product(sum_BSD, gelu_BSC, module, joint=joint)


class _GeluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, weight_DC: Tensor, sum_BSD: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x_BSC, weight_DC)
        ctx.backend, ctx.adds = backend, sum_BSD is not None
        gelu_NC = F.gelu(x_BSC).flatten(0, -2)
        if sum_BSD is None:
            return (gelu_NC @ weight_DC.t()).view(*x_BSC.shape[:-1], -1)
        out_BSD = sum_BSD.detach()  # without mark_dirty, as in add_product
        out_BSD.view(-1, out_BSD.shape[-1]).addmm_(gelu_NC, weight_DC.t())
        return out_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BSC, weight_DC = ctx.saved_tensors
        g_ND = grads[0].flatten(0, -2)
        compute = AGAIN_AND_GRADIENT.choose(ctx.backend, x_BSC.device.type)
        gelu_BSC, dx_BSC = compute(x_BSC, (g_ND @ weight_DC).view(x_BSC.shape))
        return dx_BSC, g_ND.t() @ gelu_BSC.flatten(0, -2), grads[0] if ctx.adds else None, None
