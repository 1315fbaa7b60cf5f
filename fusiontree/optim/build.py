"""Construction of an optimizer with its states, and its step under a global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusiontree.ops.dispatch import triton_unavailable
from fusiontree.optim.config import OPTIMIZERS, OptimizerSettings, OptimizerSpec

States = dict[str, Tensor]
"""Values of the states of one tensor by name."""


class Leaf(NamedTuple):
    """A tensor that the optimizer changes."""

    tensor: Tensor
    decays: bool
    """True if weight decay applies."""
    states: States
    copy: Tensor | None = None
    """The values that the model computes with, where they are others: a fused step writes them, too."""


class FusedStep(Protocol):
    """A step that reads gradients in their own dtype and writes the copies of the leaves, in one pass over memory."""

    def prepare(self, gradients: Sequence[Tensor | None]) -> None:
        """Let a step with gradients at these addresses be recorded in a CUDA graph; call before the recording."""
        ...

    def __call__(self, gradients: Sequence[Tensor | None], divisor: Tensor, norm: Tensor) -> None:
        """Divide the gradients and apply them, as :func:`scaled_step`, at the ``lr`` of the optimizer.

        Args:
            gradients: of each leaf in order, contiguous and of any floating dtype; None counts as zeros.
            divisor: scalar on the device.
            norm: scalar on the device, of the whole gradient; where it is not finite, nothing changes.
        """
        ...


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


def fuses(device: torch.device) -> bool:
    """Return whether fused steps are faster on ``device`` than the optimizers' own, as Triton's kernels are on GPUs."""
    return triton_unavailable(device) is None


def fused_step(spec: OptimizerSpec, optimizer: torch.optim.Optimizer, leaves: Sequence[Leaf]) -> FusedStep | None:
    """Return the optimizer's fused step, or None where it has none or its own step is to be used.

    Args:
        spec: of the optimizer.
        optimizer: its states are filled.
        leaves: all of its tensors; they and their states and copies keep their memory.
    """
    if spec.fused is None or not leaves or not fuses(leaves[0].tensor.device):
        return None
    return spec.fused(optimizer, leaves)


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
