"""Root mean square norms; statistics in fp32 or better. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from fusiontree.ops.dispatch import Backend, Operation, anywhere
from fusiontree.ops.elementwise import compiled, fused, needs_gpu
from fusiontree.ops.norm import reference


def _triton() -> Callable:
    from fusiontree.ops.norm.triton import gated_rms_norm_triton

    return gated_rms_norm_triton


def _triton_unavailable(device: torch.device) -> str | None:
    return needs_gpu(device) or (None if find_spec("triton") else "triton is not installed")


GATED_NORM = Operation(
    "elementwise",
    [
        Backend("triton", _triton, _triton_unavailable),
        Backend("compiled", lambda: compiled(reference.gated_rms_norm), needs_gpu),
        Backend("reference", lambda: reference.gated_rms_norm, anywhere),
    ],
    shown="gated norm",
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    compute = fused(reference.rms_norm, backend, x.device.type, "fusiontree.ops.norm.triton:rms_norm_triton")
    return compute(x, weight, eps)


def gated_rms_norm(
    y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """Return RMSNorm(y * silu(z)), each of ``groups`` equal blocks of channels normalised apart, in y's dtype.

    Source: Mamba-2's output norm (Dao and Gu 2024, section 7).
    """
    compute = GATED_NORM.choose(backend, y_BSC.device.type)
    return compute(y_BSC, z_BSC, weight_C, groups=groups, eps=eps)
