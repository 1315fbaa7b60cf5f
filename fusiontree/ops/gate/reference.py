"""Gate mix and sums of gate statistics in plain PyTorch. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GivenBranches = Literal["both", "first", "second"]
"""The branches of a layer: both, or only the first or the second."""


def mix(logits_BSC: Tensor, branches_BSC: Tensor, given: GivenBranches) -> Tensor:
    """Return g first + (1 - g) second with g = sigmoid(logits); a missing branch counts as zeros."""
    gate = torch.sigmoid(logits_BSC)
    if given == "both":
        first_BSC, second_BSC = branches_BSC.chunk(2, dim=-1)
        return torch.lerp(second_BSC, first_BSC, gate)
    return branches_BSC * (gate if given == "first" else 1 - gate)


def sums(logits_BSC: Tensor, counted_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of g, of its binary entropy and of g² over each row's counted tokens and all channels.

    The entropy is ``softplus(l) - l g``, which is exact where g rounds to 0 or 1.
    """
    logits, gate = _logits_and_gate(logits_BSC)
    weight = 1.0 if counted_BS is None else counted_BS.unsqueeze(-1).to(gate.dtype)
    return (
        (gate * weight).sum((1, 2)),
        ((F.softplus(logits) - logits * gate) * weight).sum((1, 2)),
        (gate.square() * weight).sum((1, 2)),
    )


def mix_and_sums(
    logits_BSC: Tensor, branches_BSC: Tensor, counted_BS: Tensor | None, given: GivenBranches
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`mix` and :func:`sums`."""
    return mix(logits_BSC, branches_BSC, given), *sums(logits_BSC, counted_BS)


def gradients(
    logits_BSC: Tensor,
    branches_BSC: Tensor,
    counted_BS: Tensor | None,
    grads: tuple[Tensor, ...],
    given: GivenBranches,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits and branches from ``grads``, those of the results of :func:`mix_and_sums`."""
    gate_grad, entropy_grad, square_grad = (g[:, None, None] for g in grads[1:])
    logits, gate = _logits_and_gate(logits_BSC)
    d_mixed = grads[0].to(gate.dtype)
    # d softplus(l) - l g = -l dg, and dg = g (1 - g) dl.
    dgate = gate_grad + 2 * gate * square_grad - logits * entropy_grad
    if counted_BS is not None:
        dgate = dgate * counted_BS.unsqueeze(-1)
    if given == "both":
        first_BSC, second_BSC = branches_BSC.chunk(2, dim=-1)
        dgate = dgate + d_mixed * (first_BSC.to(gate.dtype) - second_BSC.to(gate.dtype))
        branches_grad = torch.cat(
            [(d_mixed * gate).to(branches_BSC.dtype), (d_mixed * (1 - gate)).to(first_BSC.dtype)], -1
        )
    else:
        sign, share = (1.0, gate) if given == "first" else (-1.0, 1 - gate)
        dgate = dgate + sign * d_mixed * branches_BSC.to(gate.dtype)
        branches_grad = (d_mixed * share).to(branches_BSC.dtype)
    return (gate * (1 - gate) * dgate).to(logits_BSC.dtype), branches_grad


def _logits_and_gate(logits_BSC: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits_BSC.to(torch.promote_types(logits_BSC.dtype, torch.float32))
    return logits, torch.sigmoid(logits)
