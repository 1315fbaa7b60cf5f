"""Gated DeltaNet against transformers' layer of Qwen3-Next; decoding, sizes, costs, parameters.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusiontree.cli import main
from fusiontree.config.describe import settings_markdown
from fusiontree.config.load import load_config
from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import forward_flops_per_token, matrix_parameters, matrix_parameters_by_layer
from fusiontree.models.initialization import initialize_parameter, no_weight_decay
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from fusiontree.parallel.recompute_mix import seconds_by_layer
from fusiontree.parallel.validate import tp_problems, valid_tp
from fusiontree.planning.cost_model import count_parameters
from tests.end_to_end.runs import ROOT
from tests.helpers import tiny_config, tiny_model

LETTERS = {"G": ["gated_delta_net", "attention"], "D": ["gated_delta_net"]}
SIZES = {"key_dim": 4, "value_dim": 8, "expand": 2, "heads_per_key": 2, "chunk_size": 8, "A_init_range": [0.5, 2.0]}
"""8 value heads and 4 key heads at 32 channels."""


def shape(**changed: Any) -> dict[str, Any]:
    return {"letters": LETTERS, "mixers": {"gated_delta_net": {**SIZES, **changed}}}


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def mixer(config: ModelConfig, seed: int = 3) -> GatedDeltaNet:
    """Return the mixer with large weights and with convolution biases of zero, which Qwen3-Next has not."""
    ours = GatedDeltaNet(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ours.named_parameters():
        values = initialize_parameter(f"layers.0.delta.{name}", parameter.shape, config, seed=seed)
        if name.endswith("proj.weight"):
            values *= 5
        if name == "norm.weight":  # of each head's channels, shared by all heads in Qwen3-Next
            values = (1 + 0.2 * torch.randn(SIZES["value_dim"], generator=generator)).repeat(len(values) // 8)
        parameter.data = values
    return ours


def qwen_of(ours: GatedDeltaNet, config: ModelConfig, weights: bool = True) -> Any:
    """Return transformers' layer; its projections hold the rows of one key head side by side."""
    qwen = pytest.importorskip("transformers.models.qwen3_next")
    sizes, heads = ours.section(config), ours.decay.A_log.numel()
    theirs = qwen.modeling_qwen3_next.Qwen3NextGatedDeltaNet(
        qwen.Qwen3NextConfig(
            hidden_size=config.hidden_size,
            linear_num_value_heads=heads,
            linear_num_key_heads=heads // sizes.heads_per_key,
            linear_key_head_dim=sizes.key_dim,
            linear_value_head_dim=sizes.value_dim,
            linear_conv_kernel_dim=sizes.d_conv,
            rms_norm_eps=config.norm_eps,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        layer_idx=0,
    )
    with torch.no_grad():
        for name, values in in_qwen_layout(ours, config, {n: p.detach() for n, p in ours.named_parameters()}).items():
            theirs.get_parameter(name).copy_(values)
    return theirs


def in_qwen_layout(ours: GatedDeltaNet, config: ModelConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our parameters (or their gradients) by transformers' names and in its order of rows."""
    sizes, heads = ours.section(config), ours.decay.A_log.numel()
    key_heads, width = heads // sizes.heads_per_key, heads * sizes.value_dim
    z, v, a, b = values["in_proj.weight"].split([width, width, heads, heads])
    q, k = values["qk_proj.weight"].chunk(2)
    per_head = [t.unflatten(0, (key_heads, -1)) for t in (q, k, v, z)]
    norm = values["norm.weight"].unflatten(0, (heads, -1))
    return {
        "in_proj_qkvz.weight": torch.cat(per_head, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat([t.unflatten(0, (key_heads, -1)) for t in (b, a)], 1).flatten(0, 1),
        "conv1d.weight": torch.cat([values["conv_qk.weight"], values["conv_v.weight"]])[:, None],
        "A_log": values["decay.A_log"],
        "dt_bias": values["decay.dt_bias"],
        "norm.weight": norm[0] if torch.equal(norm, norm[:1].expand_as(norm)) else norm.sum(0),
        "out_proj.weight": values["out_proj.weight"],
    }


@pytest.mark.parametrize("heads_per_key", [1, 2])
def test_outputs_and_gradients_equal_those_of_qwen3_next(heads_per_key: int) -> None:
    config = tiny_config(layer_pattern="D", **shape(heads_per_key=heads_per_key))
    ours = mixer(config)
    theirs = qwen_of(ours, config)
    generator = torch.Generator().manual_seed(0)
    u_BSC, probe_BSC = torch.randn(2, 2, 70, config.hidden_size, generator=generator)
    given = [u_BSC.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(given[0], MixerInputs()), theirs(given[1])]
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for out in outputs:
        (out * probe_BSC).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, atol=1e-4, rtol=1e-4)
    own = in_qwen_layout(ours, config, {name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pattern", ["GD", "D"])
@torch.no_grad()
def test_token_by_token_equals_the_full_pass(pattern: str) -> None:
    model = tiny_model(layer_pattern=pattern, **shape())
    ids = tokens(2, 24)
    full = model(ids).logits_BSV
    assert full.std() > 0.1
    for fixed in (False, True):
        cache = model.new_cache(2)
        parts = [model(ids[:, :9], cache=cache).logits_BSV]
        if fixed:
            cache.fix(24)
            model(ids[:, :1], cache=cache.rehearsal())  # changes nothing
        else:
            parts.append(model(ids[:, 9:12], cache=cache).logits_BSV)
        parts += [model(ids[:, i : i + 1], cache=cache).logits_BSV for i in range(9 if fixed else 12, 24)]
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_pads_and_selected_rows_do_not_change_a_text() -> None:
    model = tiny_model(layer_pattern="GD", **shape())
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = False
    cache = model.new_cache(2)
    model(ids, padding_mask_BS=mask, cache=cache)
    again = model(ids[:1, :1], cache=cache.select([1])).logits_BSV[0, -1]
    alone = model(torch.cat([ids[1:, 6:], ids[:1, :1]], 1)).logits_BSV[0, -1]
    torch.testing.assert_close(again, alone, atol=5e-5, rtol=1e-4)


def test_a_share_of_the_heads_computes_its_share() -> None:
    """The ranges of tp_plan select complete heads: the summands of two ranks, and of eight that share key heads."""
    config = tiny_config(layer_pattern="D", **shape())
    whole = mixer(config)
    plan = GatedDeltaNet.tp_plan(config)
    assert set(plan) == {name for name, _ in whole.named_parameters()}
    u_BSC = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    for ranks in (2, 8):
        total = torch.zeros_like(u_BSC)
        for rank in range(ranks):
            part = GatedDeltaNet(config)
            for name, parameter in whole.named_parameters():
                ranges = plan[name].ranges(rank, ranks)
                values = torch.cat([parameter.narrow(plan[name].axis, a, b - a) for a, b in ranges], plan[name].axis)
                module, leaf = part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(module, leaf, nn.Parameter(values))
            total += part(u_BSC, MixerInputs())
        torch.testing.assert_close(total, whole(u_BSC, MixerInputs()), atol=1e-5, rtol=1e-5)


def test_flops_are_counted() -> None:
    config, rest = (tiny_config(layer_pattern=pattern, **shape()) for pattern in ("DA", "AA"))
    values, keys, hidden = 64, 16, 32
    delta, attention = hidden * (3 * values + 2 * keys + 2 * 8), hidden * 2 * (4 + 2) * 8
    assert matrix_parameters(config) - matrix_parameters(rest) == delta - attention
    more = forward_flops_per_token(config, 20) - 2 * matrix_parameters(config)
    less = forward_flops_per_token(rest, 20) - 2 * matrix_parameters(rest)
    assert more - less / 2 == pytest.approx(7 * 8 * 4 * 8 + 2 * 4 * (values + 2 * keys))


def test_the_time_is_that_of_the_kernels_memory_traffic() -> None:
    """32 value heads of 128 channels: 15.9 kB per token and head, several times the bound by FLOPs."""
    sizes = {"key_dim": 128, "value_dim": 128}
    config = tiny_config(layer_pattern="D", hidden_size=2048, letters=LETTERS, mixers={"gated_delta_net": sizes})
    with_recurrence, products = seconds_by_layer(config, 4096)[0], 6 * matrix_parameters_by_layer(config)[0] / 727e12
    recurrence = with_recurrence.repeated - products
    assert recurrence == pytest.approx(32 * 15872 / 2.7e12, rel=1e-3)
    assert recurrence > 3 * GatedDeltaNet.flops(config, 0, [4096]) / 727e12
    assert with_recurrence.kept == 0


def test_the_benchmarked_model_is_the_reference_with_another_mixer() -> None:
    delta, mamba = (load_config(ROOT / f"configs/bench/hybrid_1b_32k{end}.yaml") for end in ("_gdn", ""))
    assert set(delta.model.pattern) == {"G"} and delta.model.branches[0] == ("gated_delta_net", "attention")
    assert delta.training == mamba.training and delta.parallel == mamba.parallel
    other = {"layer_pattern", "letters", "mixers", "mamba"}
    assert delta.model.model_dump(exclude=other) == mamba.model.model_dump(exclude=other)
    sizes = [sum(count_parameters(config.model, 1)[:2]) for config in (delta, mamba)]
    assert sizes[0] == pytest.approx(sizes[1], rel=2e-3)


def test_sizes_are_checked() -> None:
    config = tiny_config(layer_pattern="DD", **shape())
    assert list(tp_problems(config, 16)) == ["8 value heads (expand * hidden_size / value_dim) do not divide by 16"]
    assert valid_tp(config, 8) == [1, 2, 4, 8]
    odd = tiny_config(layer_pattern="D", **shape(value_dim=4, heads_per_key=16, expand=6))
    assert any("3 key heads" in problem for problem in GatedDeltaNet.tp_problems(odd, 2))
    for changed, message in (
        (
            {"value_dim": 7},
            "expand 2.0 \\* hidden_size 32 is not a multiple of value_dim 7; 9 heads need expand 1.96875 ",
        ),
        ({"heads_per_key": 3}, "8 value heads .* do not divide by heads_per_key 3; use one of \\[1, 2, 4, 8\\]"),
        ({"d_conv": 1}, "mixers.gated_delta_net.d_conv is 1: "),
        ({"expand": 0.01}, "1 heads need expand 0.25 "),
        ({"A_init_range": [0.0, 1.0]}, "A_init_range is .* it needs 0 < low <= high"),
        ({"dt_init_range": [0.2, 0.1]}, "dt_init_range is .* it needs 0 < low <= high"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(layer_pattern="D", **shape(**changed))
    with pytest.raises(ValueError, match=r"key_dim 272 is above the 256 .*gated_delta=fla .*gated_delta=chunked"):
        tiny_config(layer_pattern="D", kernels={"gated_delta": "fla"}, **shape(key_dim=272))
    tiny_config(layer_pattern="D", kernels={"gated_delta": "fla"}, **shape(key_dim=256))
    tiny_config(layer_pattern="D", **shape(key_dim=272))
    wide = shape(value_dim=16, expand=1.12, heads_per_key=7)
    config = tiny_config(layer_pattern="D", hidden_size=400, num_heads=4, head_dim=100, **wide)
    assert not list(GatedDeltaNet.tp_problems(config, 28)), "1.12 * 400 / 16 is 28 in spite of rounding"


def test_initial_values_weight_decay_and_precision() -> None:
    model = tiny_model(layer_pattern="GD", **shape(dt_init_range=[0.01, 0.02]))
    decay = model.layers[1].delta.decay
    rate, step = decay.A_log.detach().exp(), nn.functional.softplus(decay.dt_bias.detach())
    assert 0.5 <= float(rate.min()) < float(rate.max()) <= 2.0
    assert 0.01 - 1e-6 <= float(step.min()) < float(step.max()) <= 0.02 + 1e-6
    spared = {name for name, _ in model.named_parameters() if ".delta." in name and no_weight_decay(name, model.config)}
    kept = ("decay.A_log", "decay.dt_bias", "norm.weight", "conv_v.bias", "conv_qk.bias")
    assert spared == {f"layers.{i}.delta.{name}" for i in range(2) for name in kept}
    model.bfloat16()
    log_decay, beta = decay(torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 8, dtype=torch.bfloat16))
    assert {decay.A_log.dtype, decay.dt_bias.dtype, log_decay.dtype, beta.dtype} == {torch.float32}
    assert model(tokens(1, 5)).logits_BSV.dtype == torch.bfloat16


def test_summed_branches_start_as_small_as_the_other_mixers() -> None:
    config = tiny_config(
        layer_pattern="DM", branch_mix="sum", mlp_input="residual", use_alignment=False, load_balance_coeff=0, **shape()
    )
    std = [
        float(initialize_parameter(f"layers.{layer}.{name}.out_proj.weight", (32, 4096), config, 0).std())
        for layer, name in enumerate(("delta", "mamba"))
    ]
    assert std[0] == pytest.approx(std[1], rel=0.02)


def test_the_exchanged_bytes_do_not_depend_on_the_tokens() -> None:
    config = tiny_config(layer_pattern="D", **shape())
    sent = [GatedDeltaNet.exchanged_bytes(config, 0, n, cp=4, tp=2, itemsize=2) for n in (64.0, 4096.0)]
    assert sent == [4 * 4 * (8 / 2) * 4 * (8 + 4)] * 2


# The page


def test_the_page_lists_the_settings_and_its_command_works(capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
    assert settings_markdown(GatedDeltaNetConfig, "model.mixers.gated_delta_net.") in page
    (command,) = re.findall(r"```bash\nfusiontree (.*?)\n```", page)
    assert main(shlex.split(command)) == 0
    assert "tokens" in capsys.readouterr().out
