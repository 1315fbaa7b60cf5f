"""Root mean square norms. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fusiontree.ops.norm import gated_rms_norm, residual_rms_norm, rms_norm
from fusiontree.ops.recompute import mark_recomputable, recomputed


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight``, computed in fp32, returned in the dtype of ``x``."""

    def __init__(self, channels: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps
        self.backend = backend

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        return recomputed(partial(rms_norm, eps=self.eps, backend=self.backend), x_BSC, self.weight)


class ResidualRMSNorm(RMSNorm):
    """:class:`RMSNorm` of a residual stream that also returns the stream."""

    def forward(self, x_BSC: Tensor, uses: int = 1) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return the norm, once for each of one or two uses, and the residual stream for further use.

        Each is ``[B, S, C]``. The first one must stay referenced until the uses have saved theirs.
        """
        normed = residual_rms_norm(x_BSC, self.weight, self.eps, uses, backend=self.backend)
        mark_recomputable(normed[0], partial(rms_norm, eps=self.eps, backend=self.backend), x_BSC, self.weight)
        return normed


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y * silu(z))`` of each group of channels separately (Mamba-2's norm before its output projection)."""

    def __init__(self, channels: int, groups: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.group_size = channels // groups
        self.eps = eps
        self.backend = backend

    def forward(self, y_BSC: Tensor, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``; C may be a subset of the channels that consists of complete groups."""
        groups = y_BSC.shape[-1] // self.group_size
        norm = partial(gated_rms_norm, groups=groups, eps=self.eps, backend=self.backend)
        return recomputed(norm, y_BSC, z_BSC, self.weight)
