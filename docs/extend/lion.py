"""Lion as a plugin: ``--plugin docs/extend/lion.py training.optimizer.name=lion`` (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusiontree.optim.config import OPTIMIZERS, OptimizerSettings, OptimizerSpec
from fusiontree.utils.settings import setting


class LionSettings(OptimizerSettings):
    """Settings of Lion."""

    beta1: float = setting(0.9, "Share of the momentum in the update, the rest is the gradient's.", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay of the momentum.", ge=0, lt=1)


class Lion(torch.optim.Optimizer):
    """Steps of equal size in the direction of the sign of momentum and gradient."""

    def __init__(self, groups: list[dict[str, Any]], settings: LionSettings) -> None:
        """Take torch's parameter groups; the engine sets ``lr`` before each step."""
        super().__init__(groups, {"lr": 0.0, "beta1": settings.beta1, "beta2": settings.beta2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad, group)

    def _change(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        direction = state["exp_avg"].lerp(gradient, 1 - group["beta1"]).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
        state["exp_avg"].lerp_(gradient, 1 - group["beta2"])
        state["step"] += 1


OPTIMIZERS.register("lion", OptimizerSpec(settings=LionSettings, build=Lion, states={"exp_avg": "float32"}))
