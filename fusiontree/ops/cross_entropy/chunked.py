"""Logits of a few tokens at a time, computed again in the backward pass; all of them never exist together.

Shape legend: N tokens, n tokens of a chunk, H channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_cross_entropy_chunked(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, chunk_tokens: int = 2048
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.cross_entropy.linear_cross_entropy`."""
    return _Chunked.apply(hidden_NH, weight_VH, labels_N, chunk_tokens)


class _Chunked(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass, since both sums may carry their own gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        compute = torch.promote_types(hidden_NH.dtype, torch.float32)
        loss_sum = hidden_NH.new_zeros((), dtype=compute)
        z_sum = hidden_NH.new_zeros((), dtype=compute)
        partitions = []
        for begin in range(0, hidden_NH.shape[0], chunk_tokens):
            labels_n = labels_N[begin : begin + chunk_tokens]
            logits_nV = (hidden_NH[begin : begin + chunk_tokens] @ weight_VH.t()).to(compute)
            valid_n = labels_n >= 0
            partition_n = logits_nV.logsumexp(-1)
            target_n = logits_nV.gather(-1, labels_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            loss_sum += ((partition_n - target_n) * valid_n).sum()
            z_sum += (partition_n.square() * valid_n).sum()
            partitions.append(partition_n)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, torch.cat(partitions))
        ctx.chunk_tokens = chunk_tokens
        return loss_sum, z_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, grad_z = grads
        hidden_NH, weight_VH, labels_N, partition_N = ctx.saved_tensors
        compute = partition_N.dtype
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # fp32 over the chunks: hundreds of bf16 additions would lose the small ones.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=compute) if wants_weight else None
        for begin in range(0, hidden_NH.shape[0], ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            hidden_nH, labels_n, partition_n = hidden_NH[part], labels_N[part], partition_N[part]
            valid_n = (labels_n >= 0).to(compute)
            logits_nV = (hidden_nH @ weight_VH.t()).to(compute)
            # d loss / d logit = p - [label]; d z / d logit = 2 logsumexp p.
            factor_n = valid_n * (grad_loss + 2.0 * grad_z * partition_n)
            grad_nV = (logits_nV - partition_n.unsqueeze(-1)).exp_().mul_(factor_n.unsqueeze(-1))
            grad_nV.scatter_add_(-1, labels_n.clamp(min=0).unsqueeze(-1), -(valid_n * grad_loss).unsqueeze(-1))
            grad_low_nV = grad_nV.to(hidden_NH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_low_nV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += (grad_low_nV.t() @ hidden_nH).to(compute)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None
