"""Floating point operations of the model, without recomputation and without extra work inside kernels.

A multiply-add counts as two. Per token, forward: two per parameter of a matrix product (head included, embedding
look-up not), ``4 heads head_dim`` per key that a query sees, ``7 d_inner d_state`` for the scan, ``2 width`` per
channel of the convolutions. Training costs three times the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusiontree.models.config import ModelConfig
from fusiontree.models.weight_layout import bc_proj_rows, in_proj_rows


def matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in matrix products: all matrices and the head, without the embedding look-up."""
    hidden = config.hidden_size
    total = config.vocab_size * hidden
    for letter in config.pattern:
        branches = 0
        if letter in "FM":
            branches += 1
            rows = sum(block.size for block in in_proj_rows(config) + bc_proj_rows(config))
            total += hidden * rows + config.d_inner * hidden
        if letter in "FA":
            branches += 1
            heads = 2 * config.num_heads + 2 * config.kv_heads  # q and o, k and v
            total += hidden * heads * config.attention_head_dim
        if config.use_alignment:
            total += (2 * branches + 1) * hidden * hidden
        total += 2 * hidden * config.gate_rank + hidden * hidden
        total += (3 if config.mlp_activation == "swiglu" else 2) * hidden * config.mlp_size
    return total


def visible_keys(length: int, window: int | None = None) -> int:
    """Return the number of (query, visible key) pairs in a document of ``length`` tokens."""
    reach = length if window is None else min(window, length)
    return length * reach - reach * (reach - 1) // 2


def forward_flops_per_token(config: ModelConfig, lengths: int | Sequence[int]) -> float:
    """Return the FLOPs of one token's forward, averaged over documents.

    Args:
        config: of the model.
        lengths: tokens of each document; an int for a single document.
    """
    lengths = [lengths] if isinstance(lengths, int) else list(lengths)
    tokens = sum(lengths)
    total = 2.0 * matrix_parameters(config)
    conv_channels = config.d_inner + sum(block.size for block in bc_proj_rows(config))
    for layer, letter in enumerate(config.pattern):
        if letter in "FM":
            total += 7 * config.d_inner * config.mamba.d_state + 2 * config.mamba.d_conv * conv_channels
        if letter in "FA":
            window = config.window_of_layer(layer)
            local = sum(visible_keys(length, window) for length in lengths) / tokens
            everything = sum(visible_keys(length) for length in lengths) / tokens
            pairs = config.local_heads * local + config.global_heads * everything
            total += 4 * config.attention_head_dim * pairs
    return total


def training_flops_per_token(config: ModelConfig, lengths: int | Sequence[int]) -> float:
    """Return the FLOPs of training on one token, forward and backward; see :func:`forward_flops_per_token`."""
    return 3.0 * forward_flops_per_token(config, lengths)
