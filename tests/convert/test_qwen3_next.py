"""Warm starts from transformers' own Qwen3-Next: Gated DeltaNet layers and, without its attention, the whole model.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusiontree.checkpoint.load import load_model
from fusiontree.models.mixers.base import MixerInputs
from tests.convert.checkpoints import convert
from tests.convert.test_tool import refused
from tests.convert.test_warm_start import configuration
from tests.end_to_end.runs import ROOT

MAP = ROOT / "configs" / "maps" / "qwen3_next.yaml"
LETTERS = {"G": ["gated_delta_net", "attention"], "D": ["gated_delta_net"]}
SIZES = {"key_dim": 4, "value_dim": 8, "expand": 2.0, "heads_per_key": 2, "d_conv": 3}
"""8 value heads and 4 key heads at 32 channels."""
GATED_MLP = [
    {"theirs": f"model.layers.{{layer}}.{theirs}.weight", "ours": f"layers.{{layer}}.mlp.{ours}.weight", **more}
    for theirs, ours, more in (
        ("mlp.gate_proj", "gate", {}),
        ("mlp.up_proj", "up", {}),
        ("mlp.down_proj", "down", {}),
        ("post_attention_layernorm", "norm", {"add": 1.0}),
    )
]


def their_model(folder: Path, layer_types: list[str], **values: Any) -> Any:
    """Save a small Qwen3-Next with random weights; norms do not enlarge rounding errors of heads that are almost 0."""
    qwen = pytest.importorskip("transformers.models.qwen3_next")
    torch.manual_seed(3)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": len(layer_types)}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_types": layer_types}
    sizes |= {"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 4}
    sizes |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 3, "num_experts": 0, "rms_norm_eps": 1e-3}
    model = qwen.Qwen3NextForCausalLM(qwen.Qwen3NextConfig(**sizes | values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ours(folder: Path, **model: Any) -> Path:
    """Write a run's configuration."""
    folder.mkdir()
    sizes = {"letters": LETTERS, "mixers": {"gated_delta_net": SIZES}, "tie_word_embeddings": False}
    path = configuration(folder, **sizes | model)
    values = yaml.safe_load(path.read_text())
    values["model"].pop("srte_encoding", None)
    values["model"].pop("norm_eps", None)
    path.write_text(yaml.safe_dump(values))
    return path


def apart(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, as a share of the largest value (at least 1)."""
    return float((got - want).abs().max()) / max(1.0, float(want.abs().max()))


def test_the_mixers_compute_what_theirs_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hybrid with experts: what is Gated DeltaNet carries over, beside attention and alone."""
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    theirs = their_model(tmp_path / "theirs", kinds, **experts, shared_expert_intermediate_size=16)
    config = ours(tmp_path / "c", num_layers=3, layer_pattern="GDA")
    convert(tmp_path / "theirs", tmp_path / "run", "--to", "dcp", "--map", MAP, "--config", config)
    assert "model.srte_encoding is none" in (said := capsys.readouterr().out)
    assert "different from the source, as the map accepts: norm_style" in said and "verified: logits" not in said
    new, values = load_model(tmp_path / "run")
    assert values["model"]["norm_eps"] == 1e-3
    u_BSC = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for our_layer, their_layer in zip(new.layers[:2], theirs.model.layers[:2], strict=True):
            want = their_layer.linear_attn(u_BSC)
            assert want.std() > 0.05
            assert apart(our_layer.delta(u_BSC, MixerInputs()), want) < 1e-5
            normed = our_layer.norm(u_BSC)[0]
            assert apart(normed, their_layer.input_layernorm(u_BSC)) < 1e-6
        torch.testing.assert_close(new.norm.weight, 1 + theirs.model.norm.weight)
    assert torch.equal(new.head.weight[:60], theirs.lm_head.weight)


def test_a_model_without_attention_starts_with_their_logits(tmp_path: Path) -> None:
    """With the MLPs, which the settings of a transformer block read as theirs do."""
    theirs = their_model(tmp_path / "theirs", ["linear_attention"] * 2)
    rules = yaml.safe_load(MAP.read_text())
    rules["tensors"] += GATED_MLP
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(rules | {"ignore": []}))
    block = {"branch_mix": "sum", "mlp_input": "residual", "use_alignment": False, "load_balance_coeff": 0.0}
    mlp = {"mlp_activation": "swiglu", "mlp_ratio": 1.5}
    config = ours(tmp_path / "c", num_layers=2, layer_pattern="DD", **block, **mlp)
    source = (tmp_path / "theirs", tmp_path / "run", "--to", "dcp", "--map", tmp_path / "map.yaml", "--config", config)
    convert(*source)
    new, _ = load_model(tmp_path / "run")
    ids_BS = torch.randint(60, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids_BS, use_cache=False).logits
        assert want.std() > 0.5
        assert apart(new.eval()(ids_BS).logits_BSV[..., :60], want) < 1e-5


def test_other_sizes_are_refused_or_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    their_model(tmp_path / "theirs", ["linear_attention"])
    arguments = (tmp_path / "theirs", tmp_path / "run", "--to", "dcp", "--map", MAP, "--config")
    for changed, message in (
        ({"heads_per_key": 4}, "model.mixers.gated_delta_net.heads_per_key is 4, and theirs is 2"),
        ({"value_dim": 4}, "model.mixers.gated_delta_net.value_dim is 4, and theirs is 8"),
    ):
        shape = {"mixers": {"gated_delta_net": SIZES | changed}}
        config = ours(tmp_path / next(iter(changed)), num_layers=1, layer_pattern="D", **shape)
        assert message in refused(capsys, *arguments, config)
    none = ours(tmp_path / "none", num_layers=1, layer_pattern="F", letters=None, mixers=None)
    assert "'layers.0.delta.qk_proj.weight', which is no parameter of the model" in refused(capsys, *arguments, none)
    fewer = {name: value for name, value in SIZES.items() if name not in ("d_conv", "heads_per_key")}
    config = ours(tmp_path / "fewer", num_layers=1, layer_pattern="D", mixers={"gated_delta_net": fewer})
    convert(*arguments, config)
    assert "model.mixers.gated_delta_net.d_conv is 3, as in" in capsys.readouterr().out
    assert load_model(tmp_path / "run")[0].layers[0].delta.conv_v.weight.shape == (64, 3)


def test_blocks_that_heads_do_not_divide_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    their_model(tmp_path / "theirs", ["linear_attention"])
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    rules = yaml.safe_load(MAP.read_text())
    for rule in rules["tensors"]:
        if "per" in rule:
            rule["per"] = "nothing"
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(rules))
    config = ours(tmp_path / "c", num_layers=1, layer_pattern="D")
    arguments = ("--to", "dcp", "--map", tmp_path / "map.yaml", "--config", config)
    said = refused(capsys, tmp_path / "theirs", tmp_path / "run", *arguments)
    assert "the heads of block 'nothing' do not divide query, key, value, z" in said
    save_file(weights | {"model.more.weight": torch.zeros(2)}, tmp_path / "theirs" / "model.safetensors")
    assert "the map says nothing of model.more.weight" in refused(
        capsys, tmp_path / "theirs", tmp_path / "run", "--to", "dcp", "--map", MAP, "--config", config
    )
