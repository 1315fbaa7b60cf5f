"""Weights in 8 bits: their stated error, what is left as it is, and one result by every path."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.fused_step import prepare
from fusiontree.models.weight_only import RELATIVE_ERROR, WeightOnlyLinear, quantize_weights
from tests.helpers import tiny_model

KINDS = list(RELATIVE_ERROR)


@pytest.mark.parametrize("inputs", [2048, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_normal_weights_is_the_stated_one(kind, inputs):
    weight = torch.randn(16, inputs, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 16)[:, None]
    small = WeightOnlyLinear(weight, kind).stored.dense(torch.float32)
    error = (small - weight).norm(dim=1) / weight.norm(dim=1)  # every row by itself: scales are per output
    assert float(error.max()) < RELATIVE_ERROR[kind]
    assert float(error.mean()) > RELATIVE_ERROR[kind] / 2  # else the bar would show nothing


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_the_largest_weight_are_exact(kind):
    weight = torch.tensor([[0.0, 0.0, 0.0], [3.0, -1.5, 0.0]])
    small = WeightOnlyLinear(weight, kind).stored.dense(torch.float32)
    assert torch.equal(small[0], weight[0])
    assert float(small[1, 0]) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_quantized_model_is_near_and_decodes_as_it_prefills(kind):
    model, exact = (tiny_model(layer_pattern="FMA", scale=1.0) for _ in range(2))
    assert quantize_weights(model, kind) > 0
    left = {name for name, _ in model.named_parameters()}
    assert {"embed.weight", "head.weight", "layers.0.mamba.ssm.A_log", "layers.0.mamba.conv_x.weight"} <= left
    assert not any("proj" in name for name in left)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    got, want = model(ids).logits_BSV, exact(ids).logits_BSV
    error = float((got - want).norm() / want.norm())
    assert 1e-5 < error < 0.1
    prepare(model)
    cache = model.new_cache(2)
    model(ids[:, :15], cache=cache)
    cache.fix(20)
    for i in range(15, 20):
        torch.testing.assert_close(model.fused_step(ids[:, i : i + 1], cache), got[:, i], atol=1e-4, rtol=0)
