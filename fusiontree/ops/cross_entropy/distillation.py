"""Cross entropy together with the divergence from a teacher's distribution, by chunks of tokens.

Only one chunk's logits of student and teacher are in memory, and the backward pass recomputes them.

Shape legend: N tokens, n tokens of a chunk, H channels (h: of the teacher), V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.ops.cross_entropy.labels import rows_of_labels
from fusiontree.ops.elementwise import fused


class TeacherOutput(NamedTuple):
    """What the loss needs of a teacher; without gradients."""

    hidden: Tensor
    """Input of the teacher's head, ``[B, S, h]``."""
    weight_Vh: Tensor
    """The teacher's head: the rows that this rank holds of the student's head."""
    temperature: float
    """Divisor of both models' logits."""


def linear_distillation(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher: TeacherOutput,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    gather_parts: Callable[[Tensor], Tensor] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum cross entropy and divergence from the teacher over the tokens that have a label.

    The divergence is ``T² KL(softmax(teacher / T) || softmax(student / T))`` (Hinton et al. 2015, "Distilling the
    Knowledge in a Neural Network"); T² keeps the size of its gradient at any temperature.

    Args:
        hidden_NH: hidden states of the student.
        weight_VH: the student's head.
        teacher: hidden states of the same tokens, flattened to ``[N, h]``, head and temperature.
        labels_N: int64 labels; negative means the token has none.
        vocab_start: token id of the first row of both heads.
        gather_parts: as of :func:`fusiontree.ops.cross_entropy.linear_cross_entropy`.
        chunk_tokens: number of tokens per chunk of logits in memory; None means 4096 on GPUs, 1024 on CPUs.

    Returns:
        ``(loss_sum, z_sum, divergence_sum)``, fp32 scalars: cross entropy in nats, squared log-partition, divergence.
    """
    if chunk_tokens is None:
        chunk_tokens = 4096 if hidden_NH.is_cuda else 1024
    index_N, valid_N = rows_of_labels(labels_N, vocab_start, weight_VH.shape[0])
    return _Distilled.apply(
        hidden_NH,
        weight_VH,
        teacher.hidden.detach(),
        teacher.weight_Vh.detach(),
        index_N,
        valid_N,
        teacher.temperature,
        gather_parts,
        chunk_tokens,
    )


def _statistics(student_nV: Tensor, teacher_nV: Tensor, index_n: Tensor, temperature: float) -> Tensor:
    """Return of a chunk, in this shard of the vocabulary, ``[5, n]``.

    Log-partitions of the student, of the student and of the teacher at the temperature; the label's logit (0 if it is
    in another shard); the teacher's mean of the difference of its logits from the student's, at the temperature.
    """
    student_nV = student_nV.to(torch.promote_types(student_nV.dtype, torch.float32))
    target_n = student_nV.gather(-1, index_n.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(index_n < 0, 0.0)
    partition_n = student_nV.logsumexp(-1)
    student_nV = student_nV / temperature
    teacher_nV = teacher_nV.to(student_nV.dtype) / temperature
    teacher_partition_n = teacher_nV.logsumexp(-1)
    chance_nV = (teacher_nV - teacher_partition_n.unsqueeze(-1)).exp()
    apart_n = (chance_nV * (teacher_nV - student_nV)).sum(-1)
    return torch.stack([partition_n, student_nV.logsumexp(-1), teacher_partition_n, target_n, apart_n])


def _gradient(
    student_nV: Tensor,
    teacher_nV: Tensor,
    index_n: Tensor,
    valid_n: Tensor,
    partitions_3n: Tensor,
    grads_3: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of a chunk's logits of the student.

    d loss / d logit = p - [label]; d z / d logit = 2 logsumexp p; d divergence / d logit = T (p_T - teacher's p_T).
    """
    grad_loss, grad_z, grad_divergence = grads_3.unbind()
    partition_n, tempered_n, teacher_n = partitions_3n.unbind()
    logits_nV = student_nV.to(partition_n.dtype)
    factor_n = valid_n * (grad_loss + 2.0 * grad_z * partition_n)
    grad_nV = (logits_nV - partition_n.unsqueeze(-1)).exp() * factor_n.unsqueeze(-1)
    is_label_nV = torch.arange(logits_nV.shape[-1], device=logits_nV.device) == index_n.unsqueeze(-1)
    grad_nV = grad_nV - torch.where(is_label_nV, grad_loss, torch.zeros_like(grad_loss))
    chance_nV = (logits_nV / temperature - tempered_n.unsqueeze(-1)).exp()
    teacher_chance_nV = (teacher_nV.to(partition_n.dtype) / temperature - teacher_n.unsqueeze(-1)).exp()
    weight_n = valid_n * (grad_divergence * temperature)
    return (grad_nV + (chance_nV - teacher_chance_nV) * weight_n.unsqueeze(-1)).to(student_nV.dtype)


def _over_ranks(parts_R5N: Tensor) -> Tensor:
    """Return the statistics of the full vocabulary from those of every shard."""
    partition_R3N, target_RN, apart_RN = parts_R5N[:, :3], parts_R5N[:, 3], parts_R5N[:, 4]
    partition_3N = partition_R3N.logsumexp(0)
    share_RN = (partition_R3N[:, 2] - partition_3N[2]).exp()  # of the teacher's probability
    return torch.cat([partition_3N, torch.stack([target_RN.sum(0), (share_RN * apart_RN).sum(0)])])


class _Distilled(torch.autograd.Function):
    """Recomputes each chunk's logits in the backward pass, since the three sums may have different gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        teacher_Nh: Tensor,
        teacher_Vh: Tensor,
        index_N: Tensor,
        valid_N: Tensor,
        temperature: float,
        gather_parts: Callable[[Tensor], Tensor] | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = fused(_statistics, "auto", hidden_NH.device.type)
        chunks = []
        for begin in range(0, hidden_NH.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            student_nV, teacher_nV = hidden_NH[part] @ weight_VH.t(), teacher_Nh[part] @ teacher_Vh.t()
            chunks.append(statistics(student_nV, teacher_nV, index_N[part], temperature))
        found_5N = torch.cat(chunks, dim=1)
        if gather_parts is not None:
            found_5N = _over_ranks(gather_parts(found_5N))
        partition_N, tempered_N, teacher_N, target_N, apart_N = found_5N
        valid_N = valid_N.to(found_5N.dtype)
        ctx.save_for_backward(hidden_NH, weight_VH, teacher_Nh, teacher_Vh, index_N, valid_N, found_5N[:3].clone())
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        divergence_N = (apart_N - teacher_N + tempered_N) * (temperature * temperature)
        return (
            ((partition_N - target_N) * valid_N).sum(),
            (partition_N.square() * valid_N).sum(),
            (divergence_N * valid_N).sum(),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, teacher_Nh, teacher_Vh, index_N, valid_N, partitions_3N = ctx.saved_tensors
        gradient = fused(_gradient, "auto", hidden_NH.device.type)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grads_3 = torch.stack(grads).to(partitions_3N.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # Accumulate over chunks in fp32: hundreds of bf16 additions would lose small addends.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=partitions_3N.dtype) if wants_weight else None
        for begin in range(0, hidden_NH.shape[0], ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            hidden_nH = hidden_NH[part]
            grad_nV = gradient(
                hidden_nH @ weight_VH.t(),
                teacher_Nh[part] @ teacher_Vh.t(),
                index_N[part],
                valid_N[part],
                partitions_3N[:, part],
                grads_3,
                ctx.temperature,
            )
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_nV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += (grad_nV.t() @ hidden_nH).to(grad_weight_VH.dtype)
        grad_weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight, None, None, None, None, None, None, None
