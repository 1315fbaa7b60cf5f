"""An exported folder is compared with our model by its logits, in a process of transformers' own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fusiontree.convert import hf_model, logits
from tests.convert.checkpoints import convert, training_run
from tests.convert.test_tool import refused


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    training_run(folder, layer_pattern="FMA", tie_word_embeddings=True)
    return folder


def exported(run: Path, target: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    convert(run, target, "--to", "hf", *arguments)
    assert (target / "config.json").is_file()
    return capsys.readouterr().out


def test_the_verdict_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = exported(run, tmp_path / "hf", capsys, "--check-logits", "auto", "--dtype", "bf16")
    assert "verified: logits of the exported model on a prompt of 64 tokens equal ours" in said
    assert "verified: 59 tensors read back" in said


@pytest.mark.slow
def test_deep_models_may_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run", num_layers=48)
    said = exported(tmp_path / "run", tmp_path / "hf", capsys, "--check-logits", "auto")
    assert "allowed: 4 times what our own differ by from fp64" in said


@pytest.mark.slow
def test_a_model_that_is_read_otherwise_is_not_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    code = tmp_path / "code"
    shutil.copytree(Path(hf_model.__file__).parent, code)
    file = code / "modeling_fusiontree.py"
    wrong = file.read_text().replace("(distance_ST < window)", "(distance_ST <= window)")
    assert wrong != file.read_text()
    file.write_text(wrong)
    monkeypatch.setattr(hf_model, "__file__", str(code / "__init__.py"))
    said = refused(capsys, run, tmp_path / "new" / "hf", "--to", "hf")
    assert "logits of the exported model differ from ours" in said and "--check-logits off exports anyway" in said
    file.write_text("raise RuntimeError('cannot be loaded')")
    said = refused(capsys, run, tmp_path / "new" / "hf", "--to", "hf")
    assert "transformers could not compute logits of" in said and "RuntimeError: cannot be loaded" in said
    assert not list((tmp_path / "new").iterdir())


def test_why_they_are_not_compared_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "not compared: --check-logits off" in exported(run, tmp_path / "a", capsys, "--check-logits", "off")
    monkeypatch.setattr(logits, "LARGEST", 1000)
    said = exported(run, tmp_path / "b", capsys, "--check-logits", "auto")
    assert "--check-logits on compares it all the same" in said
    monkeypatch.setattr(logits, "available_memory", lambda: 1000)
    said = exported(run, tmp_path / "c", capsys, "--check-logits", "auto")
    assert "GB are free" in said
    monkeypatch.setattr(logits.importlib.util, "find_spec", lambda name: None)
    said = exported(run, tmp_path / "d", capsys, "--check-logits", "auto")
    assert "not compared: transformers is not installed" in said and "verified: 59 tensors" in said
    said = refused(capsys, run, tmp_path / "e", "--to", "hf", "--check-logits", "on")
    assert "--check-logits on: transformers is not installed" in said and not (tmp_path / "e").exists()
