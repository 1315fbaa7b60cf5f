"""AdamW's fused step over the leaves of ``torch.optim.AdamW``, which owns the states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusiontree.ops.adamw import Constants, Parts, adamw
from fusiontree.optim.build import Leaf


class FusedAdamW:
    """A :class:`~fusiontree.optim.build.FusedStep`."""

    def __init__(self, optimizer: torch.optim.Optimizer, leaves: Sequence[Leaf]) -> None:
        """Take the states and settings of ``optimizer``, of which ``leaves`` are all tensors."""
        self._optimizer = optimizer
        decays = {tensor: group["weight_decay"] for group in optimizer.param_groups for tensor in group["params"]}
        parts = []
        for leaf in leaves:
            state = optimizer.state[leaf.tensor]
            values = leaf.tensor.detach()
            moments = state["exp_avg"], state["exp_avg_sq"]
            parts.append(Parts(values, *moments, state["step"], decays[leaf.tensor], leaf.copy))
        settings = optimizer.param_groups[0]
        beta1, beta2 = settings["betas"]
        self._update = adamw(parts, Constants(beta1, beta2, settings["eps"]))

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Let a step with gradients at these addresses be recorded in a CUDA graph."""
        self._update.prepare(gradients)

    def __call__(self, gradients: Sequence[Tensor | None], divisor: Tensor, norm: Tensor) -> None:
        """Do :meth:`FusedStep.__call__`."""
        rate = torch.as_tensor(self._optimizer.param_groups[0]["lr"], dtype=torch.float32, device=norm.device)
        self._update(gradients, rate, divisor, norm)
