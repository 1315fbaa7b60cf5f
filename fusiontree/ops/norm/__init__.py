"""Root mean square norms; statistics in fp32 or better. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.elementwise import fused
from fusiontree.ops.norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    return fused(reference.rms_norm, backend, x.device.type)(x, weight, eps)


def gated_rms_norm(
    y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """Return RMSNorm(y * silu(z)), each of ``groups`` equal blocks of channels normalised apart, in y's dtype.

    Source: Mamba-2's output norm (Dao and Gu 2024, section 7).
    """
    return fused(reference.gated_rms_norm, backend, y_BSC.device.type)(y_BSC, z_BSC, weight_C, groups=groups, eps=eps)
