"""The tiny model of all tests, as a ``model`` section of a configuration."""

from __future__ import annotations

from typing import Any

# A decays slowly, so that a state that leaks or is lost shows in the outputs.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "global_heads": 2,
    "max_position_embeddings": 64,
    "gate_rank": 8,
    "initializer_range": 0.06,  # a fan-in of 32 wants larger weights than one of thousands
    "mamba": {"head_dim": 8, "A_init_range": [0.01, 0.02]},
}


def tiny_section(**changes: Any) -> dict[str, Any]:
    """Return the section with ``changes``; vocabulary and window are among them, ``mamba`` may be given in part."""
    return changed(_SIZES, **changes)


def changed(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return ``section`` with ``changes``, of which ``mamba`` may be given in part."""
    return {**section, **changes, "mamba": {**section["mamba"], **changes.get("mamba", {})}}
