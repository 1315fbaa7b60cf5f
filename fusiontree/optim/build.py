"""Construction of an optimizer with its states, and its step under a global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.optim.config import OPTIMIZERS, OptimizerSettings, OptimizerSpec

States = dict[str, Tensor]
"""Values of the states of one tensor by name."""


class Leaf(NamedTuple):
    """A tensor that the optimizer changes."""

    tensor: Tensor
    decays: bool
    """True if weight decay applies."""
    states: States


def new_states(spec: OptimizerSpec, tensor: Tensor) -> States:
    """Return zeros for each state of ``tensor``, of its shape and on its device."""
    return {
        name: torch.zeros_like(tensor, dtype=getattr(torch, dtype), requires_grad=False)
        for name, dtype in spec.states.items()
    }


def parameter_groups(decayed: Iterable[Tensor], plain: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return torch's parameter groups: tensors with weight decay first, then the others; empty groups are left out."""
    groups = [{"params": list(decayed), "weight_decay": weight_decay}, {"params": list(plain), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that ``settings`` names over ``groups``; its states are not yet filled."""
    return OPTIMIZERS.get(settings.name).build(groups, settings)


def fill_states(optimizer: torch.optim.Optimizer, tensor: Tensor, states: States) -> None:
    """Make ``states`` the optimizer's of ``tensor``.

    Optimizers create states in the first step; a checkpoint is loaded before it.
    """
    step = torch.zeros((), dtype=torch.float32, device=tensor.device)
    optimizer.state[tensor] = {"step": step, **states}


def scaled_step(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, divisor: Tensor, norm: Tensor) -> None:
    """Divide the gradients and apply them; a non-finite norm changes nothing.

    Args:
        optimizer: its tensors have their gradients.
        spec: says whether the optimizer divides and skips by itself, which needs no wait for the device.
        divisor: scalar on the device.
        norm: scalar on the device, of the whole gradient.
    """
    if spec.scales_gradients:
        scaling: Any = optimizer
        scaling.grad_scale = divisor.float()
        scaling.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        return
    if not bool(norm.isfinite()):
        return
    gradients = [tensor.grad for group in optimizer.param_groups for tensor in group["params"]]
    if held := [gradient for gradient in gradients if gradient is not None]:
        torch._foreach_div_(held, divisor.float())
    optimizer.step()
