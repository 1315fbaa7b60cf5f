"""Shared relative time encoding (SRTE): encodes each token's position in its document, for recurrent mixers.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.ops.elementwise import fused

_BLOCK = 4096  # tokens per block, which limits the memory of float64 angles


class SharedTimeEncoding(nn.Module):
    """One encoding for all layers: sines and cosines (Vaswani et al. 2017, section 3.5) or a learned table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.srte_encoding
        self.channels = config.hidden_size
        self.backend = config.kernels.elementwise
        if self.kind == "learnable":
            self.weight = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the encoding ``[B, S, C]`` in ``dtype`` of positions in documents; None without an encoding."""
        if self.kind == "none":
            return None
        if self.kind == "learnable":
            return F.embedding(positions_BS, self.weight).to(dtype)
        blocks = positions_BS.split(_BLOCK, dim=1)
        if len(blocks) > 1 and positions_BS.is_cuda and self.backend != "reference":
            return fused(sincos_encoding, self.backend, "cuda")(positions_BS, self.channels, dtype)  # stores no angles
        return torch.cat([sincos_encoding(block, self.channels, dtype) for block in blocks], dim=1)


def sincos_encoding(positions_BS: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return sines in even channels and cosines in odd channels; angles are float64, as for RoPE."""
    even = torch.arange(0, channels, 2, dtype=torch.float64, device=positions_BS.device)
    angle = positions_BS.unsqueeze(-1).double() * torch.exp(even * (-math.log(10000.0) / channels))
    return torch.stack([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1).flatten(2)
