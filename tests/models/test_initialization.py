"""Initial values depend on seed, name and global shape alone, and follow their distributions."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.models.initialization import initialize_model, initialize_parameter, no_weight_decay
from fusiontree.models.model import FusionTreeModel
from tests.helpers import tiny_config


def draw(name, shape, seed=0, rows=None, **overrides):
    return initialize_parameter(name, shape, tiny_config(**overrides), seed, rows)


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.mamba.ssm.A_log", "layers.1.mamba.conv_x.weight"])
def test_any_range_of_rows_equals_that_range_of_the_whole(name):
    shape = (2500,) if name.endswith("A_log") else (2500, 6)
    whole = draw(name, shape)
    assert whole.shape == shape and whole.dtype == torch.float32
    for start, stop in ((0, 2500), (0, 1), (1000, 1030), (1024, 2048), (2047, 2049), (2499, 2500), (700, 700)):
        assert torch.equal(draw(name, shape, rows=slice(start, stop)), whole[start:stop])
    assert torch.equal(torch.cat([draw(name, shape, rows=slice(r * 625, r * 625 + 625)) for r in range(4)]), whole)


def test_values_change_with_seed_name_and_shape_and_with_nothing_else():
    reference = draw("embed.weight", (100, 8))
    assert torch.equal(draw("embed.weight", torch.Size([100, 8]), num_layers=7, hidden_size=64), reference)
    torch.manual_seed(123)
    assert torch.equal(draw("embed.weight", (100, 8)), reference)
    for other in (draw("head.weight", (100, 8)), draw("embed.weight", (100, 8), seed=1)):
        assert (other - reference).abs().mean() > 0.01
    assert (draw("embed.weight", (101, 8))[:100] - reference).abs().mean() > 0.01
    blocks = draw("embed.weight", (2048, 8)).view(2, 1024, 8)
    assert (blocks[0] - blocks[1]).abs().mean() > 0.01


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draw("embed.weight", (10, 8))
    assert torch.equal(torch.rand(1), expected)


def test_row_ranges_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"rows .* of embed\.weight"):
        draw("embed.weight", (10, 8), rows=slice(0, 10, 2))
    with pytest.raises(ValueError, match=r"rows .* of embed\.weight"):
        draw("embed.weight", (10, 8), rows=slice(8, 4))


def test_matrices_are_normal_and_smaller_where_they_write_to_the_residual_stream():
    for name, expected in (
        ("layers.0.mamba.in_proj.weight", 0.02),
        ("layers.0.mamba.out_proj.weight", 0.02),
        ("layers.0.attention.o_proj.weight", 0.02),
        ("layers.0.align.down.weight", 0.02),
        ("layers.3.out_proj.weight", 0.02 / math.sqrt(2 * 8)),
        ("layers.3.mlp.down.weight", 0.02 / math.sqrt(2 * 8)),
        ("head.weight", 0.02),
        ("srte.weight", 0.02),
    ):
        values = draw(name, (512, 200), num_layers=8, initializer_range=0.02)
        assert float(values.std()) == pytest.approx(expected, rel=0.02), name
        assert abs(float(values.mean())) < expected / 50
        assert float(values.abs().max()) > 3.5 * expected  # not truncated


def test_state_space_parameters_follow_their_ranges():
    ranges = {"mamba": {"A_init_range": [0.5, 8.0], "dt_init_range": [0.001, 0.1]}}
    A = draw("layers.0.mamba.ssm.A_log", (4000,), **ranges).exp()
    assert float(A.min()) >= 0.5 - 1e-6 and float(A.max()) <= 8 + 1e-5
    assert float(A.mean()) == pytest.approx(4.25, rel=0.03)
    dt = torch.nn.functional.softplus(draw("layers.0.mamba.ssm.dt_bias", (4000,), **ranges).double())
    assert float(dt.min()) >= 0.001 * 0.9999 and float(dt.max()) <= 0.1 * 1.0001
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), rel=0.02)
    assert torch.equal(draw("layers.0.mamba.ssm.D", (4,)), torch.ones(4))


def test_the_rest_starts_at_its_constant():
    assert torch.equal(draw("layers.0.norm.weight", (4,)), torch.ones(4))
    assert torch.equal(draw("norm.weight", (4,)), torch.ones(4))
    assert torch.equal(draw("layers.0.mamba.norm.weight", (4,)), torch.ones(4))
    assert not draw("layers.0.gate.up.weight", (4, 2)).any()
    assert draw("layers.0.mlp.gate.weight", (4, 2)).any()
    assert not draw("layers.0.mamba.conv_bc.bias", (4,)).any()
    conv = draw("layers.0.mamba.conv_bc.weight", (4000, 4))
    assert 0.49 < float(conv.abs().max()) <= 0.5


def test_a_model_has_the_values_of_its_parameters_names():
    config = tiny_config(layer_pattern="FMA", srte_encoding="learnable")
    model = FusionTreeModel(config)
    initialize_model(model, seed=11)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initialize_parameter(name, parameter.shape, config, 11)), name


def test_weight_decay_spares_norms_biases_and_the_state_space():
    model = FusionTreeModel(tiny_config(srte_encoding="learnable", mlp_activation="swiglu"))
    spared = {name for name, parameter in model.named_parameters() if no_weight_decay(name, model.config)}
    expected = {"norm.weight"}
    for layer in range(2):
        prefix = f"layers.{layer}."
        expected |= {prefix + "norm.weight", prefix + "mamba.norm.weight"}
        expected |= {prefix + f"mamba.ssm.{name}" for name in ("A_log", "D", "dt_bias")}
        expected |= {prefix + f"mamba.{name}.bias" for name in ("conv_x", "conv_bc")}
    assert spared == expected
