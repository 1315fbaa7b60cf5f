"""Layers with the sizes of their letter cost and are split as in a model in which all layers have these sizes."""

from __future__ import annotations

from typing import Any

import pytest

from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import forward_flops_per_token, matrix_parameters
from fusiontree.models.mixers import all_mixers
from fusiontree.models.mixers.split import split_of
from fusiontree.parallel.recompute_mix import seconds_by_layer
from fusiontree.parallel.validate import tp_problems
from fusiontree.planning.activation_memory import kept_elements
from tests.helpers import tiny_config, tiny_model
from tests.models.variants import VARIANTS

SIZES = {
    "num_heads": 6,
    "num_kv_heads": 3,
    "global_heads": 2,
    "window_size": 3,
    "mamba_heads": 6,
    "mamba_groups": 1,
    "mamba_norm_groups": 3,
    "mlp_size": 41,
}


def both() -> tuple[ModelConfig, ModelConfig]:
    """A model whose layers all have a letter with sizes, and a model of these sizes."""
    letters: dict[str, Any] = {"letters": {"p": ["mamba2", "attention"]}, "letter_sizes": {"p": SIZES}}
    by_letter = tiny_config(layer_pattern="pp", head_dim=8, **letters)
    everywhere = tiny_config(
        num_heads=6,
        num_kv_heads=3,
        global_heads=2,
        head_dim=8,
        window_size=3,
        mamba={"num_heads": 6, "n_groups": 1, "norm_groups": 3},
        mlp_ratio=41.5 / 32,
    )
    return by_letter, everywhere


def test_costs_are_those_of_the_sizes() -> None:
    mine, theirs = both()
    assert matrix_parameters(mine) == matrix_parameters(theirs) != matrix_parameters(tiny_config())
    assert forward_flops_per_token(mine, [9, 30]) == forward_flops_per_token(theirs, [9, 30])
    assert seconds_by_layer(mine, 64) == seconds_by_layer(theirs, 64)
    for mode in ("none", "selective", "full"):
        assert kept_elements(mine, 1, mode, 1) == kept_elements(theirs, 1, mode, 1)
    for (layer, mixer), (_, other) in zip(all_mixers(mine), all_mixers(theirs), strict=True):
        mine_bytes = mixer.exchanged_bytes(mine.of_layer(layer), layer, 64, 2, 1, 2)
        assert mine_bytes == other.exchanged_bytes(theirs, layer, 64, 2, 1, 2)
    _, *mine_problems = tp_problems(mine, 3)  # after that of the vocabulary
    _, *their_problems = tp_problems(theirs, 3)
    assert mine_problems == [f"layers p: {problem}" for problem in their_problems] and len(mine_problems) == 2


def test_parameters_are_those_of_the_sizes_and_are_split_by_them() -> None:
    mine, theirs = both()
    shapes = [{n: tuple(p.shape) for n, p in tiny_model(**c.model_dump()).named_parameters()} for c in (mine, theirs)]
    assert shapes[0] == shapes[1]
    model = tiny_model(**VARIANTS["sizes by letter"])
    for name, parameter in model.named_parameters():
        split = split_of(name, model.config)
        if split is not None:
            assert sum(block.size for block in split.blocks) == parameter.shape[split.axis], name


@pytest.mark.parametrize("letter", ["F", "z"])
def test_a_layer_without_sizes_has_those_of_the_model(letter: str) -> None:
    letters: dict[str, Any] = {"letters": {"p": ["mamba2"], "z": ["attention"]}, "letter_sizes": {"p": {"mlp_size": 3}}}
    config = tiny_config(layer_pattern=f"{letter}p", **letters)
    assert config.of_layer(0).mlp_size == config.mlp_size == 64 and config.of_layer(1).mlp_size == 3
    assert config.of_layer(1).of_layer(1) == config.of_layer(1)
