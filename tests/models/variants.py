"""The kinds of model that every equality of this room must hold for."""

from __future__ import annotations

from typing import Any

PATTERNS = ["FF", "MM", "AA", "FMAF", "MAF"]

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"pattern {pattern}": {"layer_pattern": pattern} for pattern in PATTERNS},
    "window longer than the text": {"layer_pattern": "FA", "window_size": 60},
    "window of one": {"layer_pattern": "FA", "window_size": 1},
    "pyramidal": {"num_layers": 3, "attention_type": "pyramidal", "window_size": 2, "window_size_last": 30},
    "no global heads": {"global_heads": 0, "num_kv_heads": 1},
    "no local heads": {"global_heads": 4, "num_kv_heads": 1},
    "one B and C group": {"mamba": {"n_groups": 1, "norm_groups": 1}},
    "long chunks": {"mamba": {"chunk_size": 64}},
    "limited steps": {"mamba": {"dt_min": 0.2, "dt_max": 0.4}},
    "wide convolution": {"mamba": {"d_conv": 7}},
    "no time encoding": {"srte_encoding": "none"},
    "learned time encoding": {"srte_encoding": "learnable"},
    "mean instead of alignment": {"use_alignment": False, "layer_pattern": "FMA"},
    "swiglu, tied head": {"mlp_activation": "swiglu", "tie_word_embeddings": True},
}
