"""What training asks of an engine. Training never asks which engine it has.

Contract: the loss given to ``backward`` is this rank's share (local token sum over the global count of valid tokens);
gradients are summed, not averaged, over the ranks; reduction and accumulation are fp32; clipping uses the true
global norm; a step whose gradient is not finite changes nothing and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and clipping, as ``training`` configures them."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step."""

    grad_norm: float
    """Global norm before clipping, of the unscaled gradient."""
    skipped: str | None = None
    """Why the step changed nothing, or None."""


class Engine(Protocol):
    """Executes a training step on this process's part of the model."""

    module: nn.Module
    """The model to call; its forward runs all collectives it needs."""
    device: torch.device

    @property
    def dp_rank(self) -> int:
        """Which part of every global batch this rank reads."""
        ...

    @property
    def dp_size(self) -> int:
        """Number of parts of a global batch."""
        ...

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that hold different tokens."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` marks the final micro batch of the step."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Reduce, clip and apply the gradient, then clear it."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors of the training state under layout-free names: ``model.*``, ``optimizer.exp_avg.*`` …"""
        ...

    def state_values(self) -> dict[str, Any]:
        """Small JSON-able state: the optimizer's step count, the loss scale."""
        ...

    def load_state_values(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_values`; the tensors were filled in place before."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...
