"""Formulas around the gated delta rule, in fp32 or better; fused on GPUs.

Shape legend: B rows, S tokens, G heads of K channels, H heads of V channels, C = H V channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-6
"""Added to the sum of squares of a query or key; as in fla and transformers."""


def unit_length(x_BSGK: Tensor) -> Tensor:
    """Return every head's vector divided by its length."""
    compute = torch.promote_types(x_BSGK.dtype, torch.float32)
    x = x_BSGK.to(compute)
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _SMALLEST)).to(x_BSGK.dtype)


def norm_then_gate(y_BSHV: Tensor, z_BSC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return ``RMSNorm(y) * weight * silu(z)``, ``[B, S, C]``; each head is normalized separately.

    Source: the output of Gated DeltaNet (arXiv:2412.06464, section 3.3). Mamba-2's norm has the gate inside the norm.
    """
    compute = torch.promote_types(y_BSHV.dtype, torch.float32)
    normed_BSC = F.rms_norm(y_BSHV.to(compute), y_BSHV.shape[-1:], None, eps).flatten(2)
    return (normed_BSC * weight_C.to(compute) * F.silu(z_BSC.to(compute))).to(y_BSHV.dtype)


def decay_and_beta(a_BSH: Tensor, b_BSH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log decay ``-exp(A_log) softplus(a + dt_bias)`` and the writing strength ``sigmoid(b)``."""
    a_BSH, b_BSH = a_BSH.to(dt_bias_H.dtype), b_BSH.to(dt_bias_H.dtype)
    return -torch.exp(A_log_H) * F.softplus(a_BSH + dt_bias_H), torch.sigmoid(b_BSH)
