"""Warm starts read the source's config.json: what it says is applied, or refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fusiontree.checkpoint.load import load_model
from fusiontree.convert import logits
from fusiontree.convert.foreign import agree, effective, read_foreign
from fusiontree.convert.name_map import in_layers
from fusiontree.convert.safetensors_file import SafetensorsFile
from fusiontree.convert.weights import open_weights
from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError
from tests.convert.checkpoints import convert
from tests.convert.test_tool import refused
from tests.convert.test_warm_start import LLAMA, MAMBA2, configuration
from tests.helpers import TINY

LLAMA_CONFIG = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION, MAMBA = ["layers.{layer}.attention.q_proj.weight"], ["layers.{layer}.mamba.in_proj.weight"]
EVERYTHING = [*ATTENTION, *MAMBA, "norm.weight", "embed.weight"]
MLP = ["mlp", "global_heads"]


def foreign(folder: Path, **values: Any):
    """Read a configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return read_foreign(folder)


def ours(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate({**TINY, **values})


def test_settings_that_are_not_given_are_theirs(tmp_path: Path):
    theirs = foreign(tmp_path, **LLAMA_CONFIG, rope_theta=10000.0, tie_word_embeddings=True, rms_norm_eps=1e-6)
    adopted, differences = agree(theirs, ours(), set(), EVERYTHING, MLP)
    assert adopted == {"norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0}
    assert [said.split()[0] for said in differences] == ["model.global_heads", "mlp"]
    agree(theirs, ours(), {"rope_theta"}, ["embed.weight"], MLP)  # what no parameter needs is not compared
    with pytest.raises(UserError, match=r"model\.rope_theta is 500000\.0, and theirs is 10000\.0"):
        agree(theirs, ours(), {"rope_theta"}, EVERYTHING, MLP)
    adopted, differences = agree(theirs, ours(), {"rope_theta"}, EVERYTHING, [*MLP, "rope_theta"])
    assert "rope_theta" not in adopted and "model.rope_theta is 500000.0" in " ".join(differences)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}}, "auto_map"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_heads"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"rms_norm_eps": 1e-3}, "norm_eps"),
        ({"model_type": "mistral", "sliding_window": 4}, "window_size"),
        ({"model_type": "qwen2"}, "qkv_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gemma", "head_dim": 8}, "norm_style"),
        ({"model_type": "gemma", "head_dim": 8}, "embedding_scale"),
        ({"model_type": "gpt_neox"}, "model_type"),
        ({"model_type": "falcon_h1", "key_multiplier": 0.5}, "key_multiplier"),
        ({"model_type": "falcon_h1"}, "mamba_rms_norm"),
        ({"model_type": "bamba"}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(values: dict[str, Any], named: str, tmp_path: Path):
    theirs = foreign(tmp_path, **(LLAMA_CONFIG | values))
    assert theirs is not None
    model = ours()
    explicit = {name for name in theirs.settings if name != "rope_theta"}
    with pytest.raises(UserError, match=named) as error:
        agree(theirs, model, explicit, EVERYTHING, MLP)
    accepted = str(error.value).rsplit("accept: [", 1)[1].rstrip("]'").split(", ")
    assert named in accepted
    agree(theirs, model, explicit, EVERYTHING, [*MLP, *accepted])  # the advice works


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": "many"},
        {"rope_theta": float("nan")},
        {"rope_theta": 10**400},
        {"tie_word_embeddings": "yes"},
        {"tie_word_embeddings": 1},
        {"rms_norm_eps": -1.0},
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"rope_scaling": 3},
        {"hidden_size": None, "num_attention_heads": 2.5},
        {"max_position_embeddings": "long"},
        {"model_type": "mamba2", "time_step_limit": [0.1]},
        {"model_type": "mamba2", "time_step_limit": ["a", "b"]},
        {"model_type": "mistral", "sliding_window": -4},
        {"model_type": "qwen2", "layer_types": 7},
    ],
)
def test_values_of_a_wrong_type_are_refused(values: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError):
        agree(foreign(tmp_path, **(LLAMA_CONFIG | values)), ours(), set(), EVERYTHING, MLP)


def test_groups_that_no_shape_shows(tmp_path: Path):
    """2 groups of 8 have the shapes of 1 group of 16."""
    sizes = {"model_type": "mamba2", "hidden_size": 32, "head_dim": 8, "conv_kernel": 4, "expand": 2}
    theirs = foreign(tmp_path, **sizes, n_groups=2, state_size=8, time_step_limit=[0.001, float("inf")])
    adopted, _ = agree(theirs, ours(), set(), MAMBA, [])
    expected = {"mamba.d_state": 8, "mamba.n_groups": 2, "mamba.dt_min": 0.001}
    assert {name: adopted.get(name, effective(ours(), name)) for name in expected} == expected
    with pytest.raises(UserError, match=r"model\.mamba\.d_state is 16, and theirs is 8"):
        agree(theirs, ours(), {"mamba.d_state"}, MAMBA, [])


def test_defaults_are_those_of_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gemma": "Gemma", "mamba2": "Mamba2"}
    for kind, name in (kinds | {"falcon_h1": "FalconH1", "bamba": "Bamba"}).items():
        full = json.loads(getattr(transformers, f"{name}Config")().to_json_string(use_diff=False))
        short, long = foreign(tmp_path, model_type=kind), foreign(tmp_path, **full)
        assert short is not None and long is not None
        assert short.settings == long.settings, kind
        assert short.obstacles.keys() == long.obstacles.keys(), kind


def saved(folder: Path, config: dict[str, Any], *, bare: bool = False, **tensors: torch.Tensor) -> Path:
    """A folder with the attention of a tiny Llama and further tensors; ``bare`` leaves config.json out."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"model.embed_tokens.weight": (60, 32), "model.norm.weight": (32,)}
    shapes |= {f"model.layers.{layer}.input_layernorm.weight": (32,) for layer in range(2)}
    for layer in range(2):
        rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
        shapes |= {f"model.layers.{layer}.self_attn.{name}.weight": (size, 32) for name, size in rows.items()}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(weights | tensors, folder / "model.safetensors")
    if not bare:
        (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | config))
    return folder


def config_file(folder: Path, **model: Any) -> Path:
    """A run's configuration; settings of the model that are None are not named."""
    folder.mkdir(exist_ok=True)
    path = configuration(folder, **model)
    values = yaml.safe_load(path.read_text())
    values["model"] = {name: value for name, value in values["model"].items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path


def start(source: Path, tied: bool | None = None, *options: str) -> Any:
    """Convert a folder by the map for Llama; return model and configuration."""
    config, run = config_file(source / "ours", tie_word_embeddings=tied), source / "run"
    convert(source, run, "--to", "dcp", "--map", LLAMA, "--config", config, *options)
    return load_model(run)


HEAD = torch.randn(60, 32, generator=torch.Generator().manual_seed(9))


def test_the_head_is_theirs(tmp_path: Path):
    model, values = start(saved(tmp_path / "tied", {"tie_word_embeddings": True, "rope_theta": 1e4}))
    assert model.head.weight is model.embed.weight
    assert values["model"]["rope_theta"] == 1e4 and values["model"]["norm_eps"] == 1e-6
    model, values = start(saved(tmp_path / "untied", {}, **{"lm_head.weight": HEAD}))
    assert torch.equal(model.head.weight[:60], HEAD) and not values["model"]["tie_word_embeddings"]
    model, _ = start(saved(tmp_path / "copy", {"tie_word_embeddings": True}), False)
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.head.weight[:60], model.embed.weight[:60])


def test_what_starts_at_random_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start(saved(tmp_path / "s", {}, **{"lm_head.weight": HEAD}))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "keep initial values" in line]
    assert "layers.0-1.mlp.down.weight" in line and "layers.0-1.mamba.in_proj.weight" in line
    assert "attention.q_proj" not in line and "different from the source" in said and "mlp reads" in said
    names = [f"layers.{layer}.a" for layer in (0, 1, 2, 5, 7, 8)] + ["embed.weight", "layers.1.b"]
    assert in_layers(names) == ["layers.0-2,5,7-8.a", "embed.weight", "layers.1.b"]


def test_heads_that_contradict_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def said(source: Path, tied: bool | None = None) -> str:
        config = config_file(source / "ours", tie_word_embeddings=tied)
        return refused(capsys, source, source / "run", "--to", "dcp", "--map", LLAMA, "--config", config)

    assert "no tensor of the source goes to 'head.weight'" in said(saved(tmp_path / "none", {}))
    assert "no tensor of the source goes to 'head.weight'" in said(saved(tmp_path / "bare", {}, bare=True), False)
    head = {"lm_head.weight": HEAD}
    assert "differs from" in said(saved(tmp_path / "both", {"tie_word_embeddings": True}, **head))
    assert "theirs is False" in said(saved(tmp_path / "other", {}, **head), True)
    integers = {"lm_head.weight": torch.ones(60, 32, dtype=torch.int8)}
    assert "quantized" in said(saved(tmp_path / "int8", {}, **integers))


def test_masks_and_files_of_a_trainer_are_left_out(tmp_path: Path):
    head = {"lm_head.weight": HEAD, "model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.bool)}
    model, _ = start(saved(tmp_path / "bool", {}, **head))
    assert torch.equal(model.head.weight[:60], HEAD)
    source = saved(tmp_path / "bin", {}, **{"lm_head.weight": HEAD})
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": weights}, source / "pytorch_model.bin")
    torch.save(argparse.Namespace(lr=1), source / "training_args.bin")
    model, _ = start(source)
    assert torch.equal(model.head.weight[:60], HEAD)
    (source / "pytorch_model.bin").rename(source / "other.bin")
    assert set(open_weights(source).entries) == set(weights)
    torch.save([HEAD], source / "more.bin")
    with pytest.raises(UserError, match="in another way"):
        open_weights(source)
    torch.save({"lm_head.weight": HEAD}, source / "more.bin")
    with pytest.raises(UserError, match=r"other\.bin and in .*more\.bin|more\.bin and in .*other\.bin"):
        open_weights(source)


def test_safetensors_headers_that_lie(tmp_path: Path):
    def written(name: str, size: int = 16, **header: Any) -> Path:
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        return tmp_path / name

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    assert set(SafetensorsFile(written("good", a=entry)).entries) == {"a"}
    for change in (
        {"dtype": "F6_E2M3"},
        {"dtype": 7},
        {"shape": [-4]},
        {"shape": ["4"]},
        {"data_offsets": [0]},
        {"data_offsets": [8, 16]},
        {"data_offsets": [64, 80]},
        {"shape": None},
    ):
        with pytest.raises(UserError):
            SafetensorsFile(written("bad", a=entry | change))
    with pytest.raises(UserError, match="'a' and 'b' overlap"):
        SafetensorsFile(written("overlap", 24, a=entry, b=entry | {"data_offsets": [8, 24]}))
    with pytest.raises(UserError, match="of type F6_E2M3"):
        SafetensorsFile(written("unknown", a=entry | {"dtype": "F6_E2M3"}))


def in_this_process(folder: Path, ids_BS: torch.Tensor, *, own_code: bool) -> torch.Tensor:
    """Replace the process of its own, which takes seconds to import transformers."""
    from transformers import AutoModelForCausalLM

    assert not own_code
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids_BS, use_cache=False).logits.double()


def their_folder(kind: str, folder: Path, **values: Any) -> Path:
    """Save transformers' own small model with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False}
    if kind == "Mamba2":
        sizes |= {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 8}
    else:
        sizes |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**(sizes | values))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        ("MM", {}),
        ("MF", {"tie_word_embeddings": True}),
        ("FF", {"time_step_limit": [0.3, 0.6]}),
        ("MM", {"layer_norm_epsilon": 0.1, "use_conv_bias": False}),
    ],
)
def test_mamba2_starts_with_its_logits(
    pattern: str,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(logits, "_transformers_logits", in_this_process)
    source = their_folder("Mamba2", tmp_path / "theirs", **values)
    mamba = {"n_groups": 2, "norm_groups": 2}
    config = config_file(tmp_path / "c", tie_word_embeddings=None, layer_pattern=pattern, mamba=mamba)
    arguments = ("--to", "dcp", "--map", MAMBA2, "--config")
    convert(source, tmp_path / "run", *arguments, config, "--check-logits", "auto")
    assert "verified: logits" in capsys.readouterr().out
    with pytest.raises(UserError, match="logits of the new model differ"):
        monkeypatch.setattr(logits, "_transformers_logits", lambda *a, **k: in_this_process(*a, **k) + torch.arange(60))
        main_raises(source, tmp_path / "other", *arguments, config)
    assert not (tmp_path / "other").exists()
    encoded = config_file(tmp_path / "e", tie_word_embeddings=None, srte_encoding="sincos", mamba=mamba)
    assert "srte_encoding is sincos" in refused(capsys, source, tmp_path / "other", *arguments, encoded)
    deeper = config_file(tmp_path / "d", tie_word_embeddings=None, num_layers=3, mamba=mamba)
    said = refused(capsys, source, tmp_path / "other", *arguments, deeper, "--check-logits", "on")
    assert "layers 2 keep initial values" in said


def main_raises(*arguments: Any) -> None:
    """Run the tool without catching its errors."""
    from fusiontree.cli.convert_checkpoint import build_parser, command

    command(build_parser().parse_args([*map(str, arguments), "--check-logits", "on"]))


HYBRID = {"mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}


@pytest.mark.parametrize(
    ("kind", "rules", "values", "reason"),
    [
        ("Llama", LLAMA, {}, "mlp reads the residual stream"),
        ("Mistral", LLAMA, {}, "mlp reads the residual stream"),
        ("Qwen2", LLAMA, {}, "qkv_bias"),
        ("Gemma", LLAMA, {}, "norm_style"),
        ("FalconH1", LLAMA, {**HYBRID, "mamba_n_heads": 4, "mamba_d_ssm": 32}, "model.norm.weight"),
        ("FalconH1", MAMBA2, {**HYBRID, "mamba_n_heads": 4, "mamba_d_ssm": 32}, "mamba_rms_norm is False"),
        ("Bamba", LLAMA, {**HYBRID, "mamba_n_heads": 8, "attn_layer_indices": [1]}, "partial_rotary_factor is 0.5"),
        ("Bamba", MAMBA2, {**HYBRID, "mamba_n_heads": 8, "attn_layer_indices": [1]}, "mlp reads the residual stream"),
    ],
)
def test_transformers_without_an_equal_are_refused(
    kind: str, rules: Path, values: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = their_folder(kind, tmp_path / "theirs", **values)
    config = config_file(tmp_path / "c", tie_word_embeddings=None)
    arguments = (source, tmp_path / "run", "--to", "dcp", "--map", rules, "--config", config)
    assert reason in refused(capsys, *arguments, "--check-logits", "on")
    assert not (tmp_path / "run").exists()
