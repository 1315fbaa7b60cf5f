"""Megatron-core's distributed checkpoint, read and written by megatron-core itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusiontree.convert.megatron import blocks_of
from fusiontree.models.config import ModelConfig
from tests.convert.checkpoints import all_tensors, convert, equal, training_run
from tests.convert.test_tool import refused
from tests.end_to_end.runs import ROOT, environment
from tests.helpers import tiny_config


def blocks_by_hand(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, int | None]]:
    """The keys that our tensors have there and the axis that tp cuts, written down without the converter's tables.

    Sizes are those of a tiny model: 8 state space heads of 8 channels, 2 groups of state 16, 2 + 2 heads of 8.
    """
    found: dict[str, tuple[Tensor, int | None]] = {}
    packed = {
        "in_proj": (0, {"z": 64, "x": 64, "dt": 8}),
        "bc_proj": (0, {"B": 32, "C": 32}),
        "conv_bc": (0, {"B": 32, "C": 32}),
        "q_proj": (0, {"local": 16, "global": 16}),
        "k_proj": (0, {"local": 8, "global": 8}),
        "v_proj": (0, {"local": 8, "global": 8}),
        "o_proj": (1, {"local": 16, "global": 16}),
    }
    for name, tensor in tensors.items():
        key = name
        for moment in ("exp_avg", "exp_avg_sq"):
            key = key.replace(f"optimizer.{moment}.", f"optimizer.state.{moment}.model.")
        module = name.split(".")[-2]
        if module in packed:
            axis, sizes = packed[module]
            for block, part in zip(sizes, tensor.split(list(sizes.values()), dim=axis), strict=True):
                # One local and one global key/value head cannot be cut in two.
                found[f"{key}.{block}"] = (part.clone(), None if module in ("k_proj", "v_proj") else axis)
        elif module == "out_proj" and ".mamba." in name:
            found[key] = (tensor, 1)
        elif module in ("embed", "head", "conv_x", "ssm") or ".mamba.norm." in name:
            found[key] = (tensor, 0)
        else:
            found[key] = (tensor, None)
    return found


def megatron(action: str, folder: Path, tp: int, tensors: dict[str, tuple[Tensor, int | None]]) -> dict[str, Tensor]:
    """Let megatron-core load or save in a process of its own."""
    file = folder.with_name(f"{folder.name}.pt")
    torch.save(tensors, file)
    script = Path(__file__).with_name("megatron_side.py")
    command = [sys.executable, str(script), action, str(folder), str(tp), str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{file}.loaded", weights_only=True) if action == "load" else {}


@pytest.mark.slow
@pytest.mark.parametrize("written_for", [1, 2])
def test_megatron_loads_what_we_write_and_we_read_it_back(written_for: int, tmp_path: Path):
    training_run(tmp_path / "run", tie_word_embeddings=written_for == 2, layer_pattern="FMA")
    convert(tmp_path / "run", tmp_path / "mcore", "--to", "megatron", "--tp", written_for)
    before = all_tensors(tmp_path / "run")
    expected = blocks_by_hand(before)
    loaded = megatron("load", tmp_path / "mcore", 2, expected)
    assert equal(loaded, {key: tensor for key, (tensor, _) in expected.items()})
    convert(tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    assert equal(all_tensors(tmp_path / "again"), before)
    states = [next((tmp_path / n / "checkpoints").glob("*/state.json")).read_text() for n in ("run", "again")]
    assert json.loads(states[0]) == json.loads(states[1])


@pytest.mark.slow
def test_what_megatron_itself_writes_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run", layer_pattern="FMA")
    before = all_tensors(tmp_path / "run")
    megatron("save", tmp_path / "mcore", 2, blocks_by_hand(before))
    assert "give --config FILE" in refused(capsys, tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    convert(tmp_path / "run", tmp_path / "ours", "--to", "megatron")
    (tmp_path / "mcore" / "fusiontree.json").write_bytes((tmp_path / "ours" / "fusiontree.json").read_bytes())
    convert(tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    assert equal(all_tensors(tmp_path / "again"), before)


def test_blocks_cover_every_parameter_once():
    for config in (tiny_config(layer_pattern="FMA"), tiny_config(global_heads=0, num_kv_heads=4)):
        from fusiontree.convert.reader import parameter_shapes

        for tp in (1, 2, 4):
            cut = 0
            for name, shape in parameter_shapes(ModelConfig.model_validate(config.model_dump())).items():
                count = torch.zeros(shape)
                for block in blocks_of(name, shape, config, tp):
                    view = block.of(count)
                    for offset, size in block.chunks().items():
                        part = view
                        for axis, (first, length) in enumerate(zip(offset, size, strict=True)):
                            part = part.narrow(axis, first, length)
                        part += 1
                    cut += block.parts > 1
                assert bool((count == 1).all()), name
            assert (cut > 0) is (tp > 1)


def test_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "mcore", "--to", "megatron")
    values = json.loads((tmp_path / "mcore" / "fusiontree.json").read_text())
    values["config"]["model"]["num_layers"] = 3
    (tmp_path / "mcore" / "fusiontree.json").write_text(json.dumps(values))
    said = refused(capsys, tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    assert "lacks 'model.layers.2.norm.weight'" in said
    values["config"]["model"]["of_a_later_version"] = True
    (tmp_path / "mcore" / "fusiontree.json").write_text(json.dumps(values))
    said = refused(capsys, tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    assert "configuration describes no model of this version (model.of_a_later_version: " in said
    (tmp_path / "mcore" / "fusiontree.json").write_text("{")
    said = refused(capsys, tmp_path / "mcore", tmp_path / "again", "--to", "dcp")
    assert "fusiontree.json cannot be read" in said
    assert "at least 1" in refused(capsys, tmp_path / "run", tmp_path / "x", "--to", "megatron", "--tp", 0)
