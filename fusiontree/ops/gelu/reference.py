"""GELU and its gradient in plain PyTorch. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu_product(x_BSC: Tensor, module: nn.Module, sum_BSD: Tensor | None = None) -> Tensor:
    """Compute :func:`fusiontree.ops.gelu.gelu_product`."""
    product_BSD: Tensor = module(F.gelu(x_BSC))
    return product_BSD if sum_BSD is None else product_BSD + sum_BSD


def again_and_gradient(x_BSC: Tensor, dy_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU of x, and the gradient of x from that of the GELU, each in x's dtype."""
    return F.gelu(x_BSC), torch.ops.aten.gelu_backward(dy_BSC, x_BSC)
