"""Impossible sizes are refused with the numbers that clash."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fusiontree.models.model import FusionTreeModel
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "hidden_size 32 does not divide by num_heads 5"),
        ({"global_heads": 5}, "global_heads 5 is more than num_heads 4"),
        ({"num_kv_heads": 3}, "num_heads 4 does not divide by num_kv_heads 3"),
        ({"global_heads": 1}, "a group would mix both kinds"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"window_size": 0}, "greater than or equal to 1"),
        ({"layer_pattern": "FX"}, r"layer_pattern 'FX' has \['X'\]"),
        ({"layer_pattern": "FFF", "num_layers": 2}, "names 3 layers and num_layers is 2"),
        ({"mamba": {"head_dim": 7}}, "64 does not divide by mamba.head_dim 7"),
        ({"mamba": {"n_groups": 3}}, "8 state space heads .* mamba.n_groups 3"),
        ({"mamba": {"norm_groups": 3}}, r"8 state space heads \* mamba.head_dim = 64 .* mamba.norm_groups 3"),
        ({"mamba": {"A_init_range": [2.0, 1.0]}}, r"A_init_range is \[2.0, 1.0\]; it needs 0 < low <= high"),
        ({"mamba": {"dt_init_range": [0.0, 0.1]}}, r"dt_init_range is \[0.0, 0.1\]"),
        ({"gate_rank": 33}, "gate_rank 33 is more than hidden_size 32"),
        ({"hidden_size": 33, "head_dim": 8, "mamba": {"head_dim": 2, "n_groups": 1}}, "hidden_size 33 is odd"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01"),
        ({"letters": {"D": [["mamba2"]]}}, r"letters.D.0\n +Input should be a valid string"),
        ({"letters": {"D": [3]}}, r"letters.D.0\n +Input should be a valid string"),
        ({"kernels": {"attention": ["sdpa"]}}, r"kernels.attention\n +Input should be 'auto', "),
        ({"window_size_last": 3}, "window_size_last .* pyramidal"),
        ({"attention_type": "pyramidal", "window_size_last": 2}, "window_size_last 2 is less than window_size 5"),
    ],
)
def test_impossible_sizes_are_named(overrides, message):
    with pytest.raises(ValidationError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"branch_mix": "sum", "gate_rank": 33, "load_balance_coeff": 0.0, "entropy_reg_coeff": 0.0},
        {"layer_pattern": "AA", "num_layers": 2, "mamba": {"head_dim": 7}},
        {"layer_pattern": "MM", "num_layers": 2, "num_heads": 5},
        {"letter_sizes": {"A": {"mamba_heads": 5, "mamba_groups": 2}}},
    ],
)
def test_sizes_of_parts_that_the_model_lacks_are_not_checked(overrides):
    config = tiny_config(**overrides)
    assert sum(p.numel() for p in FusionTreeModel(config).parameters())


def test_windows_of_a_pyramid_end_at_the_longest_row():
    config = tiny_config(attention_type="pyramidal", num_layers=3, window_size=4, max_position_embeddings=64)
    assert [config.window_of_layer(layer) for layer in range(3)] == [4, 34, 64]
