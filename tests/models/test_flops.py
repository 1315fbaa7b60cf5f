"""FLOPs by hand for a model small enough to count."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.flops import forward_flops_per_token, matrix_parameters, training_flops_per_token, visible_keys
from fusiontree.models.model import FusionTreeModel
from tests.helpers import tiny_config
from tests.models.variants import VARIANTS


@pytest.mark.parametrize("kind", VARIANTS)
def test_matrix_parameters_are_those_of_the_model(kind):
    config = tiny_config(**VARIANTS[kind])
    with torch.device("meta"):
        model = FusionTreeModel(config)
    # With a tied head the one matrix is both look-up and product; a look-up alone multiplies nothing.
    counted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2
        and "conv" not in name
        and name != "srte.weight"
        and (name != "embed.weight" or config.tie_word_embeddings)
    )
    assert matrix_parameters(config) == counted


@pytest.mark.parametrize("window", [None, 1, 3, 10, 50])
def test_visible_keys_count_one_by_one(window):
    for length in (1, 2, 10, 33):
        expected = sum(min(i + 1, window or length) for i in range(length))
        assert visible_keys(length, window) == expected


def test_visible_keys_follow_the_closed_form():
    window, length = 1024, 32768
    average = window - window * (window - 1) / (2 * length)
    assert visible_keys(length, window) / length == pytest.approx(average)


def test_one_layer_counted_by_hand():
    config = tiny_config(num_layers=1, window_size=3)
    length = 5
    # inner 64, 8 heads, B and C 2 x 16 each; attention 4 heads of 8, 2 kv heads; local 2, global 2
    mamba = 32 * (64 + 64 + 8 + 64) + 64 * 32
    attention = 32 * (32 + 16 + 16) + 32 * 32
    rest = 5 * 32 * 32 + 2 * 32 * 8 + 32 * 32 + 2 * 32 * 64 + 64 * 32
    keys_local, keys_global = (1 + 2 + 3 + 3 + 3) / 5, (1 + 2 + 3 + 4 + 5) / 5
    expected = 2 * (mamba + attention + rest)
    expected += 4 * 8 * (2 * keys_local + 2 * keys_global)
    expected += 7 * 64 * 16 + 2 * 4 * (64 + 64)
    assert forward_flops_per_token(config, length) == pytest.approx(expected)
    assert training_flops_per_token(config, length) == pytest.approx(3 * expected)


def test_packed_rows_count_their_documents():
    config = tiny_config(layer_pattern="A")
    packed, parts = forward_flops_per_token(config, [8, 2]), [forward_flops_per_token(config, n) for n in (8, 2)]
    assert packed == pytest.approx((8 * parts[0] + 2 * parts[1]) / 10)
    assert packed < forward_flops_per_token(config, 10)
    mamba = tiny_config(layer_pattern="M")
    assert forward_flops_per_token(mamba, [8, 2]) == forward_flops_per_token(mamba, 10)
