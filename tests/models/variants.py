"""The kinds of model that every equality of this room must hold for."""

from __future__ import annotations

from typing import Any

PATTERNS = ["FF", "MM", "AA", "FMAF", "MAF"]

LLAMA: dict[str, Any] = {
    "layer_pattern": "AA",
    "global_heads": 4,
    "branch_mix": "sum",
    "mlp_input": "residual",
    "mlp_activation": "swiglu",
    "use_alignment": False,
    "srte_encoding": "none",
}
"""A plain Llama: attention and MLP in turn."""

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
    "sizes by letter": {
        "layer_pattern": "Fpqr",
        "letters": {"p": ["mamba2", "attention"], "q": ["mamba2"], "r": ["attention"]},
        "letter_sizes": {
            "F": {"mlp_size": 24},
            "p": {"num_heads": 2, "num_kv_heads": 1, "global_heads": 0, "mamba_heads": 4, "mlp_size": 17},
            "q": {"mamba_heads": 3, "mamba_groups": 1, "mamba_norm_groups": 1},
            "r": {"num_heads": 2, "num_kv_heads": 1, "global_heads": 2, "window_size": 3},
        },
    },
    "Gated DeltaNet": {
        "layer_pattern": "GDHF",
        "letters": {
            "G": ["gated_delta_net", "attention"],
            "D": ["gated_delta_net"],
            "H": ["attention", "gated_delta_net"],
        },
        "mixers": {"gated_delta_net": {"key_dim": 4, "value_dim": 8, "chunk_size": 5, "A_init_range": [0.01, 0.02]}},
    },
    "swiglu, tied head": {"mlp_activation": "swiglu", "tie_word_embeddings": True},
    "gate over normalized branches": {"branch_norm": True, "layer_pattern": "FMA"},
    "mean of normalized branches": {"branch_norm": True, "branch_mix": "mean", "layer_pattern": "FMA"},
    "concatenated branches": {"branch_mix": "concat", "layer_pattern": "FMA"},
    "sum and MLP in turn": {
        "layer_pattern": "FMA",
        "branch_mix": "sum",
        "mlp_input": "residual",
        "use_alignment": False,
    },
    "gated sum and MLP in turn": {
        "layer_pattern": "FMA",
        "branch_mix": "gated_sum",
        "mlp_input": "residual",
        "use_alignment": False,
    },
    "gated sum": {"branch_mix": "gated_sum", "layer_pattern": "FA"},
    "gate and MLP in turn": {"layer_pattern": "FMA", "mlp_input": "residual"},
    "global heads without rotation": {"global_rope": False, "layer_pattern": "FA"},
    "plain Llama": LLAMA,
}
