"""Wrong input of a user ends with one clear message and exit code 2, and overwrites nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fusiontree.train import main
from tests.end_to_end.runs import train, write_config


def refused(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    assert main(["--config", str(config), *overrides]) == 2
    return capsys.readouterr().err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.max_step=3", ["training.max_step", "max_steps"]),
        ("model.num_heads=3", ["hidden_size 32", "num_heads 3"]),
        ("model.global_heads=7", ["global_heads 7"]),
        ("model.window_size=0", ["window_size"]),
        ("model.mamba.n_groups=3", ["n_groups 3"]),
        ("model.vocab_size=200", ["257 tokens", "vocab_size is 200"]),
        ("data.train=nowhere", ["'nowhere' does not exist", "fusiontree data build"]),
        ("training.seq_len=100000 model.max_position_embeddings=100000", ["no row of training.seq_len 100000"]),
        ("parallel.tp=2", ["1 processes do not divide by parallel.tp 2", "start a multiple of 2"]),
        ("parallel.shard_size=3", ["parallel.shard_size 3", "use one of [1]"]),
        ("parallel.shard_size=1 parallel.engine=ddp", ["parallel.shard_size is for engine fsdp2"]),
        ("training.device=cuda", ["training.device is cuda", "training.device=cpu"]),
        ("model.kernels.ssd=mamba_ssm", ["mamba_ssm"]),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, override: str, parts: list[str]
) -> None:
    config = write_config(tmp_path, data)
    done = train(config, *override.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_the_folder_of_another_run_is_left_alone(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, data)
    assert (
        train(config, "training.max_steps=2", "training.warmup_steps=0", "training.validation.interval=0").returncode
        == 0
    )
    before = snapshot(tmp_path / "run")
    message = refused(capsys, config, "model.num_layers=3", "training.seed=5")
    assert "model.num_layers: 2 in the folder, 3 now" in message
    assert "training.seed" in message
    assert snapshot(tmp_path / "run") == before


def test_an_empty_or_unfinished_dataset_is_named(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, data)
    assert "it holds the datasets ['train', 'validation']" in refused(capsys, config, f"data.train={data}", "--check")
    copy = tmp_path / "copy"
    shutil.copytree(data / "train", copy)
    (copy / "dataset.json").unlink()
    assert "not a complete dataset" in refused(capsys, config, f"data.train={copy}", "--check")
    info = json.loads((data / "train" / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | {"shards": info["shards"][:1]}))
    assert "was changed after it was written" in refused(capsys, config, f"data.train={copy}", "--check")


def test_check_says_ok_and_writes_nothing(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert main(["--config", str(config), "--check"]) == 0
    assert "ok" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_help_and_print_config(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert main(["--config", str(config), "--print-config", "model.num_layers=3"]) == 0
    assert "num_layers: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "training.seq_len" in capsys.readouterr().out
