"""The gate mix in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_mix(g: Tensor, m: Tensor, a: Tensor) -> Tensor:
    """Return g m + (1 - g) a elementwise, computed as a + g (m - a)."""
    return torch.lerp(a, m, g)
