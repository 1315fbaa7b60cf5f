"""Logits of a few tokens at a time, computed again in the backward pass; all of them never exist together.

Shape legend: N tokens, n tokens of a chunk, H channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.elementwise import compiled, fused


def linear_cross_entropy_chunked(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.cross_entropy.linear_cross_entropy`."""
    if chunk_tokens is None:
        # Every chunk adds to the weight's whole gradient in fp32; on GPUs larger chunks spare that traffic.
        chunk_tokens = 8192 if hidden_NH.is_cuda else 2048
    return _Chunked.apply(hidden_NH, weight_VH, labels_N, chunk_tokens)


def _sums(logits_nV: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's loss sum, z sum and log-partitions."""
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    valid_n = labels_n >= 0
    partition_n = logits_nV.logsumexp(-1)
    target_n = logits_nV.gather(-1, labels_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((partition_n - target_n) * valid_n).sum(), (partition_n.square() * valid_n).sum(), partition_n


def _gradient(logits_nV: Tensor, labels_n: Tensor, partition_n: Tensor, grad_loss: Tensor, grad_z: Tensor) -> Tensor:
    """Return the gradient of a chunk's logits: d loss / d logit = p - [label]; d z / d logit = 2 logsumexp p."""
    valid_n = (labels_n >= 0).to(partition_n.dtype)
    factor_n = valid_n * (grad_loss + 2.0 * grad_z * partition_n)
    grad_nV = (logits_nV.to(partition_n.dtype) - partition_n.unsqueeze(-1)).exp_().mul_(factor_n.unsqueeze(-1))
    grad_nV.scatter_add_(-1, labels_n.clamp(min=0).unsqueeze(-1), -(valid_n * grad_loss).unsqueeze(-1))
    return grad_nV.to(logits_nV.dtype)


def _gradient_fused(
    logits_nV: Tensor, labels_n: Tensor, partition_n: Tensor, grad_loss: Tensor, grad_z: Tensor
) -> Tensor:
    """The same as one pass for torch.compile: a comparison in the place of the scatter, no fp32 logits in memory."""
    valid_n1 = (labels_n >= 0).to(partition_n.dtype).unsqueeze(-1)
    chance_nV = (logits_nV.to(partition_n.dtype) - partition_n.unsqueeze(-1)).exp()
    is_label_nV = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == labels_n.unsqueeze(-1)
    pull_nV = torch.where(is_label_nV, grad_loss, torch.zeros_like(grad_loss))
    grad_nV = valid_n1 * (chance_nV * (grad_loss + 2.0 * grad_z * partition_n.unsqueeze(-1)) - pull_nV)
    return grad_nV.to(logits_nV.dtype)


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
        sums = fused(_sums, "auto", hidden_NH.device.type)
        for begin in range(0, hidden_NH.shape[0], chunk_tokens):
            labels_n = labels_N[begin : begin + chunk_tokens]
            logits_nV = hidden_NH[begin : begin + chunk_tokens] @ weight_VH.t()
            loss, z, partition_n = sums(logits_nV, labels_n)
            loss_sum += loss
            z_sum += z
            partitions.append(partition_n)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, torch.cat(partitions))
        ctx.chunk_tokens = chunk_tokens
        return loss_sum, z_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, grad_z = grads
        hidden_NH, weight_VH, labels_N, partition_N = ctx.saved_tensors
        compute = partition_N.dtype
        gradient = compiled(_gradient_fused) if hidden_NH.is_cuda else _gradient
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # fp32 over the chunks: hundreds of bf16 additions would lose the small ones.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=compute) if wants_weight else None
        for begin in range(0, hidden_NH.shape[0], ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            hidden_nH = hidden_NH[part]
            grad_low_nV = gradient(hidden_nH @ weight_VH.t(), labels_N[part], partition_N[part], grad_loss, grad_z)
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_low_nV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += (grad_low_nV.t() @ hidden_nH).to(compute)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None
