"""A tiny model whose text depends on all it has seen: slow decays and large weights make a lost state visible."""

from __future__ import annotations

from typing import Any

from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel

PATTERNS = ["FFF", "MMM", "AAA", "FMA", "MAMF"]
WINDOWS = [3, 64]
"""Smaller and larger than any text of the tests."""


def tiny_model(seed: int = 0, **changes: Any) -> FusionTreeModel:
    """Build a model of 40 tokens and about 10,000 parameters; ``changes`` are fields of ModelConfig."""
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "layer_pattern": "FFF",
        "num_heads": 4,
        "num_kv_heads": 2,
        "global_heads": 2,
        "window_size": 5,
        "max_position_embeddings": 64,
        "gate_rank": 4,
        "initializer_range": 0.3,
        "mamba": {"head_dim": 8, "d_state": 8, "n_groups": 2, "chunk_size": 4, "A_init_range": [0.01, 0.3]},
        **changes,
    }
    values["num_layers"] = len(values["layer_pattern"])
    config = ModelConfig.model_validate(values)
    model = FusionTreeModel(config)
    initialize_model(model, seed)
    return model.eval()
