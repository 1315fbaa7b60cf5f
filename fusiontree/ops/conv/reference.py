"""Reference convolution, as a sum of K shifted products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_products(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    positions_BS: Tensor | None,
    initial_BKC: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Sum the taps; a token at position p of its document uses at most p earlier tokens (None: all in the row)."""
    length, taps = x_BSC.shape[1], weight_CK.shape[1]
    if initial_BKC is None:
        padded_BTC = F.pad(x_BSC, (0, 0, taps - 1, 0))
    else:
        padded_BTC = torch.cat([initial_BKC.to(x_BSC.dtype), x_BSC], dim=1)
    compute = torch.promote_types(x_BSC.dtype, torch.float32)
    weight_KC = weight_CK.to(compute).t()
    y_BSC = x_BSC * weight_KC[-1]
    for back in range(1, taps):
        tap_BSC = padded_BTC[:, taps - 1 - back : taps - 1 - back + length] * weight_KC[taps - 1 - back]
        if positions_BS is not None:
            tap_BSC = tap_BSC * (positions_BS >= back).unsqueeze(-1)
        y_BSC = y_BSC + tap_BSC
    return _activated(y_BSC, bias_C, activation).to(x_BSC.dtype)


def one_token(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, initial_BKC: Tensor, activation: str | None
) -> Tensor:
    """Convolve one token (S = 1) that continues ``initial_BKC``: a weighted sum of K inputs."""
    compute = torch.promote_types(x_BSC.dtype, torch.float32)
    window_BKC = torch.cat([initial_BKC.to(x_BSC.dtype), x_BSC], dim=1).to(compute)
    y_BSC = (window_BKC * weight_CK.to(compute).t()).sum(1, keepdim=True)
    return _activated(y_BSC, bias_C, activation).to(x_BSC.dtype)


def _activated(y_BSC: Tensor, bias_C: Tensor | None, activation: str | None) -> Tensor:
    if bias_C is not None:
        y_BSC = y_BSC + bias_C.to(y_BSC.dtype)
    if activation == "silu":
        return F.silu(y_BSC)
    if activation is not None:
        raise ValueError(f"unknown activation '{activation}'; use 'silu' or None")
    return y_BSC
