"""Order and sizes of the blocks that share one projection: the one place where it is written down.

The forward, the parallel plan and the checkpoint converters all read it from here. Blocks of a projection are either
all split over heads or all whole, so a parallel plan can shard each block by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusiontree.models.config import ModelConfig


class Block(NamedTuple):
    """Consecutive rows (outputs) or columns (inputs) of one projection's weight."""

    name: str
    size: int


def in_proj_rows(config: ModelConfig) -> list[Block]:
    """Return the outputs of ``mamba.in_proj``: the gate z, the scan's input x, one step size dt a head."""
    return [Block("z", config.d_inner), Block("x", config.d_inner), Block("dt", config.mamba_heads)]


def bc_proj_rows(config: ModelConfig) -> list[Block]:
    """Return the outputs of ``mamba.bc_proj``: B and C of all groups."""
    size = config.mamba.n_groups * config.mamba.d_state
    return [Block("B", size), Block("C", size)]


def o_proj_columns(config: ModelConfig) -> list[Block]:
    """Return the inputs of ``attention.o_proj``: channels of the local heads, then of the global heads."""
    width = config.attention_head_dim
    return [Block("local", config.local_heads * width), Block("global", config.global_heads * width)]


def q_proj_rows(config: ModelConfig) -> list[Block]:
    """Return the outputs of ``attention.q_proj``: local heads first, as in :func:`o_proj_columns`."""
    return o_proj_columns(config)


def kv_proj_rows(config: ModelConfig) -> list[Block]:
    """Return the outputs of ``attention.k_proj`` and ``v_proj``: key/value heads of local, then of global heads."""
    width = config.attention_head_dim
    return [Block("local", config.local_kv_heads * width), Block("global", config.global_kv_heads * width)]


def in_proj_sizes(rows: int, head_dim: int) -> list[int]:
    """Return how many of ``rows`` outputs of ``in_proj`` (of however many heads) are z, x and dt."""
    heads = rows // (2 * head_dim + 1)
    return [heads * head_dim, heads * head_dim, heads]


def split_in_proj(zxdt: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of ``in_proj`` (however many heads it holds) into ``z_BSC``, ``x_BSC`` and ``dt_BSH``."""
    z_BSC, x_BSC, dt_BSH = zxdt.split(in_proj_sizes(zxdt.shape[-1], head_dim), dim=-1)
    return z_BSC, x_BSC, dt_BSH


def split_bc_proj(bc: Tensor, d_state: int) -> tuple[Tensor, Tensor]:
    """Split the output of ``bc_proj`` (however many groups it holds) into ``B_BSGN`` and ``C_BSGN``."""
    B_BSC, C_BSC = bc.chunk(2, dim=-1)
    return B_BSC.unflatten(-1, (-1, d_state)), C_BSC.unflatten(-1, (-1, d_state))
