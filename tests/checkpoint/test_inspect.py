"""tools/inspect_checkpoint.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.saver import Saver
from tools.inspect_checkpoint import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saver = Saver(tmp_path / "run" / "checkpoints", CheckpointConfig())
    tensors = {"model.a": torch.full((2, 8), 3.0), "optimizer.exp_avg.a": torch.zeros(2, 8)}
    values = {"tokens": 640, "data": {"row": 12}, "config": {"parallel": {"engine": "fsdp2", "tp": 2}}}
    saver.save(4, tensors, values, wait=True)
    tensors["model.a"][1, 1] = 3.5
    saver.save(8, tensors, values | {"tokens": 1280}, wait=True)
    return tmp_path / "run"


def test_contents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run / "checkpoints" / "step-00000004")]) == 0
    out = capsys.readouterr().out
    for part in ("step             4", "640", '{"row": 12}', "engine fsdp2, tp 2", "model: 16 values", "norm 12 "):
        assert part in out
    assert main([str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 8
    assert [t["name"] for t in shown["tensors"]] == ["model.a", "optimizer.exp_avg.a"]
    assert shown["tensors"][0] | {"norm": 0} == {
        **{"name": "model.a", "shape": [2, 8], "dtype": "float32", "pieces": 1},
        **{"norm": 0, "max": 3.5, "finite": True},
    }


def test_json_is_strict_where_values_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", float("nan"))):
        saver = Saver(tmp_path / name / "checkpoints", CheckpointConfig())
        saver.save(4, {"model.a": torch.tensor([1.0, value])}, {}, wait=True)
    for words, code in ((["b"], 0), (["--diff", "a", "b"], 1)):
        assert main(["--json", *(word if word[0] == "-" else str(tmp_path / word) for word in words)]) == code
        (tensor,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["tensors"]
        assert tensor["max"] is None


def test_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(run / "checkpoints" / f"step-0000000{step}") for step in (4, 8))
    assert main(["--diff", a, a]) == 0
    assert "2 tensors are equal bit by bit, 0 are not; 0 other values differ" in capsys.readouterr().out
    assert main(["--diff", a, b]) == 1
    out = capsys.readouterr().out
    assert "tokens: 640 | 1280" in out and "model.a: 1 of 16 values, by 0.5 at most" in out
    assert "1 tensors are equal" in out


def test_verify_and_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--verify"]) == 0
    assert "ok: " in capsys.readouterr().out
    assert main([str(run), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    file = run / "checkpoints" / "step-00000008" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for arguments in (["--verify"], []):
        assert main([str(run), *arguments]) == 2
        said = capsys.readouterr().err
        assert "__0_0.distcp differs from the SHA-256" in said and "has step-00000004, step-00000008" in said


def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.with_name("rum"))]) == 2
    assert "does not exist; did you mean 'run'?" in capsys.readouterr().err
    assert main([]) == 2
    assert "give one PATH" in capsys.readouterr().err
    assert main([str(run.parent)]) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
