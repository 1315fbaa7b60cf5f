"""GELU and its gradient in plain PyTorch. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def again_and_gradient(x_BSC: Tensor, dy_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU of x, and the gradient of x from that of the GELU, each in x's dtype."""
    return F.gelu(x_BSC), torch.ops.aten.gelu_backward(dy_BSC, x_BSC)
