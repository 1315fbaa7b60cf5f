"""The tool's promises: verified or absent, errors that name the way out, memory near the largest tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusiontree.checkpoint import open_files, reader
from fusiontree.checkpoint.metadata import read_metadata
from fusiontree.config.load import load_config
from fusiontree.convert import formats
from fusiontree.convert.dcp import TrainingCheckpoint
from tests.convert.checkpoints import all_tensors, convert, training_run
from tests.end_to_end.runs import ROOT, build_data, events, train, write_config
from tools.convert_checkpoint import main, parse_size


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the tool, see it refuse, return what it said."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    training_run(folder, tie_word_embeddings=True, use_alignment=False)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_safetensors_file(dtype: str, run: Path, tmp_path: Path):
    convert(run, tmp_path / "w.safetensors", "--to", "safetensors", "--dtype", dtype)
    read = load_file(tmp_path / "w.safetensors")  # the library's own reader
    source = {n.removeprefix("model."): t for n, t in all_tensors(run).items() if n.startswith("model.")}
    assert read.keys() == source.keys()
    for name, tensor in source.items():
        keep = dtype == "fp32" or ".ssm." in name
        assert torch.equal(read[name], tensor if keep else tensor.bfloat16()), name
    convert(tmp_path / "w.safetensors", tmp_path / "again", "--to", "dcp")
    again = all_tensors(tmp_path / "again")
    assert all(torch.equal(again[f"model.{name}"], tensor.float()) for name, tensor in read.items())


def test_list_and_dry_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert("--list")
    listed = capsys.readouterr().out
    assert all(name in listed for name in formats.FORMATS)
    convert(run, tmp_path / "hf", "--to", "hf", "--dry-run")
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_errors_name_the_way_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "new"
    assert "did you mean 'hf'" in refused(capsys, run, target, "--to", "hff")
    assert "did you mean 'dcp'" in refused(capsys, run, target, "--to", "hf", "--from", "dpc")
    assert "did you mean 'run'" in refused(capsys, run.with_name("rum"), target, "--to", "hf")
    assert "--list" in refused(capsys, run)
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in refused(capsys, tmp_path / "empty", target, "--to", "hf")
    assert "looks like dcp" in refused(capsys, run, target, "--to", "hf", "--from", "hf")
    assert "ends in .safetensors" in refused(capsys, run, target, "--to", "safetensors")
    assert "not a .safetensors file" in refused(capsys, run, tmp_path / "x.safetensors", "--to", "hf")
    assert "leave --dtype out" in refused(capsys, run, target, "--to", "dcp", "--dtype", "bf16")
    assert "write for example" in refused(capsys, run, target, "--to", "hf", "--max-shard-size", "5 parsecs")
    said = refused(capsys, run, target, "--to", "zero", "--tp", "3")
    assert "--tp 3 does not fit the model" in said and "It allows tp [1, 2]" in said
    assert "--tp 3 does not fit" in refused(capsys, run, target, "--to", "megatron", "--tp", "3", "--dry-run")
    (tmp_path / "taken").mkdir()
    assert "name a new one" in refused(capsys, run, tmp_path / "taken", "--to", "hf")
    config = ROOT / "configs" / "quickstart.yaml"
    assert "no meaning from dcp to hf" in refused(capsys, run, target, "--to", "hf", "--config", config)
    assert not target.exists()


def test_foreign_and_contradicting_folders_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert(run, tmp_path / "hf", "--to", "hf", "--max-shard-size", "40KB")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())

    def with_config(**changes: object) -> str:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        return refused(capsys, tmp_path / "hf", tmp_path / "new", "--to", "dcp")

    assert "model of type 'llama'" in with_config(model_type="llama")
    assert "'model.head.weight' is missing" in with_config(tie_word_embeddings=False)
    assert "has shape (264, 32), the model wants (300, 32)" in with_config(vocab_size=300)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    next((tmp_path / "hf").glob("model-00002-*")).unlink()
    assert "lacks model-00002" in refused(capsys, tmp_path / "hf", tmp_path / "new", "--to", "dcp")


def test_a_damaged_source_leaves_no_target(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").rglob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "differs from the SHA-256" in refused(capsys, tmp_path / "run", tmp_path / "hf", "--to", "hf")
    convert(run, tmp_path / "hf", "--to", "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "copy the file again" in refused(capsys, tmp_path / "hf", tmp_path / "new", "--to", "dcp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_what_reads_back_different_is_not_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from fusiontree.convert.safetensors_file import SafetensorsFile

    read = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: read(self, name) + ("gate.up" in name))
    said = refused(capsys, run, tmp_path / "hf", "--to", "hf")
    assert "2 tensors read back different" in said and "gate.up" in said
    assert not list(tmp_path.iterdir())


def test_a_step_folder_can_be_the_target(run: Path, tmp_path: Path):
    convert(run, tmp_path / "checkpoints" / "step-00000007", "--to", "dcp")
    before, after = all_tensors(run), all_tensors(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()


def test_a_source_is_opened_once(run: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[Path] = []
    described: list[Path] = []

    class Counting(open_files._File):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    def counting(folder: Path) -> dict:
        described.append(folder)
        return read_metadata(folder)

    monkeypatch.setattr(open_files, "_File", Counting)
    monkeypatch.setattr(reader, "read_metadata", counting)
    source = TrainingCheckpoint(run)
    expected = all_tensors(run)
    opened.clear()
    described.clear()
    assert all(torch.equal(source.read(name), expected[name]) for name in source.entries)
    assert len(source.entries) > 100 and not described
    assert len(opened) <= min(8, os.cpu_count() or 1)  # one a thread


def test_sizes():
    assert [parse_size(t) for t in ("500MB", "5GB", "1.5k", "7")] == [500_000_000, 5_000_000_000, 1500, 7]


@pytest.mark.slow
def test_training_goes_on_from_a_converted_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = build_data(tmp_path / "corpus")
    config = write_config(tmp_path, data, "target")
    training_run(tmp_path / "other", hidden_size=64)
    said = refused(capsys, tmp_path / "other", tmp_path / "target", "--to", "dcp", "--config", config)
    assert "the model wants (264, 32)" in said
    training_run(tmp_path / "source", **load_config(config).model.model_dump())
    convert(tmp_path / "source", tmp_path / "hf", "--to", "hf")
    convert(tmp_path / "hf", tmp_path / "target", "--to", "dcp", "--config", config)
    done = train(config, "training.max_steps=2", "training.warmup_steps=1")
    assert done.returncode == 0, done.stderr
    assert "resume" in events(tmp_path / "target")
    capsys.readouterr()
    convert(tmp_path / "target", tmp_path / "megatron", "--to", "megatron")
    convert(tmp_path / "megatron", tmp_path / "moved", "--to", "dcp")
    moved = load_config(tmp_path / "moved" / "config.yaml")  # it came along, for the new place
    assert moved.run_dir == str(tmp_path / "moved") and moved.training.max_steps == 2
    convert(tmp_path / "hf", tmp_path / "unknown", "--to", "dcp")
    said = capsys.readouterr().out
    assert "convert with --config FILE" in said and "training goes on from states of zeros" in said
