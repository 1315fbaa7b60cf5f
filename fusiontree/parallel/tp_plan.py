"""Tensor parallel plan: parameters with heads or vocabulary are split, token-wise modules are not.

A block's norms, alignment, gate, output projection and MLP process only the local tokens (sequence parallel), so tp
does not split them: the engine shards them over all ranks and sums their gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusiontree.models import weight_layout
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.tp_split import Split, UnitBlock, column, row


def _state_space_heads(config: ModelConfig) -> list[UnitBlock]:
    return [UnitBlock(config.mamba_heads, config.mamba_heads)]


def _in_proj(config: ModelConfig) -> list[UnitBlock]:
    return [UnitBlock(block.size, config.mamba_heads) for block in weight_layout.in_proj_rows(config)]


def _channels(config: ModelConfig) -> list[UnitBlock]:
    return [UnitBlock(config.d_inner, config.mamba_heads)]


def _groups(config: ModelConfig) -> list[UnitBlock]:
    return [UnitBlock(block.size, config.mamba.n_groups) for block in weight_layout.bc_proj_rows(config)]


def _heads(blocks: Sequence[weight_layout.Block], config: ModelConfig) -> list[UnitBlock]:
    # If the model has no heads of a kind, the block of that kind has size 0.
    return [UnitBlock(b.size, b.size // config.attention_head_dim) for b in blocks if b.size]


def _query_heads(config: ModelConfig) -> list[UnitBlock]:
    return _heads(weight_layout.q_proj_rows(config), config)


def _kv_heads(config: ModelConfig) -> list[UnitBlock]:
    return _heads(weight_layout.kv_proj_rows(config), config)


def _vocabulary(config: ModelConfig) -> list[UnitBlock]:
    return [UnitBlock(config.vocab_size, config.vocab_size)]


PLAN: list[tuple[str, Split]] = [
    (r"embed\.weight", column(_vocabulary)),
    (r"head\.weight", column(_vocabulary)),
    (r"layers\.\d+\.mamba\.in_proj\.weight", column(_in_proj)),
    (r"layers\.\d+\.mamba\.bc_proj\.weight", column(_groups)),
    (r"layers\.\d+\.mamba\.conv_x\.(weight|bias)", column(_channels)),
    (r"layers\.\d+\.mamba\.conv_bc\.(weight|bias)", column(_groups)),
    (r"layers\.\d+\.mamba\.ssm\.(A_log|D|dt_bias)", column(_state_space_heads)),
    (r"layers\.\d+\.mamba\.norm\.weight", column(_channels)),
    (r"layers\.\d+\.mamba\.out_proj\.weight", row(_channels)),
    (r"layers\.\d+\.attention\.q_proj\.weight", column(_query_heads)),
    (r"layers\.\d+\.attention\.[kv]_proj\.weight", column(_kv_heads)),
    (r"layers\.\d+\.attention\.o_proj\.weight", row(_query_heads)),
]
"""Regular expression for a parameter's full name, and its split. Parameters that match none are not split."""


def split_of(name: str) -> Split | None:
    """Return the split of a parameter, or None if tensor parallelism does not split it."""
    return next((split for pattern, split in PLAN if re.fullmatch(pattern, name)), None)
