"""Cross entropy by chunks of tokens: only one chunk's logits are in memory, and the backward pass recomputes them.

Shape legend: N tokens, n tokens of a chunk, H channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.cross_entropy.labels import rows_of_labels
from fusiontree.ops.elementwise import compiled, fused


def linear_cross_entropy_chunked(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    vocab_start: int = 0,
    gather_parts: Callable[[Tensor], Tensor] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.cross_entropy.linear_cross_entropy`."""
    if chunk_tokens is None:
        # Every chunk adds to the full fp32 weight gradient; on GPUs larger chunks reduce this memory traffic.
        chunk_tokens = 8192 if hidden_NH.is_cuda else 2048
    index_N, valid_N = rows_of_labels(labels_N, vocab_start, weight_VH.shape[0])
    return _Chunked.apply(hidden_NH, weight_VH, index_N, valid_N, gather_parts, chunk_tokens)


def _statistics(logits_nV: Tensor, index_n: Tensor) -> Tensor:
    """Return a chunk's log-partitions and label logits (0 if the label is not in this shard), ``[2, n]``."""
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    target_n = logits_nV.gather(-1, index_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.stack([logits_nV.logsumexp(-1), target_n.masked_fill(index_n < 0, 0.0)])


def _gradient(
    logits_nV: Tensor, index_n: Tensor, valid_n: Tensor, partition_n: Tensor, grad_loss: Tensor, grad_z: Tensor
) -> Tensor:
    """Return the gradient of a chunk's logits: d loss / d logit = p - [label]; d z / d logit = 2 logsumexp p."""
    factor_n = valid_n * (grad_loss + 2.0 * grad_z * partition_n)
    grad_nV = (logits_nV.to(partition_n.dtype) - partition_n.unsqueeze(-1)).exp_().mul_(factor_n.unsqueeze(-1))
    pull_n = (index_n >= 0) * -grad_loss
    grad_nV.scatter_add_(-1, index_n.clamp(min=0).unsqueeze(-1), pull_n.unsqueeze(-1))
    return grad_nV.to(logits_nV.dtype)


def _gradient_fused(
    logits_nV: Tensor, index_n: Tensor, valid_n: Tensor, partition_n: Tensor, grad_loss: Tensor, grad_z: Tensor
) -> Tensor:
    """Compute :func:`_gradient` for torch.compile: a fused kernel without scatter and without fp32 logits in memory."""
    factor_n1 = (valid_n * (grad_loss + 2.0 * grad_z * partition_n)).unsqueeze(-1)
    chance_nV = (logits_nV.to(partition_n.dtype) - partition_n.unsqueeze(-1)).exp()
    is_label_nV = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == index_n.unsqueeze(-1)
    pull_nV = torch.where(is_label_nV, grad_loss, torch.zeros_like(grad_loss))
    return (chance_nV * factor_n1 - pull_nV).to(logits_nV.dtype)


class _Chunked(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass, since the two sums may have different gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        index_N: Tensor,
        valid_N: Tensor,
        gather_parts: Callable[[Tensor], Tensor] | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        compute = torch.promote_types(hidden_NH.dtype, torch.float32)
        statistics = fused(_statistics, "auto", hidden_NH.device.type)
        chunks = []
        for begin in range(0, hidden_NH.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            chunks.append(statistics(hidden_NH[part] @ weight_VH.t(), index_N[part]))
        partition_N, target_N = torch.cat(chunks, dim=1)
        if gather_parts is not None:
            partition_RN, target_RN = gather_parts(torch.stack([partition_N, target_N])).unbind(1)
            partition_N, target_N = partition_RN.logsumexp(0), target_RN.sum(0)
        valid_N = valid_N.to(compute)
        ctx.save_for_backward(hidden_NH, weight_VH, index_N, valid_N, partition_N)
        ctx.chunk_tokens = chunk_tokens
        return ((partition_N - target_N) * valid_N).sum(), (partition_N.square() * valid_N).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, grad_z = grads
        hidden_NH, weight_VH, index_N, valid_N, partition_N = ctx.saved_tensors
        gradient = compiled(_gradient_fused) if hidden_NH.is_cuda else _gradient
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # Accumulate over chunks in fp32: hundreds of bf16 additions would lose small addends.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=partition_N.dtype) if wants_weight else None
        for begin in range(0, hidden_NH.shape[0], ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            hidden_nH = hidden_NH[part]
            grad_nV = gradient(
                hidden_nH @ weight_VH.t(), index_N[part], valid_N[part], partition_N[part], grad_loss, grad_z
            )
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_nV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += (grad_nV.t() @ hidden_nH).to(partition_N.dtype)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None, None, None
