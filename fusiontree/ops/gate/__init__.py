"""Mix of two branches by a gate, and sums of gate statistics. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.elementwise import with_kernel
from fusiontree.ops.gate import reference
from fusiontree.ops.gate.reference import GivenBranches
from fusiontree.ops.recompute import mark_recomputable

__all__ = ["GivenBranches", "gate_mix"]

_KERNELS = "fusiontree.ops.gate.triton"
MIX = with_kernel("gate mix, again", reference.mix, f"{_KERNELS}:mix")
MIX_AND_SUMS = with_kernel("gate mix", reference.mix_and_sums, f"{_KERNELS}:mix_and_sums")
GRADIENTS = with_kernel("gate mix, backward", reference.gradients, f"{_KERNELS}:gradients")


def gate_mix(
    logits_BSC: Tensor,
    branches_BSC: Tensor,
    counted_BS: Tensor | None = None,
    *,
    given: GivenBranches = "both",
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mix the branches by ``g = sigmoid(logits)`` and sum statistics of the gates.

    Only logits and branches are saved for the backward pass, which reads and writes each value once.

    Args:
        logits_BSC: the gate's logits; g is the weight of the first branch.
        branches_BSC: the branches' concatenated outputs: ``[B, S, 2C]`` for both, ``[B, S, C]`` for one.
        counted_BS: True on tokens included in the sums; None means all.
        given: the branches that ``branches_BSC`` holds; a missing branch counts as zeros.
        backend: a name of :data:`MIX_AND_SUMS` or "auto".

    Returns:
        ``g first + (1 - g) second`` in the branches' dtype, and the sums of g, of its binary entropy (nats) and of g²
        over each row's counted tokens and all channels, [B] in fp32 or better.
    """
    mixed_BSC, *sums = _GateMix.apply(logits_BSC, branches_BSC, counted_BS, given, backend)
    mark_recomputable(mixed_BSC, partial(_mixed, given=given, backend=backend), logits_BSC, branches_BSC)
    return mixed_BSC, (sums[0], sums[1], sums[2])


def _mixed(logits_BSC: Tensor, branches_BSC: Tensor, given: GivenBranches, backend: str) -> Tensor:
    return MIX.choose(backend, logits_BSC.device.type)(logits_BSC, branches_BSC, given)


class _GateMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BSC: Tensor,
        branches_BSC: Tensor,
        counted_BS: Tensor | None,
        given: GivenBranches,
        backend: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits_BSC, branches_BSC, counted_BS)
        ctx.given, ctx.backend = given, backend
        compute = MIX_AND_SUMS.choose(backend, logits_BSC.device.type)
        return compute(logits_BSC, branches_BSC, counted_BS, given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSC, branches_BSC, counted_BS = ctx.saved_tensors
        compute = GRADIENTS.choose(ctx.backend, logits_BSC.device.type)
        return *compute(logits_BSC, branches_BSC, counted_BS, grads, ctx.given), None, None, None
