"""Tensor parallel plan: parameters with heads or vocabulary are split, token-wise modules are not.

A block's norms, alignment, gate, output projection and MLP process only the local tokens (sequence parallel), so tp
does not split them: the engine shards them over all ranks and sums their gradients. A mixer's own plan
(:meth:`Mixer.tp_plan`) splits all its parameters.
"""

from __future__ import annotations

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import mixer_of
from fusiontree.models.mixers.split import Block, Split, column
from fusiontree.parallel.global_tensor import ShardSpec


def split_of(name: str, config: ModelConfig) -> Split | None:
    """Return the split of a parameter, or None if tensor parallelism does not split it."""
    if name in ("embed.weight", "head.weight"):
        return column(Block("vocabulary", config.vocab_size, config.vocab_size))
    owner = mixer_of(name, config)
    return owner[0].tp_plan(config).get(owner[1]) if owner else None


def shard_spec(split: Split, shape: tuple[int, ...], rank: int, ranks: int) -> ShardSpec:
    """Return the shard of a parameter of ``shape`` that the rank holds; a replicated parameter if units are too few."""
    return ShardSpec(shape, split.axis, split.ranges(rank, ranks)) if split.is_owned(ranks) else ShardSpec(shape)
