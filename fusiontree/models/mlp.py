"""The block's token-wise MLP. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.ops.elementwise import fused
from fusiontree.ops.recompute import recomputed


class MLP(nn.Module):
    """``down(gelu(up(z)))``, or SwiGLU (Shazeer 2020): ``down(silu(gate(z)) * up(z))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.backend = config.kernels.elementwise
        self.gate: nn.Linear | None = None
        if config.mlp_activation == "swiglu":
            self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)

    def forward(self, z_BSC: Tensor) -> Tensor:
        """Return ``[B, S, C]``."""
        if self.gate is None:
            return self.down(recomputed(F.gelu, self.up(z_BSC)))
        swiglu = fused(_swiglu, self.backend, z_BSC.device.type)
        return self.down(recomputed(swiglu, self.gate(z_BSC), self.up(z_BSC)))


def _swiglu(gate_BSC: Tensor, up_BSC: Tensor) -> Tensor:
    return F.silu(gate_BSC) * up_BSC
