"""RMS norms in plain PyTorch; statistics in fp32 or better. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(compute), x.shape[-1:], weight.to(compute), eps).to(x.dtype)


def residual_rms_norm(x: Tensor, weight: Tensor, eps: float, uses: int = 1) -> tuple[Tensor, ...]:
    """Return :func:`rms_norm` of x ``uses`` times, and x itself for further use."""
    return *[rms_norm(x, weight, eps)] * uses, x


def gated_rms_norm(y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float) -> Tensor:
    """Return RMSNorm(y * silu(z)) in y's dtype; ``groups`` equal blocks of channels are normalized separately."""
    compute = torch.promote_types(y_BSC.dtype, torch.float32)
    gated = y_BSC.to(compute) * F.silu(z_BSC.to(compute))
    grouped = gated.unflatten(-1, (groups, -1))
    normed = F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2)
    return (normed * weight_C.to(compute)).to(y_BSC.dtype)
