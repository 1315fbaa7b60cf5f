"""What a teacher (``training.teacher``) adds to a step: memory, time on the device and traffic."""

from __future__ import annotations

from typing import NamedTuple

from fusiontree.engines.config import Sizes, Transfer
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import all_mixers
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.recompute_mix import MATRIX_FLOPS, seconds_by_layer


class TeacherCost(NamedTuple):
    """Costs of one rank."""

    nbytes: float
    """Frozen parameters, gathered blocks and head, and hidden states of a micro-batch."""
    seconds_per_token: float
    """Time of its matrix products and mixers and of both heads' further products per token, tp = 1."""
    transfers: list[Transfer]
    """Collectives of one step."""


def teacher_cost(
    teacher: ModelConfig, student: ModelConfig, sizes: Sizes, parallel: ParallelConfig, length: int, tokens: float
) -> TeacherCost:
    """Return what a teacher adds.

    Its forward pass is over before the student's begins and keeps nothing but hidden states: the activations inside it
    are smaller than those of the student's passes.

    Args:
        teacher: its model.
        student: the trained model.
        sizes: of the teacher's parameters; ``shard`` is all of ``on_rank`` where the engine replicates parameters.
        parallel: the ``parallel`` section.
        length: tokens of a row.
        tokens: of a micro-batch on one rank.
    """
    tp, cp, half = parallel.tp, parallel.cp, sizes.element
    vocabulary, hidden = teacher.vocab_size, teacher.hidden_size
    sharded = sizes.shard < sizes.on_rank
    held = half * sizes.shard
    if sharded:  # two blocks at work, and the head until the backward pass ends
        held += half * (2.0 * sizes.block + vocabulary * hidden / tp)
    held += half * tokens * hidden * (1 + 1 / tp if tp > 1 else 1)  # of the rank, and gathered for the head
    # A forward is a third of forward and backward. The loss computes the teacher's logits twice, and the student's once
    # more than without a teacher.
    layers = sum(its.kept + its.repeated for its in seconds_by_layer(teacher, length)) / 3
    heads = 2.0 * vocabulary * (2 * hidden + student.hidden_size) / MATRIX_FLOPS
    transfers = [Transfer(half * sizes.passes * sizes.on_rank, sizes.shard_ranks, sizes.shard_ranks)] if sharded else []
    if tp > 1:
        branches = sum(len(names) for names in teacher.branches)
        blocks = sizes.passes * tokens * (teacher.num_layers + branches + 1) * hidden * half
        transfers.append(Transfer(blocks, tp, tp))
    if cp > 1:
        exchanged = sum(
            mixer.exchanged_bytes(teacher.of_layer(layer), layer, tokens, cp, tp, half)
            for layer, mixer in all_mixers(teacher)
        )
        transfers.append(Transfer(sizes.passes * exchanged * cp / (cp - 1), cp, tp * cp))
    return TeacherCost(held, layers + heads, transfers)
