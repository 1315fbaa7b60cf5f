"""Order and sizes of the blocks in each packed projection.

The forward, the parallel plan and the checkpoint converters all use these definitions. Either all blocks of a
projection are split over heads or none is, so a parallel plan can shard each block separately.
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
    """Return the outputs of ``mamba.in_proj``: the gate z, the scan's input x, one step size dt per head."""
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
    """Return the outputs of ``attention.k_proj`` and ``v_proj``: local key/value heads, then global key/value heads."""
    width = config.attention_head_dim
    return [Block("local", config.local_kv_heads * width), Block("global", config.global_kv_heads * width)]


def in_proj_sizes(rows: int, head_dim: int) -> list[int]:
    """Return how many of ``rows`` outputs of ``in_proj`` are z, x and dt, for any number of heads."""
    heads = rows // (2 * head_dim + 1)
    return [heads * head_dim, heads * head_dim, heads]


def split_in_proj(zxdt: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of ``in_proj``, for any number of heads, into ``z_BSC``, ``x_BSC`` and ``dt_BSH``."""
    z_BSC, x_BSC, dt_BSH = zxdt.split(in_proj_sizes(zxdt.shape[-1], head_dim), dim=-1)
    return z_BSC, x_BSC, dt_BSH


def split_bc_proj(bc: Tensor, d_state: int) -> tuple[Tensor, Tensor]:
    """Split the output of ``bc_proj``, for any number of groups, into ``B_BSGN`` and ``C_BSGN``."""
    B_BSC, C_BSC = bc.chunk(2, dim=-1)
    return B_BSC.unflatten(-1, (-1, d_state)), C_BSC.unflatten(-1, (-1, d_state))
