"""What mixes the two branches: their alignment, the gate, and the gate's statistics.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.ops.elementwise import fused


class RowGateSums(NamedTuple):
    """Sums over a row's tokens and channels in one layer, in fp32."""

    gate_sum_B: Tensor
    entropy_sum_B: Tensor
    """Binary entropies of the gates, in nats."""
    square_sum_B: Tensor


class Alignment(nn.Module):
    """One input for gate and MLP from the branches' outputs: a two-layer GELU MLP beside a linear map."""

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(branches * hidden_size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)
        self.skip = nn.Linear(branches * hidden_size, hidden_size, bias=False)

    def forward(self, ma_BSC: Tensor) -> Tensor:
        """Map the branches' outputs side by side, ``[B, S, branches * hidden_size]``, to ``[B, S, hidden_size]``."""
        return self.down(F.gelu(self.up(ma_BSC))) + self.skip(ma_BSC)


class FusionGate(nn.Module):
    """``sigmoid(W_up tanh(W_down z))``: the share of the Mamba branch, for every token and channel.

    ``W_up`` starts at zero, so every gate starts at 0.5.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        self.up = nn.Linear(config.gate_rank, config.hidden_size, bias=False)

    def forward(self, z_BSC: Tensor, counted_BS: Tensor | None = None) -> tuple[Tensor, RowGateSums]:
        """Return the gates ``[B, S, C]`` and their sums over the tokens that ``counted_BS`` (bool; None: all) marks."""
        logits_BSC = self.up(torch.tanh(self.down(z_BSC)))
        return torch.sigmoid(logits_BSC), gate_sums(logits_BSC, counted_BS)


def gate_sums(logits_BSC: Tensor, counted_BS: Tensor | None = None) -> RowGateSums:
    """Sum ``g = sigmoid(logits)``, its binary entropy and its square over each row's counted tokens and all channels.

    The entropy is ``softplus(l) - l g``, which is exact where g rounds to 0 or 1. Only the logits are kept for the
    backward pass: fp32 copies of long rows would be as large as the layer's other activations together.
    """
    return RowGateSums(*_GateSums.apply(logits_BSC, counted_BS))


class _GateSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSC: Tensor, counted_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits_BSC, counted_BS)
        return fused(_sums, "auto", logits_BSC.device.type)(logits_BSC, counted_BS)

    @staticmethod
    def backward(ctx: Any, *grads_B: Tensor) -> tuple[Tensor, None]:
        logits_BSC, counted_BS = ctx.saved_tensors
        return fused(_gradient, "auto", logits_BSC.device.type)(logits_BSC, counted_BS, *grads_B), None


def _sums(logits_BSC: Tensor, counted_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits, gate = _logits_and_gate(logits_BSC)
    weight = 1.0 if counted_BS is None else counted_BS.unsqueeze(-1).to(gate.dtype)
    return (
        (gate * weight).sum((1, 2)),
        ((F.softplus(logits) - logits * gate) * weight).sum((1, 2)),
        (gate.square() * weight).sum((1, 2)),
    )


def _gradient(
    logits_BSC: Tensor, counted_BS: Tensor | None, gate_grad_B: Tensor, entropy_grad_B: Tensor, square_grad_B: Tensor
) -> Tensor:
    gate_grad, entropy_grad, square_grad = (g[:, None, None] for g in (gate_grad_B, entropy_grad_B, square_grad_B))
    logits, gate = _logits_and_gate(logits_BSC)
    # d softplus(l) - l g = -l dg, and dg = g (1 - g) dl.
    grad = gate * (1 - gate) * (gate_grad + 2 * gate * square_grad - logits * entropy_grad)
    if counted_BS is not None:
        grad = grad * counted_BS.unsqueeze(-1)
    return grad.to(logits_BSC.dtype)


def _logits_and_gate(logits_BSC: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_BSC.to(torch.promote_types(logits_BSC.dtype, torch.float32))
    return logits, torch.sigmoid(logits)
