"""Warm starts from transformers' own Mamba-2 and Llama: the mixers compute what theirs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusiontree.checkpoint.load import load_model
from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.ops.rotary import rotary_tables
from tests.convert.checkpoints import convert
from tests.convert.test_tool import refused
from tests.end_to_end.runs import ROOT, write_config
from tests.helpers import TINY
from tests.tiny import changed

MAMBA2 = ROOT / "configs" / "maps" / "mamba2.yaml"
LLAMA = ROOT / "configs" / "maps" / "llama.yaml"


def configuration(folder: Path, **model: Any) -> Path:
    """A run's configuration with a tiny model."""
    path = write_config(folder, folder / "data")
    values = yaml.safe_load(path.read_text())
    values["model"] = changed(TINY, **{"tie_word_embeddings": True, **model})
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=60,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=2,
        expand=2,
        conv_kernel=4,
        chunk_size=8,
        num_hidden_layers=2,
        layer_norm_epsilon=1e-5,
        use_conv_bias=True,
        use_bias=False,
        tie_word_embeddings=True,
    )
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("mamba2")
    model.save_pretrained(folder / "saved")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    group = getattr(model.backbone.layers[0].mixer.norm, "group_size", 64)
    return model, folder, {"norm_groups": 64 // group}


@pytest.mark.parametrize("files", ["saved", "pytorch_model.bin"])
def test_mamba2_mixers_compute_what_theirs_do(files: str, mamba2, tmp_path: Path):
    theirs, folder, mamba = mamba2
    config = configuration(tmp_path, layer_pattern="MF", mamba=mamba)
    convert(folder / files, tmp_path / "run", "--to", "dcp", "--map", MAMBA2, "--config", config)
    ours, values = load_model(tmp_path / "run")
    u_BSC = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for our_layer, their_layer in zip(ours.layers, theirs.backbone.layers, strict=True):
            torch.testing.assert_close(
                our_layer.mamba(u_BSC, MixerInputs()), their_layer.mixer(u_BSC), atol=2e-5, rtol=1e-4
            )
            assert torch.equal(our_layer.norm.weight, their_layer.norm.weight)
    assert torch.equal(ours.embed.weight[:60], theirs.backbone.embeddings.weight)
    seed = values["training"]["seed"]
    rest = initialize_parameter("embed.weight", (64, 32), ours.config, seed)
    assert torch.equal(ours.embed.weight[60:], rest[60:])
    name = "layers.1.attention.q_proj.weight"
    assert torch.equal(ours.get_parameter(name), initialize_parameter(name, (32, 32), ours.config, seed))


def test_llama_attention_computes_what_theirs_does(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "llama")
    rules = yaml.safe_load(LLAMA.read_text()) | {"layers": {0: 1, 2: 0}}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(rules))
    model = {"layer_pattern": "FA", "global_heads": 4, "tie_word_embeddings": False, "mamba": {}}
    config = configuration(tmp_path, **model)
    convert(tmp_path / "llama", tmp_path / "run", "--to", "dcp", "--map", tmp_path / "map.yaml", "--config", config)
    ours, _ = load_model(tmp_path / "run")
    x_BSC = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    places_BS = torch.arange(11)[None]
    cos_BSD, sin_BSD = rotary_tables(places_BS, 8, 500000.0)
    with torch.no_grad():
        for our_number, their_number in {1: 0, 0: 2}.items():
            layer = theirs.model.layers[their_number]
            expected = layer.self_attn(
                x_BSC,
                position_embeddings=theirs.model.rotary_emb(x_BSC, places_BS),
                attention_mask=torch.full((11, 11), float("-inf")).triu(1)[None, None],
            )[0]
            got = ours.layers[our_number].attention(x_BSC, MixerInputs(None, cos_BSD, sin_BSD))
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.head.weight, theirs.lm_head.weight)


def test_maps_that_do_not_fit_are_refused(mamba2, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder, mamba = mamba2
    config = configuration(tmp_path, layer_pattern="MF", mamba=mamba)
    rules = yaml.safe_load(MAMBA2.read_text())

    def said(changed: dict[str, Any], model: Path = config) -> str:
        (tmp_path / "map.yaml").write_text(yaml.safe_dump(changed))
        arguments = (folder / "saved", tmp_path / "run", "--to", "dcp", "--map", tmp_path / "map.yaml", "--config")
        return refused(capsys, *arguments, model)

    def changed(index: int, **values: Any) -> dict[str, Any]:
        tensors = [rule | values if i == index else rule for i, rule in enumerate(rules["tensors"])]
        return rules | {"tensors": tensors}

    assert "says nothing of backbone.norm_f.weight" in said(
        rules | {"tensors": [rule for rule in rules["tensors"] if rule["theirs"] != "backbone.norm_f.weight"]}
    )
    assert "did you mean 'backbone.embeddings.weight'" in said(changed(0, theirs="backbone.embedding.weight"))
    assert "did you mean 'embed.weight'" in said(changed(0, ours="embd.weight"))
    names = [f"layers.{{layer}}.mamba.{name}.weight" for name in ("in_proj", "bc_proj")]
    assert "take each once" in said(changed(2, ours={names[0]: ["z", "x"], names[1]: ["B", "C"]}))
    assert "z 64 + x 64 + B 32 + C 32 make 192" in said(changed(2, split=["z", "x", "B", "C"]))
    assert "size of block 'Z' is not known" in said(changed(2, split=["Z", "x", "B", "C", "dt"]))
    assert "filled twice" in said(changed(0, ours="norm.weight"))
    assert "Extra inputs" in said(rules | {"tensor": []})
    assert "which is no parameter" in said(rules | {"layers": {0: 0, 1: 5}})
    other = configuration(tmp_path, layer_pattern="MF", mamba={**mamba, "d_state": 8})
    assert "accept: [mamba.d_state]" in said(rules, other)
    assert "--config FILE" in refused(capsys, folder / "saved", tmp_path / "run", "--to", "dcp", "--map", MAMBA2)
    assert not (tmp_path / "run").exists()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_weights_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    config = configuration(tmp_path, mamba={})
    said = refused(
        capsys, tmp_path / "pytorch_model.bin", tmp_path / "run", "--to", "dcp", "--map", MAMBA2, "--config", config
    )
    assert "save its state dict as safetensors" in said
    assert not (tmp_path / "mark").exists()
