"""Floating point operations of the model, without recomputation and without extra work inside kernels.

A multiply-add counts as two. Per token, forward: two per parameter of a matrix product (head included, embedding
look-up not), and what each mixer adds (:meth:`Mixer.flops`). Training costs three times the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import all_mixers, layer_mixers


def matrix_parameters(config: ModelConfig) -> int:
    """Return the number of parameters in matrix products: all matrices and the head, without the embedding look-up."""
    return config.vocab_size * config.hidden_size + sum(matrix_parameters_by_layer(config))


def matrix_parameters_by_layer(config: ModelConfig) -> list[int]:
    """Return the number of parameters in the matrix products of each layer."""
    totals = {letter: _matrix_parameters(config.of_letter(letter), layer) for letter, layer in config.kinds().items()}
    return [totals[letter] for letter in config.pattern]


def _matrix_parameters(config: ModelConfig, layer: int) -> int:
    """Return the number of parameters in the matrix products of a layer, whose sizes ``config`` has."""
    hidden, mixers = config.hidden_size, layer_mixers(config, layer)
    gate = 2 * hidden * config.gate_rank if config.has_gate else 0
    mlp = (3 if config.mlp_activation == "swiglu" else 2) * hidden * config.mlp_size
    alignment = (2 * len(mixers) + 1) * hidden * hidden if config.use_alignment else 0
    projection = config.projects_mix * (len(mixers) if config.branch_mix == "concat" else 1) * hidden * hidden
    return gate + mlp + alignment + projection + sum(mixer.matrix_parameters(config) for mixer in mixers)


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
    mixers = sum(mixer.flops(config.of_layer(layer), layer, lengths) for layer, mixer in all_mixers(config))
    return 2.0 * matrix_parameters(config) + mixers


def training_flops_per_token(config: ModelConfig, lengths: int | Sequence[int]) -> float:
    """Return the FLOPs of training on one token, forward and backward; see :func:`forward_flops_per_token`."""
    return 3.0 * forward_flops_per_token(config, lengths)
