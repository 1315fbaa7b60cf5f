"""Parts that the recurrent mixers share: causal convolution, the inputs that a cache keeps of it, initial values.

Shape legend: B rows, S tokens, C channels, K width of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fusiontree.ops.conv import causal_conv1d
from fusiontree.ops.documents import Documents
from fusiontree.ops.recompute import recomputed


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU; taps do not reach beyond document starts."""

    def __init__(self, channels: int, width: int, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.backend = backend

    def forward(self, x_BSC: Tensor, documents: Documents | None, initial_BKC: Tensor | None = None) -> Tensor:
        """Return ``[B, S, C]``; ``initial_BKC [B, K-1, C]`` are the inputs before the first token."""
        weight_CK, bias_C = self.taps()
        convolve = partial(causal_conv1d, documents=documents, initial_BKC=initial_BKC, backend=self.backend)
        return recomputed(convolve, x_BSC, weight_CK, bias_C)

    def taps(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias to apply; a subclass can select channels."""
        return self.weight, self.bias


def last_inputs(before_BKC: Tensor | None, new_BSC: Tensor, length: int, padding_mask_BS: Tensor | None) -> Tensor:
    """Return the last ``length`` inputs of a convolution; pads are zeros, like the tokens before a text."""
    last_BSC = new_BSC.detach()[:, -length:]
    if padding_mask_BS is not None:
        last_BSC = last_BSC * padding_mask_BS[:, -length:, None]
    missing = length - last_BSC.shape[1]
    if not missing:
        return last_BSC.clone()  # a view would keep the whole input alive
    if before_BKC is None:
        before_BKC = last_BSC.new_zeros(last_BSC.shape[0], missing, last_BSC.shape[2])
    return torch.cat([before_BKC[:, -missing:], last_BSC], dim=1)


def drawn_decay(shape: tuple[int, ...], limits: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return logarithms of decay rates drawn uniformly between two positive limits, in fp32."""
    return torch.empty(shape, dtype=torch.float64).uniform_(*limits, generator=generator).log().float()


def drawn_step_bias(shape: tuple[int, ...], limits: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return the inverse softplus of step sizes drawn log-uniformly between two positive limits, in fp32."""
    low, high = map(math.log, limits)
    dt = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator).exp()
    return (dt + torch.log(-torch.expm1(-dt))).float()


def drawn_taps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return the weight ``[channels, width]`` of a convolution, drawn uniformly within 1/sqrt(width), in fp32."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
