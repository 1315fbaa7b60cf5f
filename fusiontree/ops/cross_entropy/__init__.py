"""Cross entropy of a linear head over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fusiontree.ops.cross_entropy.chunked import linear_cross_entropy_chunked
from fusiontree.ops.cross_entropy.distillation import TeacherOutput, linear_distillation
from fusiontree.ops.cross_entropy.reference import linear_cross_entropy_reference
from fusiontree.ops.cross_entropy.scores import TokenScores, linear_token_scores
from fusiontree.ops.dispatch import Backend, Operation, anywhere

__all__ = [
    "CROSS_ENTROPY",
    "TeacherOutput",
    "TokenScores",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_token_scores",
]

GatherParts = Callable[[Tensor], Tensor]

CROSS_ENTROPY = Operation(
    "cross_entropy",
    [
        Backend("chunked", lambda: linear_cross_entropy_chunked, anywhere),
        Backend("reference", lambda: linear_cross_entropy_reference, anywhere),
    ],
)


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    gather_parts: GatherParts | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy of ``hidden @ weight.T`` over the tokens that have a label.

    Args:
        hidden_NH: hidden states of N tokens.
        weight_VH: the head, one row for each of V tokens of the vocabulary.
        labels_N: int64 labels; negative means the token has none.
        vocab_start: token id of the first row of ``weight_VH``.
        gather_parts: set if ranks hold shards of the vocabulary: a collective that stacks a tensor of each rank,
            ``[…]`` to ``[R, …]``. The sums are then over the full vocabulary and equal on all ranks; the gradient of
            ``hidden_NH`` contains only this rank's addend.
        chunk_tokens: number of tokens per chunk of logits in memory (chunked backend); None means 8192 on GPUs, 2048
            on CPUs.
        backend: a name of :data:`CROSS_ENTROPY` or "auto".

    Returns:
        ``(loss_sum, z_sum)``, fp32 scalars: the summed cross entropy in nats, and the summed squared log-partition,
        both over tokens with a label.
    """
    compute = CROSS_ENTROPY.choose(backend, hidden_NH.device.type)
    return compute(hidden_NH, weight_VH, labels_N, vocab_start, gather_parts, chunk_tokens)
