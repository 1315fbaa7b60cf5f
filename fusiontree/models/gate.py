"""Alignment of the branches and the gate that mixes them.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.ops.gelu import gelu_product
from fusiontree.ops.linear import project
from fusiontree.ops.norm import rms_norm
from fusiontree.ops.recompute import recomputed


class Alignment(nn.Module):
    """Computes the input of gate and MLP from the branches' outputs: sum of a two-layer GELU MLP and a linear map."""

    fused_projections = False

    def __init__(self, branches: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.up = nn.Linear(branches * hidden_size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, hidden_size, bias=False)
        self.skip = nn.Linear(branches * hidden_size, hidden_size, bias=False)

    def forward(self, ma_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Map the branches' concatenated outputs, ``[B, S, branches * hidden_size]``, to ``[B, S, hidden_size]``.

        Also returns ``ma`` for the gate mix, onto whose gradient the backward pass of the alignment adds its own.
        """
        inner_BSC, skip_BSC, ma_BSC = project(ma_BSC, (self.up, self.skip), joint=self.fused_projections, passes=True)
        return gelu_product(inner_BSC, self.down, skip_BSC, joint=self.fused_projections, backend=self.backend), ma_BSC


class BranchNorm(nn.Module):
    """RMS norm of each branch's output separately, with separate weights."""

    def __init__(self, branches: int, hidden_size: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.branches, self.eps = branches, eps
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(branches * hidden_size))

    def forward(self, outputs_BSC: Tensor) -> Tensor:
        """Normalize the branches' concatenated outputs, ``[B, S, branches * hidden_size]``."""
        return recomputed(self._normalized, outputs_BSC, self.weight)

    def _normalized(self, outputs_BSC: Tensor, weight_C: Tensor) -> Tensor:
        parts = zip(outputs_BSC.chunk(self.branches, dim=-1), weight_C.chunk(self.branches), strict=True)
        normed = [rms_norm(part_BSC, weight, self.eps, backend=self.backend) for part_BSC, weight in parts]
        return torch.cat(normed, dim=-1)


def even_mix(outputs_BSC: Tensor, mix: str, branches: int) -> Tensor:
    """Return the ``mix`` of a block without a gate, a mean, sum or concatenation, from the concatenated outputs."""
    if mix == "concat" or branches == 1:
        return outputs_BSC
    formula = _sum if mix == "sum" else _mean
    return recomputed(formula, outputs_BSC)


def _sum(outputs_BSC: Tensor) -> Tensor:
    return torch.add(*outputs_BSC.chunk(2, dim=-1))


def _mean(outputs_BSC: Tensor) -> Tensor:
    return _sum(outputs_BSC) / 2


def even_sums(outputs_BSC: Tensor, channels: int, counted_BS: Tensor | None) -> dict[str, Tensor]:
    """Return the statistics of a block without a gate: those of gates that are 0.5 everywhere, ``[B]`` in fp32.

    Args:
        outputs_BSC: gives rows, tokens and device.
        channels: of the residual stream.
        counted_BS: True on tokens included in the sums; None means all.
    """
    rows, length, _ = outputs_BSC.shape
    if counted_BS is None:
        count_B = torch.full((rows,), float(length * channels), device=outputs_BSC.device)
    else:
        count_B = counted_BS.sum(1).float() * channels
    return {"gate": 0.5 * count_B, "entropy": math.log(2.0) * count_B, "square": 0.25 * count_B}


class FusionGate(nn.Module):
    """``W_up tanh(W_down z)``: logits of the first branch's weight g in the mix, for every token and channel.

    The second branch's weight is 1 - g, so a layer has at most two branches. ``W_up`` starts at zero, and with it every
    gate at 0.5.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        self.up = nn.Linear(config.gate_rank, config.hidden_size, bias=False)

    def forward(self, z_BSC: Tensor, down_BSR: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, S, C]``; ``down [B, S, rank]`` is ``W_down z`` if it was computed already."""
        return self.up(torch.tanh(self.down(z_BSC) if down_BSR is None else down_BSR))
