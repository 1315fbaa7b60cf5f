"""Root mean square norms; statistics in fp32 or better. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.elementwise import with_kernel
from fusiontree.ops.norm import reference

_KERNELS = "fusiontree.ops.norm.triton"
NORM = with_kernel("norm", reference.rms_norm, f"{_KERNELS}:rms_norm_triton")
RESIDUAL_NORM = with_kernel("residual norm", reference.residual_rms_norm, f"{_KERNELS}:residual_rms_norm_triton")
GATED_NORM = with_kernel("gated norm", reference.gated_rms_norm, f"{_KERNELS}:gated_rms_norm_triton")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    return NORM.choose(backend, x.device.type)(x, weight, eps)


def residual_rms_norm(
    x: Tensor, weight: Tensor, eps: float, uses: int = 1, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Return :func:`rms_norm` of a residual stream, and the stream for further use.

    If the caller uses the returned stream, the norm's backward kernel adds the stream's gradient, which saves a
    separate addition of two activations. Likewise, with ``uses`` 2, it returns the norm twice, in the same memory, for
    two operations whose gradients the kernel adds.
    """
    return RESIDUAL_NORM.choose(backend, x.device.type)(x, weight, eps, uses)


def gated_rms_norm(
    y_BSC: Tensor, z_BSC: Tensor, weight_C: Tensor, *, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """Return RMSNorm(y * silu(z)) in y's dtype; ``groups`` equal blocks of channels are normalized separately.

    Source: Mamba-2's output norm (Dao and Gu 2024, section 7).
    """
    compute = GATED_NORM.choose(backend, y_BSC.device.type)
    return compute(y_BSC, z_BSC, weight_C, groups=groups, eps=eps)
