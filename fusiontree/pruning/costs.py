"""What a layer costs: parameters, FLOPs, or bytes that decoding reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontree.models.block import FusionBlock
from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import matrix_parameters_by_layer
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.model import FusionTreeModel
from fusiontree.pruning.shapes import KeptLayer, pruned_config

MEASURES = ("parameters", "flops", "decode")
"""parameters: values of all weights. flops: of a forward pass per token. decode: bytes read per token of one text."""
_HALF = 2
"""Bytes of a weight, key or value when decoding."""


class Costs:
    """Costs of layers in one measure; layers of equal mixers and sizes are computed once."""

    def __init__(self, config: ModelConfig, measure: str, length: int) -> None:
        """Compute nothing yet.

        Args:
            config: of the source.
            measure: one of :data:`MEASURES`.
            length: tokens of a document (flops) or of the context (decode).
        """
        self.config, self.measure, self.length = config, measure, length
        self._known: dict[tuple[object, ...], float] = {}
        self.outside = self._outside()
        """Cost of embedding, head and final norm, which pruning does not change."""

    def total(self, plan: Sequence[KeptLayer]) -> float:
        """Return the cost of a model."""
        return self.outside + sum(self.of(kept) for kept in plan)

    def of(self, kept: KeptLayer) -> float:
        """Return the cost of a layer."""
        counts = tuple(len(units) for units in kept.units.values())
        key = (self.config.pattern[kept.layer], self.config.window_of_layer(kept.layer), kept.branches, counts)
        if key not in self._known:
            self._known[key] = self._of_config(pruned_config(self.config, [kept]))
        return self._known[key]

    def _of_config(self, config: ModelConfig) -> float:
        """Return the cost of the one layer of ``config``."""
        sized = config.of_layer(0)
        if self.measure == "flops":
            mixers = sum(mixer.flops(sized, 0, [self.length]) for mixer in layer_mixers(config, 0))
            return 2.0 * matrix_parameters_by_layer(config)[0] + mixers
        with torch.device("meta"):
            parameters = sum(p.numel() for p in FusionBlock(config, 0).parameters())
        if self.measure == "parameters":
            return parameters
        return _HALF * parameters + _cache_bytes(sized, config.branches[0], self.length)

    def _outside(self) -> float:
        head = self.config.vocab_size * self.config.hidden_size
        if self.measure == "flops":
            return 2.0 * head
        if self.measure == "decode":
            return _HALF * head
        with torch.device("meta"):
            model = FusionTreeModel(self.config)
        blocks = sum(p.numel() for p in model.layers.parameters())
        return sum(p.numel() for p in model.parameters()) - blocks


def _cache_bytes(config: ModelConfig, branches: Sequence[str], length: int) -> float:
    """Return the bytes of caches that one token reads (and, of states, writes) after ``length`` tokens."""
    total = 0.0
    if "attention" in branches:
        seen = config.local_kv_heads * min(config.window_of_layer(0), length) + config.global_kv_heads * length
        total += 2 * _HALF * config.attention_head_dim * seen
    if "mamba2" in branches:
        total += 2 * 4 * config.d_inner * config.mamba.d_state  # fp32, read and written
    return total
