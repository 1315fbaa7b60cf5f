"""Which tokens each kind of head sees, and the sizes the configuration asks for.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers.attention import AttentionCore, LocalGlobalAttention
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.ops.rotary import rotary_tables
from tests.helpers import tiny_config


def build(layer: int = 0, **overrides):
    config = tiny_config(**overrides)
    module = LocalGlobalAttention(config, layer)
    for name, parameter in module.named_parameters():
        parameter.data = 3 * initialize_parameter(f"layers.0.attention.{name}", parameter.shape, config, seed=0)
    return config, module


def run(config, module, u_BSC):
    tables = rotary_tables(torch.arange(u_BSC.shape[1])[None], config.attention_head_dim, config.rope_theta)
    return module(u_BSC, MixerInputs(None, *tables))


def by_definition(config, module, u_BSC, window):
    """One head, one query at a time."""
    rows, length, _ = u_BSC.shape
    width, group = config.attention_head_dim, config.num_heads // config.kv_heads

    def turn(x, position):
        half = width // 2
        angle = position * config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos().float(), angle.sin().float()
        return torch.cat([x[:half] * cos - x[half:] * sin, x[:half] * sin + x[half:] * cos])

    out_BSC = torch.zeros(rows, length, config.num_heads * width)
    for b in range(rows):
        q, k, v = (p(u_BSC[b]).unflatten(-1, (-1, width)) for p in (module.q_proj, module.k_proj, module.v_proj))
        for head in range(config.num_heads):
            is_global = head >= config.num_heads - config.global_heads
            for i in range(length):
                first = 0 if is_global else max(0, i - window + 1)
                query = turn(q[i, head], i)
                scores = [query @ turn(k[j, head // group], j) / math.sqrt(width) for j in range(first, i + 1)]
                weights = torch.stack(scores).softmax(0)
                out_BSC[b, i, head * width : (head + 1) * width] = weights @ v[first : i + 1, head // group]
    return module.o_proj(out_BSC)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "global_heads", "window"),
    [(4, 2, 2, 3), (4, 4, 1, 5), (4, 1, 0, 2), (4, 1, 4, 2), (8, 4, 2, 1), (4, 2, 2, 50)],
)
@torch.no_grad()
def test_heads_see_their_window_or_everything(heads, kv_heads, global_heads, window):
    config, module = build(num_heads=heads, num_kv_heads=kv_heads, global_heads=global_heads, window_size=window)
    u_BSC = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = by_definition(config, module, u_BSC, window)
    assert expected.std() > 0.1
    torch.testing.assert_close(run(config, module, u_BSC), expected, atol=1e-5, rtol=1e-5)


def test_num_heads_of_the_configuration_are_the_heads_of_the_model():
    """Fault of the first prototype: num_heads was read and not used."""
    for heads, kv_heads, head_dim in ((2, 2, None), (4, 2, None), (8, 4, None), (4, 2, 6)):
        config, module = build(num_heads=heads, num_kv_heads=kv_heads, global_heads=heads // 2, head_dim=head_dim)
        shapes = []

        class Core(AttentionCore):
            def begin(self, q, k, v, documents, shapes=shapes):
                shapes.append((q.shape[2:], k.shape[2:]))
                return lambda: q

        module.local_core = module.global_core = Core(None, "auto")
        run(config, module, torch.randn(1, 3, config.hidden_size))
        width = head_dim or config.hidden_size // heads
        each = (heads // 2, width), (kv_heads // 2, width)
        assert shapes == [each, each]


def test_num_heads_changes_the_function():
    outputs = []
    for heads in (2, 4):
        config, module = build(num_heads=heads, num_kv_heads=heads, global_heads=1)
        outputs.append(run(config, module, torch.ones(1, 4, config.hidden_size).cumsum(1)))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_pyramidal_windows_widen_with_depth():
    config = tiny_config(num_layers=3, attention_type="pyramidal", window_size=2, window_size_last=10)
    assert [LocalGlobalAttention(config, layer).local_core.window for layer in range(3)] == [2, 6, 10]
    config = tiny_config(num_layers=3, window_size=2)
    assert [LocalGlobalAttention(config, layer).local_core.window for layer in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "global_heads", "shares", "expected"),
    [
        (8, 4, 4, 1, (4, 2)),
        (8, 4, 4, 2, (2, 1)),
        (8, 4, 2, 2, (3, None)),  # 3 local kv heads do not make two equal shares
        (6, 3, 2, 2, (2, 1)),  # one global kv head is in both shares
        (4, 4, 0, 2, (2, 2)),
        (4, 4, 4, 2, (0, 0)),
    ],
)
def test_a_share_of_the_heads_knows_its_kinds(heads, kv_heads, global_heads, shares, expected):
    config, module = build(num_heads=heads, num_kv_heads=kv_heads, global_heads=global_heads, head_dim=4)
    per_kind = (config.local_kv_heads, config.global_kv_heads)
    local_kv, global_kv = (max(1, n // shares) if n else 0 for n in per_kind)
    if expected[1] is None:
        with pytest.raises(AssertionError, match="3 heads in 2 equal parts"):
            module.local_part(heads // shares, kv_heads // shares)
    else:
        assert module.local_part(heads // shares, local_kv + global_kv) == expected
